"""The ensemble: who answers, who refines, what an answer may cost. Shared by `predict` and `serve`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stitch_ray.config.base import ModelConfig, Name, Strict
from stitch_ray.config.reliability import EndpointConfig


class AutoscalingConfig(Strict):
    """How many replicas a deployment has. Used by `serve` only; actors of `predict` are `model.replicas`."""

    min_replicas: int = Field(1, ge=0, description="replicas that are kept when nothing is asked")
    max_replicas: int = Field(1, ge=1, description="most replicas")
    target_ongoing_requests: float = Field(4.0, gt=0, description="requests a replica at which it is well used")
    upscale_delay_s: float = Field(5.0, ge=0, description="seconds of need before a replica is added")
    downscale_delay_s: float = Field(60.0, ge=0, description="seconds without need before one is taken away")
    max_ongoing_requests: int = Field(16, ge=1, description="requests a replica works on at a time")
    max_queued_requests: int = Field(64, ge=0, description="requests that wait for a replica, for each caller")

    @model_validator(mode="after")
    def _ordered(self) -> AutoscalingConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} exceeds max_replicas {self.max_replicas}")
        if self.target_ongoing_requests > self.max_ongoing_requests:
            raise ValueError("target_ongoing_requests above max_ongoing_requests can never be reached")
        return self


class MemberConfig(Strict):
    """One member of the ensemble: a local model or a server that answers."""

    model: ModelConfig | None = Field(None, description="a local model")
    endpoint: EndpointConfig | None = Field(None, description="or a server that speaks the OpenAI chat API")
    template: str = Field("chat", description="chat: the model's own chat template; raw: no markers; or a Jinja file")
    autoscaling: AutoscalingConfig = Field(AutoscalingConfig(), description="replicas when served")  # type: ignore[call-arg]

    @model_validator(mode="after")
    def _one(self) -> MemberConfig:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("give model or endpoint, one of them")
        if self.endpoint is not None and self.template != "chat":
            raise ValueError("template has no effect with endpoint, which has its own")
        return self

    @property
    def name(self) -> str:
        """Name in answers, metrics and files."""
        who = self.model or self.endpoint
        assert who is not None
        return who.name


class PrimaryConfig(MemberConfig):
    """The model whose answers are given where they can be trusted. Answers as `sample-answers` had them."""

    max_tokens: int = Field(64, ge=1, description="longest answer, as samples.max_tokens in sample-answers")
    stop: list[str] = Field([], description="strings an answer ends before, as samples.stop in sample-answers")
    adapters: dict[Name, str] = Field({}, description="task -> LoRA adapter of the model that answers its questions")
    max_adapters: int = Field(4, ge=1, description="adapters that a replica keeps in memory")

    @model_validator(mode="after")
    def _adapters(self) -> PrimaryConfig:
        if self.adapters and (self.model is None or self.model.engine != "transformers"):
            raise ValueError("adapters need a local model with engine: transformers")
        return self


class OnlineSignalsConfig(Strict):
    """Signals that cost further generations are off unless asked for here."""

    samples: int = Field(0, ge=0, description="answers sampled beside the draft, as samples.num in sample-answers")
    temperature: float = Field(1.0, gt=0, description="of these samples")
    top_p: float = Field(1.0, gt=0, le=1, description="of these samples")
    prompted: bool = Field(False, description="allow p_true and verbalized_confidence: one more call each")
    similarity: Literal["exact", "embedding", "nli"] = Field("exact", description="as in sample-answers")
    encoder: str | None = Field(None, description="folder of the embedding or NLI model")
    min_cosine: float = Field(0.85, gt=-1, le=1, description="embedding: closer answers mean the same")

    @model_validator(mode="after")
    def _consistent(self) -> OnlineSignalsConfig:
        if self.samples == 1:
            raise ValueError("samples: one sample cannot be compared with another; give 0 or at least 2")
        if (self.similarity == "exact") != (self.encoder is None):
            raise ValueError("signals.similarity embedding or nli needs signals.encoder, and exact has no use for it")
        return self


class DialogueConfig(Strict):
    """Two auxiliaries refine a draft in turns, the first of `auxiliaries` first."""

    max_turns: int = Field(4, ge=1, le=32, description="turns of both together")
    stop_on_agreement: bool = Field(True, description="end when the second speaker keeps the answer of the first")
    max_tokens: int = Field(256, ge=8, description="longest turn")
    temperature: float = Field(0.0, ge=0, description="of a turn's first attempt")
    attempts: int = Field(3, ge=1, le=10, description="tries of one turn until it can be read")


class ExcludeConfig(Strict):
    """The question again, with the answers that were turned down excluded, until the validator accepts one (EXAR).

    The first of `auxiliaries` answers, the second judges; one alone does both.
    """

    max_attempts: int = Field(3, ge=1, le=32, description="further answers")
    temperatures: list[Annotated[float, Field(ge=0)]] = Field(
        [0.2, 0.4, 0.6], min_length=1, description="of the further answers; the last one goes on"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="above temperature 0")
    max_tokens: int = Field(64, ge=1, description="longest answer")
    stop: list[str] = Field([], description="strings an answer ends before")
    exclude: Literal["all", "last"] = Field("all", description="which of the answers turned down the prompt excludes")
    on_cycle: Literal["retry", "stop"] = Field("retry", description="an answer turned down before comes again")
    threshold: float = Field(0.5, ge=0, le=1, description="P(CORRECT) from which the validator accepts")


class LimitsConfig(Strict):
    """What one answer may cost. Beyond it nothing more is asked, and nothing unchecked is given."""

    deadline_s: float = Field(30.0, gt=0, description="seconds")
    max_calls: int = Field(32, ge=1, description="calls of models, the scorer not counted")
    max_tokens: int = Field(16384, ge=1, description="tokens read and written by models")


class EnsembleConfig(Strict):
    """Who answers, who refines, and who says how far to trust the answer."""

    PATHS = (
        "primary.model.path",
        "primary.template",
        "primary.adapters.*",
        "auxiliaries.*.model.path",
        "auxiliaries.*.template",
        "signals.encoder",
    )

    primary: PrimaryConfig = Field(description="the model that answers")
    auxiliaries: list[MemberConfig] = Field([], max_length=2, description="those that refine; see route")
    route: Literal["none", "dialogue", "exclude"] = Field(
        "none", description="what is done with an answer that is not sure enough"
    )
    dialogue: DialogueConfig = Field(DialogueConfig(), description="route: dialogue")  # type: ignore[call-arg]
    exclude: ExcludeConfig = Field(ExcludeConfig(), description="route: exclude")  # type: ignore[call-arg]
    signals: OnlineSignalsConfig = Field(OnlineSignalsConfig(), description="what the scorer is given")  # type: ignore[call-arg]
    limits: LimitsConfig = Field(LimitsConfig(), description="of one answer")  # type: ignore[call-arg]
    on_failure: Literal["abstain", "error"] = Field(
        "abstain", description="when scorer, refinement, time or budget fail: abstain, or report an error"
    )

    @model_validator(mode="after")
    def _route(self) -> EnsembleConfig:
        if self.route == "dialogue" and len(self.auxiliaries) != 2:
            raise ValueError(f"route: dialogue needs two auxiliaries, and {len(self.auxiliaries)} are given")
        if self.route == "exclude" and not self.auxiliaries:
            raise ValueError("route: exclude needs an auxiliary that answers, and one that judges or the same for both")
        if self.route == "exclude" and self.auxiliaries[-1].model is None:
            raise ValueError("route: exclude needs a local model as its validator: a server does not tell P(CORRECT)")
        if self.route == "none" and self.auxiliaries:
            raise ValueError("auxiliaries have no effect with route: none; write route: dialogue or exclude")
        names = [member.name for member in self.members]
        if len(set(names)) != len(names):
            raise ValueError(f"the members of the ensemble need different names, got {', '.join(names)}")
        return self

    @property
    def members(self) -> list[MemberConfig]:
        """The primary, then the auxiliaries."""
        return [self.primary, *self.auxiliaries]

    def local_models(self) -> Iterator[ModelConfig]:
        """Those that need a place in the cluster."""
        return (member.model for member in self.members if member.model is not None)

"""Configuration of `sample-answers`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stitch_ray.config.base import DataConfig, ModelConfig, Strict
from stitch_ray.config.reliability import AnswerSplitConfig, EndpointConfig, SignalName


class SamplesConfig(Strict):
    """Which answers a question gets."""

    greedy: bool = Field(True, description="one answer at temperature 0: the one whose reliability is to be told")
    num: int = Field(5, ge=0, description="answers sampled beside it")
    temperature: float = Field(1.0, gt=0, description="of the sampled ones")
    top_p: float = Field(1.0, gt=0, le=1, description="of the sampled ones")
    max_tokens: int = Field(64, ge=1, description="longest answer")
    stop: list[str] = Field([], description="strings an answer ends before")

    @model_validator(mode="after")
    def _some(self) -> SamplesConfig:
        if not self.greedy and not self.num:
            raise ValueError("samples.greedy: false and samples.num: 0 leave nothing to sample")
        return self


class DistractorsConfig(Strict):
    """Wrong and half-right answers written on demand, in one JSON reply a question (Stitch's manner)."""

    num: int = Field(5, ge=1, le=20, description="answers a question")
    temperature: float = Field(0.7, ge=0, description="of the reply")
    max_tokens: int = Field(512, ge=1, description="longest reply")
    attempts: int = Field(3, ge=1, description="replies tried until one holds the answers")
    questions: Literal["train", "all"] = Field("train", description="which questions get some")


class LabelsConfig(Strict):
    """How right an answer is, told from the references. An answer is correct when its label reaches the threshold."""

    metric: Literal["exact_match", "token_f1", "rouge_l", "bert_score", "judge", "none"] = Field(
        "exact_match", description="best over all references, in [0, 1]"
    )
    convention: Literal["rouge_score", "rouge_101"] = Field("rouge_score", description="of rouge_l")
    threshold: float = Field(0.5, gt=0, le=1, description="label from which an answer counts as correct")
    encoder: str | None = Field(None, description="encoder folder of bert_score")
    judge: EndpointConfig | None = Field(None, description="who judges, with metric: judge")

    @model_validator(mode="after")
    def _consistent(self) -> LabelsConfig:
        if (self.metric == "bert_score") != (self.encoder is not None):
            raise ValueError("labels.metric: bert_score and labels.encoder go together")
        if (self.metric == "judge") != (self.judge is not None):
            raise ValueError("labels.metric: judge and labels.judge go together")
        return self


class SignalsConfig(Strict):
    """Uncertainty signals computed for every answer."""

    names: list[SignalName] = Field([], description="which; see the documentation for what each costs")
    similarity: Literal["exact", "embedding", "nli"] = Field(
        "exact", description="when two answers mean the same: equal after normalisation, close, or entailing each other"
    )
    encoder: str | None = Field(None, description="folder of the embedding or NLI model")
    min_cosine: float = Field(0.85, gt=-1, le=1, description="embedding: closer answers mean the same")

    @model_validator(mode="after")
    def _consistent(self) -> SignalsConfig:
        if len(set(self.names)) != len(self.names):
            raise ValueError("signals.names repeats a signal")
        if (self.similarity == "exact") != (self.encoder is None):
            raise ValueError("signals.similarity embedding or nli needs signals.encoder, and exact has no use for it")
        return self


class SampleAnswersConfig(Strict):
    """Sample candidate answers, label them, and compute uncertainty signals."""

    PATHS = ("data.paths.*", "model.path", "template", "labels.encoder", "signals.encoder")

    data: DataConfig = Field(description="questions with their reference answers")
    model: ModelConfig | None = Field(None, description="a local model that answers")
    endpoint: EndpointConfig | None = Field(None, description="or a server that does")
    template: str = Field("chat", description="chat: the model's own chat template; raw: no markers; or a Jinja file")
    samples: SamplesConfig = Field(SamplesConfig(), description="which answers")  # type: ignore[call-arg]
    distractors: DistractorsConfig | None = Field(None, description="wrong answers on demand; default: none")
    labels: LabelsConfig = Field(LabelsConfig(), description="how right an answer is")  # type: ignore[call-arg]
    signals: SignalsConfig = Field(SignalsConfig(), description="uncertainty")  # type: ignore[call-arg]
    split: AnswerSplitConfig = Field(AnswerSplitConfig(), description="shares of the questions")  # type: ignore[call-arg]
    seed: int = Field(0, ge=0, description="of the samples")

    @model_validator(mode="after")
    def _consistent(self) -> SampleAnswersConfig:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("give model or endpoint, one of them")
        if self.endpoint is not None and self.template != "chat":
            raise ValueError("template has no effect with endpoint, which has its own")
        sampled = {"self_consistency", "lexical_similarity", "semantic_entropy"} & set(self.signals.names)
        if sampled and self.samples.num < 2:
            raise ValueError(f"signals {', '.join(sorted(sampled))} compare samples and need samples.num of at least 2")
        return self

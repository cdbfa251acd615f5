"""What `sample-answers`, `train-scorer` and `calibrate` share."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, model_validator

from stitch_ray.config.base import Name, Strict

SignalName = Literal[
    "sequence_log_probability",
    "perplexity",
    "mean_token_entropy",
    "max_token_entropy",
    "mean_token_margin",
    "p_true",
    "self_consistency",
    "lexical_similarity",
    "semantic_entropy",
    "verbalized_confidence",
    "answer_length",
]
SIGNAL_NAMES: tuple[SignalName, ...] = get_args(SignalName)

AnswerSplit = Literal["train", "stack", "isotonic", "calibrate", "test"]
ANSWER_SPLITS: tuple[AnswerSplit, ...] = get_args(AnswerSplit)


class AnswerSplitConfig(Strict):
    """Shares of the questions. Decided by hash of the question, on the same axis as the splits of `finetune`.

    Test takes the lower end of the axis, as in `finetune`, then come calibrate, isotonic, stack and train. A model
    fine-tuned with the same salt and `split.test` at least test + calibrate + isotonic + stack has seen none of those.
    """

    train: float = Field(0.4, ge=0, le=1, description="share the scorer's encoder is trained on")
    stack: float = Field(0.1, ge=0, le=1, description="share that weighs encoder and signals")
    isotonic: float = Field(0.1, ge=0, le=1, description="share that makes the score a probability")
    calibrate: float = Field(0.25, ge=0, le=1, description="share the threshold is chosen on")
    test: float = Field(0.15, ge=0, le=1, description="share everything is measured on")
    salt: str = Field("stitch_ray", description="one a project: a question is on the same side in all its jobs")

    @model_validator(mode="after")
    def _whole(self) -> AnswerSplitConfig:
        total = sum(getattr(self, name) for name in ANSWER_SPLITS)
        if abs(total - 1) > 1e-9:
            raise ValueError(f"the shares of split must add up to 1, not {total:g}")
        return self

    @property
    def shares(self) -> dict[AnswerSplit, float]:
        """Split -> share, from the lower end of the axis."""
        order: tuple[AnswerSplit, ...] = ("test", "calibrate", "isotonic", "stack", "train")
        return {name: getattr(self, name) for name in order}


class EndpointConfig(Strict):
    """A server that speaks the OpenAI chat API."""

    url: str = Field(description="base URL, such as http://127.0.0.1:8000/v1")
    model: str = Field(description="name of the model there")
    name: Name = Field("endpoint", description="name in files and reports")
    api_key_env: str | None = Field(None, description="environment variable with the bearer token; default: no token")
    concurrency: int = Field(16, ge=1, description="requests in flight")
    timeout_s: float = Field(60.0, gt=0, description="seconds one attempt may take")
    max_retries: int = Field(4, ge=0, description="further attempts after 408, 409, 429, 5xx, a stall or broken JSON")

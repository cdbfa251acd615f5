"""Configuration of `train-scorer`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stitch_ray.config.base import Name, Strict
from stitch_ray.config.finetune import EarlyStoppingConfig, ResourcesConfig
from stitch_ray.config.reliability import AnswerSplitConfig, SignalName


class EncoderConfig(Strict):
    """The sequence classifier that reads question, context and answer."""

    path: str = Field(description="folder in Hugging Face format, or a Hub id that is in the local cache")
    max_length: int = Field(512, ge=16, description="tokens of the longest input; only the context is cut")
    train: Literal["all", "head"] = Field("all", description="all weights, or only the classification head")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="number format of forward and backward in training; the weights stay float32"
    )
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class ScorerTrainingConfig(Strict):
    """How the encoder is trained. Steps and batches mean what they mean in `finetune`."""

    loss: Literal["bce", "mse"] = Field("bce", description="bce: soft labels, cross-entropy; mse: regression")
    balance: bool = Field(True, description="right and wrong answers weigh the same in sum")
    epochs: float = Field(3.0, gt=0, description="passes over the train split")
    batch: int = Field(32, ge=1, description="answers a step, over all workers")
    learning_rate: float = Field(5e-5, gt=0, description="peak, falling linearly after the warm-up")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of all steps")
    weight_decay: float = Field(0.01, ge=0, description="decoupled")
    validation: float = Field(0.1, gt=0, lt=1, description="share of the train split for early stopping, by question")
    eval_every: int = Field(50, ge=1, description="steps between two passes over that share")
    early_stopping: EarlyStoppingConfig | None = Field(
        EarlyStoppingConfig(patience=5),  # type: ignore[call-arg]
        description="null: train to the end",
    )
    workers: int = Field(1, ge=1, description="processes that train together")
    resources: ResourcesConfig = Field(ResourcesConfig(), description="of one worker")  # type: ignore[call-arg]


class EvaluationConfig(Strict):
    """What the test split is measured by."""

    bootstrap: int = Field(1000, ge=0, description="resamples behind the 95 % intervals; 0: no intervals")
    risks: list[float] = Field([0.05, 0.1, 0.2], description="risks at which coverage is reported")
    ece_bins: int = Field(15, ge=2, description="bins of the calibration error")

    @model_validator(mode="after")
    def _risks(self) -> EvaluationConfig:
        if any(not 0 < risk < 1 for risk in self.risks):
            raise ValueError("evaluation.risks must lie between 0 and 1")
        return self


class ExtraTestConfig(Strict):
    """Another labelled set the finished scorer is measured on, such as answers that people have judged."""

    name: Name = Field(description="name in reports")
    answers: list[str] = Field(min_length=1, description="run folders of sample-answers, or files of answers")


class TrainScorerConfig(Strict):
    """Train a reliability scorer: an encoder, stacked with uncertainty signals, made a probability."""

    PATHS = ("answers.*", "encoder.path", "tests.*.answers.*")

    answers: list[str] = Field(min_length=1, description="run folders of sample-answers, or files of answers")
    encoder: EncoderConfig | None = Field(None, description="default: no encoder, signals only")
    signals: list[SignalName] = Field([], description="signals that are stacked with the encoder")
    training: ScorerTrainingConfig = Field(ScorerTrainingConfig(), description="of the encoder")  # type: ignore[call-arg]
    split: AnswerSplitConfig | None = Field(None, description="of files of answers; run folders bring their own")
    serve_kind: str | None = Field(
        None,
        description="kind of answer that is scored in use: stack, isotonic and test hold it alone; default: greedy",
    )
    tests: list[ExtraTestConfig] = Field([], description="further test sets")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="metrics")  # type: ignore[call-arg]
    batch_tokens: int | None = Field(None, ge=16, description="tokens of one forward when scoring; default: by device")
    replicas: int = Field(1, ge=1, description="actors that score")
    seed: int = Field(0, ge=0, description="of the head, the order of answers and the bootstrap")

    @model_validator(mode="after")
    def _consistent(self) -> TrainScorerConfig:
        if self.encoder is None and not self.signals:
            raise ValueError("give encoder, signals, or both")
        if self.encoder is None and self.training != ScorerTrainingConfig():  # type: ignore[call-arg]
            raise ValueError("training has no effect without encoder")
        if len(set(self.signals)) != len(self.signals):
            raise ValueError("signals repeats a signal")
        names = [test.name for test in self.tests]
        if len(set(names)) != len(names) or "test" in names:
            raise ValueError(f"tests[].name must be unique and not 'test', got {names}")
        return self

"""Configuration of `calibrate`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stitch_ray.config.base import Strict
from stitch_ray.config.reliability import AnswerSplitConfig
from stitch_ray.config.train_scorer import EvaluationConfig


class TargetConfig(Strict):
    """One promise: of the answers given, at most `risk` are wrong, with probability 1 - `delta` over the data."""

    risk: float = Field(0.1, gt=0, lt=1, description="largest share of wrong answers among those given")
    delta: float = Field(0.1, gt=0, lt=1, description="probability that the promise fails")
    task: str | None = Field(None, description="only for answers of this task; default: all")


class CalibrateConfig(Strict):
    """Choose the threshold from which an answer is given, with a guarantee."""

    PATHS = ("answers.*", "predictions.*", "scorer", "feedback.*", "policy")

    answers: list[str] = Field([], description="run folders of sample-answers, or files of answers: one stage")
    predictions: list[str] = Field([], description="run folders or files of predictions with both stages: a cascade")
    scorer: str | None = Field(
        None, description="run folder of train-scorer; default: column `confidence` of the files"
    )
    route: Literal["none", "dialogue", "revise", "exclude"] = Field(
        "none", description="second stage of the policy; anything but none needs predictions of both stages"
    )
    targets: list[TargetConfig] = Field(
        [TargetConfig()],  # type: ignore[call-arg]
        min_length=1,
        description="promises; the first is the default",
    )
    method: Literal["learn_then_test", "sgr"] = Field("learn_then_test", description="how the threshold is found")
    scale: Literal["platt", "none"] = Field(
        "platt",
        description="of a cascade: platt makes scores of drafts and of refined answers confidences of one scale, each by a "
        "logistic fit on labels of the isotonic split; none: one threshold for the scores as they are",
    )
    loss: Literal["error", "quality"] = Field("error", description="error: 1 - correct; quality: 1 - label")
    grid: int = Field(100, ge=2, description="thresholds tried, quantiles of the isotonic split")
    split: AnswerSplitConfig | None = Field(None, description="of files; run folders bring their own")
    serve_kind: str | None = Field(None, description="kind of answer that is given in use; default: greedy")
    policy: str | None = Field(None, description="policy.json that is updated with `feedback`")
    feedback: list[str] = Field([], description="labels that came back (JSONL)")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="metrics")  # type: ignore[call-arg]
    batch_tokens: int | None = Field(None, ge=16, description="tokens of one forward when scoring; default: by device")
    replicas: int = Field(1, ge=1, description="actors that score")
    seed: int = Field(0, ge=0, description="of the bootstrap")

    @model_validator(mode="after")
    def _consistent(self) -> CalibrateConfig:
        if sum(map(bool, (self.answers, self.predictions, self.feedback))) != 1:
            raise ValueError("give answers, predictions, or feedback with policy: one of them")
        if bool(self.policy) != bool(self.feedback):
            raise ValueError("policy and feedback go together: the labels update that policy")
        if self.route != "none" and self.answers:
            raise ValueError(
                f"route: {self.route} has a second stage, and answers hold only drafts: a threshold from drafts alone "
                "does not keep its promise for a cascade. Give predictions with both stages (predict, calibration: true)"
            )
        if self.predictions and self.scorer:
            raise ValueError("scorer has no effect with predictions, which hold their confidences")
        keys = [(target.task, target.risk, target.delta) for target in self.targets]
        if len(set(keys)) != len(keys):
            raise ValueError("targets repeats a promise")
        return self

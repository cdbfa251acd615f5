"""Configuration of `predict`."""

from __future__ import annotations

from pydantic import Field, model_validator

from stitch_ray.config.base import DataConfig, Strict
from stitch_ray.config.ensemble import EnsembleConfig
from stitch_ray.config.reliability import AnswerSplit, AnswerSplitConfig
from stitch_ray.config.sample_answers import LabelsConfig


class ServedConfig(Strict):
    """A served ensemble that answers instead of models of this job."""

    url: str = Field(
        pattern=r"^https?://", description="where `stitch-ray serve` listens, such as http://127.0.0.1:8000"
    )
    token_env: str | None = Field(
        None,
        description="environment variable with the bearer token, set here and on the cluster's nodes; default: none is sent",
    )
    max_retries: int = Field(4, ge=0, description="further attempts after 429, 503 or a lost connection")


class PredictConfig(Strict):
    """Answer many questions selectively: draft, score, refine where unsure, score again; answer or abstain."""

    PATHS = (
        "data.paths.*",
        *(f"ensemble.{key}" for key in EnsembleConfig.PATHS),
        "scorer",
        "policy",
        "labels.encoder",
    )

    data: DataConfig = Field(description="questions, with references where there are some")
    ensemble: EnsembleConfig | None = Field(None, description="the models; or `target`")
    scorer: str | None = Field(None, description="run folder of train-scorer")
    policy: str | None = Field(None, description="policy.json or run folder of calibrate; none with calibration: true")
    target_risk: float | None = Field(None, gt=0, lt=1, description="one of the policy's; default: its first")
    calibration: bool = Field(
        False, description="every question goes through both stages, and both answers are kept: for calibrate"
    )
    target: ServedConfig | None = Field(None, description="a served ensemble that answers in place of `ensemble`")
    labels: LabelsConfig = Field(LabelsConfig(), description="how right an answer is")  # type: ignore[call-arg]
    baselines: bool = Field(False, description="ask each auxiliary the bare question too, to compare")
    splits: list[AnswerSplit] = Field([], description="only questions of these splits; default: all")
    split: AnswerSplitConfig = Field(AnswerSplitConfig(), description="shares of the questions")  # type: ignore[call-arg]
    concurrency: int = Field(32, ge=1, description="questions under way at a time")
    seed: int = Field(0, ge=0, description="of sampled answers and the bootstrap")

    @model_validator(mode="after")
    def _consistent(self) -> PredictConfig:
        if (self.ensemble is None) == (self.target is None):
            raise ValueError("give ensemble or target, one of them")
        if self.target is not None:
            for name in ("scorer", "policy"):
                if getattr(self, name):
                    raise ValueError(f"{name} has no effect with target, which has its own")
            if self.calibration or self.baselines:
                raise ValueError(
                    "calibration and baselines need the models themselves: give ensemble in place of target"
                )
            return self
        assert self.ensemble is not None
        if self.scorer is None:
            raise ValueError("scorer is missing: without one no answer can be given")
        if self.policy is None and not self.calibration:
            raise ValueError("policy is missing (or write calibration: true, to make the predictions it is made from)")
        if self.calibration and self.ensemble.route == "none":
            raise ValueError("calibration: true is for policies with a second stage; calibrate one stage on answers")
        if self.baselines and self.ensemble.route != "dialogue":
            raise ValueError("baselines asks each auxiliary by itself, which says something with route: dialogue only")
        return self

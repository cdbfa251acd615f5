"""One Pydantic model per job; unknown keys are errors; `--set a.b=c` overrides the file."""

from stitch_ray.config.base import Strict
from stitch_ray.config.calibrate import CalibrateConfig
from stitch_ray.config.exar import (
    ExarEvaluateConfig,
    ExarJudgeConfig,
    ExarMergeConfig,
    ExarRefineConfig,
    ExarRunConfig,
)
from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.config.loading import load_config, parse_overrides
from stitch_ray.config.predict import PredictConfig
from stitch_ray.config.sample_answers import SampleAnswersConfig
from stitch_ray.config.select import SelectConfig
from stitch_ray.config.serve import ServeConfig
from stitch_ray.config.train_scorer import TrainScorerConfig

CONFIGS: dict[str, type[Strict]] = {
    "select": SelectConfig,
    "finetune": FinetuneConfig,
    "sample-answers": SampleAnswersConfig,
    "train-scorer": TrainScorerConfig,
    "calibrate": CalibrateConfig,
    "predict": PredictConfig,
    "serve": ServeConfig,
    "exar-merge": ExarMergeConfig,
    "exar-refine": ExarRefineConfig,
    "exar-evaluate": ExarEvaluateConfig,
    "exar-judge": ExarJudgeConfig,
    "exar-run": ExarRunConfig,
}
"""Job name -> its configuration."""

__all__ = [
    "CONFIGS",
    "CalibrateConfig",
    "ExarEvaluateConfig",
    "ExarJudgeConfig",
    "ExarMergeConfig",
    "ExarRefineConfig",
    "ExarRunConfig",
    "FinetuneConfig",
    "PredictConfig",
    "SampleAnswersConfig",
    "SelectConfig",
    "ServeConfig",
    "TrainScorerConfig",
    "load_config",
    "parse_overrides",
]

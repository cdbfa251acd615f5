"""One Pydantic model per job; unknown keys are errors; `--set a.b=c` overrides the file."""

from stitch_ray.config.base import Strict
from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.config.loading import load_config, parse_overrides
from stitch_ray.config.select import SelectConfig

CONFIGS: dict[str, type[Strict]] = {"select": SelectConfig, "finetune": FinetuneConfig}
"""Job name -> its configuration."""

__all__ = ["CONFIGS", "FinetuneConfig", "SelectConfig", "load_config", "parse_overrides"]

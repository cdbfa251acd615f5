"""One Pydantic model per job; unknown keys are errors; `--set a.b=c` overrides the file."""

from pydantic import BaseModel

from stitch_ray.config.loading import load_config, parse_overrides
from stitch_ray.config.select import SelectConfig

CONFIGS: dict[str, type[BaseModel]] = {"select": SelectConfig}
"""Job name -> its configuration."""

__all__ = ["CONFIGS", "SelectConfig", "load_config", "parse_overrides"]

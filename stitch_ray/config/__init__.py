"""One Pydantic model per job; unknown keys are errors; `--set a.b=c` overrides the file."""

from stitch_ray.config.loading import load_config, parse_overrides
from stitch_ray.config.select import SelectConfig

__all__ = ["SelectConfig", "load_config", "parse_overrides"]

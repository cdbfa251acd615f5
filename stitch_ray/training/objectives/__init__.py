"""Training objectives by name. A new one is a file in this folder and a line in `OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Mapping

from stitch_ray.errors import UserError
from stitch_ray.training.objectives.base import Head, Objective, Rendered, Span
from stitch_ray.training.objectives.exar import Exar
from stitch_ray.training.objectives.sft import SFT
from stitch_ray.training.objectives.validator import Validator

__all__ = ["OBJECTIVES", "Exar", "Head", "Objective", "Rendered", "SFT", "Span", "Validator", "objective"]

OBJECTIVES: Mapping[str, Objective] = {known.name: known for known in (SFT(), Exar(), Validator())}


def objective(name: str) -> Objective:
    """The objective called `name`. Raises UserError with the known names."""
    if name not in OBJECTIVES:
        raise UserError(f"objective: unknown objective {name!r}; write one of: {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]

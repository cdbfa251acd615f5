"""Rendering of the report templates. Everything is escaped: records hold whatever people typed."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import jinja2


def render(template: str, **context: Any) -> str:
    """Fill in a template of this folder. Raises jinja2.UndefinedError for a name that `context` lacks."""
    text = _environment().get_template(template).render(**context)
    # A record may hold half of a surrogate pair, which UTF-8 cannot write.
    return text.encode("utf-8", "replace").decode("utf-8")


def number(value: float | None, decimals: int = 0) -> str:
    """12,345 or 1.234; a dash for what is not known."""
    return "–" if value is None or math.isnan(value) else f"{value:,.{decimals}f}"


def percent(value: float | None) -> str:
    """A share as 20% or 1.3%; a dash for what is not known."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.0%}" if value == 0 or value >= 0.0995 else f"{value:.1%}"


def goal(share: float) -> str:
    """A share that somebody chose, with the digits it was given: 10%, 2.5%."""
    return f"{100 * share:.4g}%"


@cache  # it keeps the compiled templates
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("stitch_ray", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, goal=goal)
    return environment

"""Fields that rows of predictions and of feedback share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from stitch_ray.data.quarantine import BadRow, Quarantined
from stitch_ray.errors import UserError

_MOST_BAD = 0.5
_CORRECT_FROM = 0.5


def confidence_of(record: Mapping[str, Any], field: str) -> float:
    """A finite number, or NaN for null: unscored. Raises BadRow."""
    value = record.get(field)
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise BadRow(f"{field} is {value!r}, expected a finite number or null")
    return float(value)


def loss_of(correct: Any, label: Any, loss: str, prefix: str = "") -> float:
    """`error`: 1 - correct; `quality`: 1 - label. Either stands in for the other; NaN if both are null. Raises BadRow."""
    if correct is not None and not isinstance(correct, bool):
        raise BadRow(f"{prefix}correct is {correct!r}, expected true or false")
    if label is not None:
        if isinstance(label, bool) or not isinstance(label, int | float) or not 0 <= label <= 1:
            raise BadRow(f"{prefix}label is {label!r}, expected a number between 0 and 1")
        if loss == "quality":
            return 1.0 - float(label)
        correct = label >= _CORRECT_FROM if correct is None else correct
    return math.nan if correct is None else 1.0 - float(correct)


def check_share(key: str, good: int, bad: Sequence[Quarantined], paths: Sequence[str]) -> None:
    """Raises UserError if no row, or less than half of them, is usable."""
    if not good or len(bad) > _MOST_BAD * (good + len(bad)):
        first = f"; the first: {bad[0].source}:{bad[0].line}: {bad[0].reason}" if bad else ""
        raise UserError(f"{key}: {len(bad)} of {good + len(bad)} rows in {', '.join(paths)} are unusable{first}")

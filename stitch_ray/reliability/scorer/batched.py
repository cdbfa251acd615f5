"""Requests for a score, many at once: what an online scorer does with the batch it has gathered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stitch_ray.reliability.scorer.combined import ReliabilityScorer
from stitch_ray.reliability.scorer.inputs import ScoreInput

_FIELDS = ("question", "answer", "context", "signals")


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """One answer and its signals."""

    shown: ScoreInput
    signals: Mapping[str, float]

    @classmethod
    def parse(cls, request: Mapping[str, Any]) -> ScoreRequest:
        """From {question, answer, context?, signals?}. Raises ValueError, naming the field, for anything else."""
        if not isinstance(request, Mapping):
            raise ValueError(f"a request is an object with question and answer, not {type(request).__name__}")
        unknown = sorted(map(str, request.keys() - set(_FIELDS)))
        if unknown:
            raise ValueError(f"unknown field {', '.join(unknown)}; a request has {', '.join(_FIELDS)}")
        context, signals = request.get("context"), request.get("signals") or {}
        _check_text("question", request.get("question"))
        _check_text("answer", request.get("answer"))
        if context is not None:
            _check_text("context", context)
        if not isinstance(signals, Mapping):
            raise ValueError("signals must be an object of numbers")
        for name, value in signals.items():
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ValueError(f"signals.{name} must be a number or null")
        numbers = {name: math.nan if value is None else float(value) for name, value in signals.items()}
        return cls(ScoreInput(request["question"], request["answer"], context), numbers)


def score_requests(scorer: ReliabilityScorer, requests: Sequence[ScoreRequest]) -> list[dict[str, Any]]:
    """For every request {confidence, stack, encoder, reason}: numbers, or null for what was not computed.

    `reason` is null for a scored answer, and says why for one without confidence. Signals that the scorer does not use
    are ignored. JSON values.
    """
    signals = {
        name: np.array([request.signals.get(name, math.nan) for request in requests], np.float64)
        for name in scorer.signals
    }
    scores, reasons = scorer.score([request.shown for request in requests], signals)
    columns = scores.as_dict()
    return [
        {
            **{name: None if math.isnan(values[row]) else float(values[row]) for name, values in columns.items()},
            "reason": reasons.get(row),
        }
        for row in range(len(requests))
    ]


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair at character {error.start}") from error

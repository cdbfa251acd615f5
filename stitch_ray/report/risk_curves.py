"""Selective risk against coverage for the figures: a score, the best and a random order, and the band of chance."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_MOST_FOR_BAND = 200_000


def risk_curve(confidence: Floats, residual: Floats) -> tuple[Floats, Floats]:
    """(coverage, risk) at every threshold that can be had, strictest first. Unscored answers (NaN) do not count.

    confidence, residual: (n,). Empty where nothing is scored.
    """
    from stitch_ray.reliability.metrics import risk_coverage_curve

    scored = np.isfinite(confidence)
    if not scored.any():
        return np.empty(0), np.empty(0)
    curve = risk_coverage_curve(confidence[scored], residual[scored])
    return np.asarray(curve.coverage, np.float64), np.asarray(curve.risk, np.float64)


def oracle_curve(residual: Floats) -> tuple[Floats, Floats]:
    """(coverage, risk) of the order that no score can beat: the least wrong first."""
    count = np.arange(1, len(residual) + 1)
    return count / max(1, len(residual)), np.cumsum(np.sort(residual)) / count


def risk_band(
    confidence: Floats,
    residual: Floats,
    groups: NDArray[Any] | None = None,
    *,
    resamples: int = 300,
    points: int = 100,
    seed: int = 0,
) -> tuple[Floats, Floats, Floats] | None:
    """(coverage, low, high): at every coverage the middle 95 % of the risk when the questions are drawn again.

    groups: (n,) what is drawn together; default: every answer by itself. Ties are accepted at random, as in the
    metrics. None for fewer than 20 scored answers, where it would say nothing, and above 200,000, where it is a line.
    """
    scored = np.isfinite(confidence)
    count = int(scored.sum())
    if not 20 <= count <= _MOST_FOR_BAND:
        return None
    order = np.argsort(-confidence[scored], kind="stable")
    values, losses = confidence[scored][order], residual[scored][order]
    group = np.arange(count) if groups is None else np.unique(groups[scored], return_inverse=True)[1][order]
    last = np.append(np.flatnonzero(np.diff(values)), count - 1)
    coverage = np.linspace(max(0.02, 10 / count), 1, points)
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, points))
    number = int(group.max()) + 1
    for row in drawn:
        weight = np.bincount(rng.integers(number, size=number), minlength=number)[group]
        accepted = np.append(0, np.cumsum(weight)[last])
        lost = np.append(0, np.cumsum(weight * losses)[last])
        at = coverage * accepted[-1]
        row[:] = np.interp(at, accepted, lost) / at
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return coverage, low, high

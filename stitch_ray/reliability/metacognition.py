"""Type-2 signal detection: does confidence know more or less than the verdict it comes with (meta-d', Maniscalco & Lau 2012).

A judge sees right and wrong answers and calls each CORRECT or WRONG with some confidence. d' says how well it tells them
apart; meta-d' is the d' that an ideal observer would need for the confidences that were given. M-ratio = meta-d' / d' is
1 where confidence uses all that the verdicts use, below 1 where it is noisier.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.stats import norm

Floats = NDArray[np.float64]

_FLOOR = 1e-10
_LEAST = 2


@dataclass(frozen=True, slots=True)
class Metacognition:
    """`d_prime`, `criterion` (above 0: inclined to say WRONG) and `meta_d_prime` in units of the noise; `m_ratio` is
    None where d' is too close to 0 to divide by. `ratings`: levels of confidence that could be told apart."""

    d_prime: float
    criterion: float
    meta_d_prime: float
    m_ratio: float | None
    ratings: int


def metacognition(
    probability: ArrayLike, correct: ArrayLike, *, threshold: float = 0.5, ratings: int = 4
) -> Metacognition | None:
    """From P(CORRECT) of n answers, (n,) in [0, 1], and whether each is right, (n,).

    The verdict is CORRECT from `threshold` on; confidence is the distance from it, cut into up to `ratings` levels of
    equal mass over both verdicts. None where it cannot be told: only right or only wrong answers, fewer than 2 of
    either verdict, or confidences that are all the same. Raises ValueError for unequal lengths or fewer than 2 ratings.
    """
    p, right = np.asarray(probability, np.float64), np.asarray(correct, bool)
    if p.shape != right.shape or p.ndim != 1:
        raise ValueError(f"probability has shape {p.shape} and correct {right.shape}")
    if ratings < _LEAST:
        raise ValueError("ratings must be at least 2")
    says_correct = p >= threshold
    counted = (right.sum(), (~right).sum(), says_correct.sum(), (~says_correct).sum())
    if min(counted) < _LEAST:
        return None
    level, levels = _levels(np.abs(p - threshold), ratings)
    if levels < _LEAST:
        return None
    # As in the paper: responses from the surest WRONG to the surest CORRECT, S1 = wrong answers, S2 = right ones.
    place = np.where(says_correct, levels + level, levels - 1 - level)
    counts = [np.bincount(place[side], minlength=2 * levels).astype(np.float64) for side in (~right, right)]
    return _fit(counts[0], counts[1], levels)


def _fit(wrong: Floats, right: Floats, levels: int) -> Metacognition:
    """Maximum likelihood of the confidences given the verdicts; type-1 criterion fixed in units of d'."""
    padded = [side + 1 / (2 * levels) for side in (wrong, right)]  # no rate is 0 or 1
    false_alarm, hit = (side[levels:].sum() / side.sum() for side in padded)
    d_prime = float(norm.ppf(hit) - norm.ppf(false_alarm))
    criterion = float(-(norm.ppf(hit) + norm.ppf(false_alarm)) / 2)
    relative = criterion / d_prime if abs(d_prime) > _FLOOR else 0.0

    def loss(parameters: Floats) -> float:
        return _negative_likelihood(parameters, relative, padded, levels)

    start = np.concatenate([[d_prime], np.full(2 * (levels - 1), np.log(0.5))])
    found = minimize(loss, start, method="Nelder-Mead", options={"maxiter": 20_000, "xatol": 1e-5, "fatol": 1e-7})
    meta = float(found.x[0])
    return Metacognition(d_prime, criterion, meta, meta / d_prime if abs(d_prime) > 0.05 else None, levels)


def _negative_likelihood(parameters: Floats, relative: float, counts: list[Floats], levels: int) -> float:
    """`parameters`: meta-d', then logarithms of the distances between criteria, outwards on either side."""
    meta = parameters[0]
    center = relative * meta
    steps = np.exp(np.clip(parameters[1:], -20, 5)).reshape(2, levels - 1)
    below, above = center - np.cumsum(steps[0]), center + np.cumsum(steps[1])
    criteria = np.concatenate([[-np.inf], below[::-1], [center], above, [np.inf]])
    total = 0.0
    for side, mean in zip(counts, (-meta / 2, meta / 2), strict=True):
        mass = np.maximum(np.diff(norm.cdf(criteria - mean)), _FLOOR)
        for half in (slice(0, levels), slice(levels, 2 * levels)):
            total -= float((side[half] * np.log(mass[half] / mass[half].sum())).sum())
    return total


def _levels(distance: Floats, ratings: int) -> tuple[NDArray[np.int64], int]:
    """Level of each distance, 0 the least sure, and how many levels there are: equal distances share one."""
    edges = np.unique(np.quantile(distance, np.arange(1, ratings) / ratings))
    level = np.searchsorted(edges, distance, side="right")
    used, level = np.unique(level, return_inverse=True)
    return level.astype(np.int64), len(used)

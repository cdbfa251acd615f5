"""The metrics on many resamples at once, for intervals.

A resample is a row of counts: how often each answer was drawn. Every metric here equals that of
`stitch_ray.reliability.metrics` on answers repeated that often, but answers are sorted once for all resamples.
Between the ends of a group of ties E(k) is linear, so the sum of E(k) / k over the group needs no loop over k: with
E(k) = a + b k it is a (H(end) - H(start)) + b (end - start), where H(k) are the harmonic numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stitch_ray.reliability.metrics import ROUNDING, equal_width_bins, rejections

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

_CELLS = 2_000_000
"""Counts held at once, resamples x answers: about 16 MB an intermediate array."""


def resample(unit_of: Integers, resamples: int, seed: int) -> Iterator[Integers]:
    """Counts of answers in resamples of units drawn with replacement, in chunks (resamples of the chunk, answers).

    unit_of: (answers,), the unit each answer belongs to, 0..units-1. All answers of a question that was drawn are in:
    they are not independent, and intervals that treat them so are too narrow.
    """
    generator = np.random.default_rng(seed)
    units = int(unit_of.max()) + 1
    chunk = max(1, _CELLS // max(units, len(unit_of)))
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        drawn = generator.integers(units, size=(rows, units))
        drawn += np.arange(rows)[:, None] * units
        yield np.bincount(drawn.ravel(), minlength=rows * units).reshape(rows, units)[:, unit_of]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Answers by falling confidence: `order` of the rows, and where each group of ties starts in it."""

    order: Integers
    starts: Integers

    @staticmethod
    def of(confidence: Floats) -> Ranking:
        """The ranking of finite confidences, (answers,)."""
        order = np.argsort(-confidence)
        ordered = confidence[order]
        return Ranking(order, np.r_[0, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1])

    def accumulate(self, counts: Integers, residual: Floats) -> tuple[Integers, Floats]:
        """Answers accepted and their residual sum before and after each group, both (resamples, groups + 1)."""
        ordered = counts[:, self.order]
        sums = []
        for values in (ordered, ordered * residual[self.order]):
            by_group = np.add.reduceat(values, self.starts, axis=1)
            sums.append(np.pad(np.cumsum(by_group, axis=1), ((0, 0), (1, 0))))
        return sums[0], sums[1]


def ranking_metrics(
    ranking: Ranking, oracle: Ranking, residual: Floats, counts: Integers, risks: Sequence[float]
) -> dict[str, Floats]:
    """Metrics of the order alone, each (resamples,), NaN where a resample leaves one undefined.

    oracle: the ranking of `-residual`. counts: (resamples, answers). auroc only where all residuals are 0 or 1.
    """
    accepted, total = ranking.accumulate(counts, residual)
    best = oracle.accumulate(counts, residual)
    n, wrong = accepted[:, -1], total[:, -1]
    harmonic = np.r_[0.0, np.cumsum(1 / np.arange(1, n.max() + 1))]
    with np.errstate(divide="ignore", invalid="ignore"):
        error = wrong / n
        area = _area(accepted, total, harmonic, np.zeros_like(n)) / n
        augrc = (np.diff(accepted) * (total[:, 1:] + total[:, :-1])).sum(axis=1) / (2 * n.astype(np.float64) ** 2)
        found = {
            "aurc": area,
            "e_aurc": area - _area(*best, harmonic, np.zeros_like(n)) / n,
            "augrc": augrc,
            "auacc": 1 - area,
        }
        for name, share in (("prr", 1.0), ("prr_50", 0.5)):
            rejected = np.array([rejections(count, share) for count in n])
            gain = error - _area(accepted, total, harmonic, n - rejected) / rejected
            most = error - _area(*best, harmonic, n - rejected) / rejected
            found[name] = np.where(most > ROUNDING, gain / most, np.nan)
        if np.isin(residual, (0, 1)).all():
            # Traub et al. 2024: AUGRC = (1 - AUROC) acc err + err^2 / 2 for errors of 0 and 1.
            found["auroc"] = 1 - (augrc - error**2 / 2) / np.where(error * (1 - error) > 0, error * (1 - error), np.nan)
        for risk in risks:
            met = total[:, 1:] / accepted[:, 1:] <= risk + ROUNDING
            found[f"coverage_at_risk_{risk:g}"] = np.where(met, accepted[:, 1:], 0).max(axis=1) / n
    return found


def probability_metrics(probability: Floats, residual: Floats, counts: Integers, bins: int) -> dict[str, Floats]:
    """Metrics of probabilities in [0, 1], each (resamples,). Accuracies only where all residuals are 0 or 1."""
    correct, drawn = 1 - residual, counts.astype(np.float64)
    n = drawn.sum(axis=1)
    members = np.zeros((len(probability), bins))
    members[np.arange(len(probability)), equal_width_bins(probability, bins)] = probability - correct
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            "brier": drawn @ (probability - correct) ** 2 / n,
            "ece": np.abs(drawn @ members).sum(axis=1) / n,
        }
        if np.isin(residual, (0, 1)).all():
            hit = ((probability >= 0.5) == (correct == 1)).astype(np.float64)
            found["accuracy"] = drawn @ hit / n
            right, wrong = drawn @ correct, drawn @ residual
            found["balanced_accuracy"] = (drawn @ (hit * correct) / right + drawn @ (hit * residual) / wrong) / 2
    return found


def percentile_interval(values: Floats, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the resamples in which the metric is defined; NaN if there are none."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _area(accepted: Integers, total: Floats, harmonic: Floats, above: Integers) -> Floats:
    """Sum of E(k) / k over k from `above` + 1 to n. accepted, total: (resamples, groups + 1); above: (resamples,)."""
    start, size = accepted[:, :-1], np.diff(accepted)
    slope = np.diff(total) / np.maximum(size, 1)  # a group that was not drawn has no width
    low, high = np.maximum(start, above[:, None]), np.maximum(accepted[:, 1:], above[:, None])
    line = (total[:, :-1] - slope * start) * (harmonic[high] - harmonic[low]) + slope * (high - low)
    return np.asarray(line.sum(axis=1))

"""Metrics of selective prediction: how well a confidence tells right answers from wrong ones.

`confidence` is any real number an answer, higher = surer; `residual` lies in [0, 1], 0 = right (an error, or 1 minus a
quality). One rule for ties: inside a group of equal confidences answers are accepted at random, so the residual sum
E(k) of the k surest is its expectation, linear between the ends of the group. Every metric is thereby the same in
every order of the rows, and the mean over random orders within ties.

Ranking metrics see only the order of the confidences. `ece`, `equal_mass_ece`, `brier`, `nll` and the accuracies need
a `probability` in [0, 1] that the answer is right, and `correct`, which is 1 - residual.

All raise ValueError, saying which input and where, for input that is empty, of another length, not finite or out of
range: an answer without a score must be left out by the caller, who can count it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

ROUNDING = 1e-12
"""Slack of comparisons with a risk: 2 / 10 is no more than a target of .2."""

_PROBABILITY_FLOOR = 1e-6


@dataclass(frozen=True, slots=True)
class RiskCoverageCurve:
    """One point a distinct confidence, the strictest threshold first; all (thresholds,).

    Answers with confidence >= threshold are accepted: the share of them is `coverage`, the mean residual among them
    `risk` (Geifman and El-Yaniv 2017), and `generalized_risk` is coverage x risk (Traub et al. 2024).
    """

    coverage: Floats
    risk: Floats
    generalized_risk: Floats
    threshold: Floats


@dataclass(frozen=True, slots=True)
class TieGroups:
    """Answers by falling confidence. `accepted` and `residual_sum`: after each group of equal ones, (groups,)."""

    threshold: Floats
    accepted: Floats
    residual_sum: Floats

    @property
    def size(self) -> int:
        """Number of answers."""
        return int(self.accepted[-1])


def risk_coverage_curve(confidence: ArrayLike, residual: ArrayLike) -> RiskCoverageCurve:
    """The curve that an oracle would give is that of `-residual` as confidence."""
    groups = tie_groups(confidence, residual)
    k, total = groups.accepted, groups.residual_sum
    return RiskCoverageCurve(k / groups.size, total / k, total / groups.size, groups.threshold)


def aurc(confidence: ArrayLike, residual: ArrayLike) -> float:
    """Area under the risk-coverage curve, mean over k = 1..n of E(k) / k. In [0, 1], lower is better."""
    return float(_risks(tie_groups(confidence, residual)).mean())


def e_aurc(confidence: ArrayLike, residual: ArrayLike) -> float:
    """AURC beyond that of an oracle which orders by the residual (Geifman, Uziel and El-Yaniv 2019). 0 is best.

    The oracle's area is the discrete one: with the integral err + (1 - err) ln(1 - err) the excess can be negative.
    """
    _, r = _checked(confidence, residual)
    return aurc(confidence, r) - aurc(-r, r)


def augrc(confidence: ArrayLike, residual: ArrayLike) -> float:
    """Area under generalized risk over coverage from (0, 0) on, by trapezoids (Traub et al. 2024). Lower is better.

    Half the residual's mean for a confidence that says nothing.
    """
    curve = risk_coverage_curve(confidence, residual)
    coverage, generalized = np.r_[0, curve.coverage], np.r_[0, curve.generalized_risk]
    return float((np.diff(coverage) * (generalized[1:] + generalized[:-1])).sum() / 2)


def auacc(confidence: ArrayLike, residual: ArrayLike) -> float:
    """Area under the accuracy-coverage curve, 1 - AURC. In [0, 1], higher is better."""
    return 1 - aurc(confidence, residual)


def prr(confidence: ArrayLike, residual: ArrayLike, max_rejection: float = 1.0) -> float:
    """Prediction-rejection ratio (Malinin and Gales 2021): 1 = oracle, 0 = random, negative = worse than that.

    Mean quality of the kept answers while up to `max_rejection` of all are rejected, relative to random rejection (its
    mean quality, in closed form) and to the oracle. NaN where the oracle cannot do better than random: equal
    residuals, or a share so small that nothing is rejected. Raises ValueError for a share outside (0, 1].
    """
    if not 0 < max_rejection <= 1:
        raise ValueError(f"max_rejection must lie in (0, 1], not {max_rejection}")
    groups = tie_groups(confidence, residual)
    _, r = _checked(confidence, residual)
    kept = groups.size - rejections(groups.size, max_rejection)
    oracle = r.mean() - _risks(tie_groups(-r, r))[kept:].mean()
    return float((r.mean() - _risks(groups)[kept:].mean()) / oracle) if oracle > ROUNDING else math.nan


def auroc(confidence: ArrayLike, residual: ArrayLike) -> float:
    """Probability that a right answer is surer than a wrong one, ties counting half. NaN without either.

    Raises ValueError unless every residual is 0 or 1.
    """
    groups = tie_groups(confidence, _binary(residual))
    wrong = np.diff(groups.residual_sum, prepend=0)
    right = np.diff(groups.accepted, prepend=0) - wrong
    if not wrong.any() or not right.any():
        return math.nan
    less_sure = groups.residual_sum[-1] - groups.residual_sum
    return float((right * (less_sure + wrong / 2)).sum() / (right.sum() * wrong.sum()))


def aupr_error(confidence: ArrayLike, residual: ArrayLike) -> float:
    """Average precision of finding the errors, the least sure first (Hendrycks and Gimpel 2017). NaN without errors.

    The value of a confidence that says nothing is the share of errors. Raises ValueError unless residuals are 0 or 1.
    """
    confidence, r = _checked(confidence, _binary(residual))
    groups = tie_groups(-confidence, r)
    if not r.any():
        return math.nan
    found = np.diff(groups.residual_sum, prepend=0)
    return float((found * groups.residual_sum / groups.accepted).sum() / r.sum())


def risk_at_coverage(confidence: ArrayLike, residual: ArrayLike, coverage: float) -> float:
    """Expected risk E(k) / k of the k = ceil(coverage x n) surest answers, at least one of them."""
    if not 0 <= coverage <= 1:
        raise ValueError(f"coverage must lie in [0, 1], not {coverage}")
    risks = _risks(tie_groups(confidence, residual))
    return float(risks[max(1, math.ceil(coverage * len(risks) - 1e-9)) - 1])


def coverage_at_risk(confidence: ArrayLike, residual: ArrayLike, risk: float) -> tuple[float, float]:
    """Largest coverage of a threshold whose risk is at most `risk`, and that threshold; (0, inf) if there is none.

    Risk is not monotone in coverage: stricter thresholds may fail. What was largest on these answers carries no
    promise for others; `stitch_ray.reliability.calibration` does.
    """
    curve = risk_coverage_curve(confidence, residual)
    met = np.flatnonzero(curve.risk <= risk + ROUNDING)
    return (float(curve.coverage[met[-1]]), float(curve.threshold[met[-1]])) if len(met) else (0.0, math.inf)


def ece(probability: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Expected calibration error over bins of equal width, ((b - 1) / bins, b / bins] (Guo et al. 2017). In [0, 1].

    Depends on the number of bins; say it beside the value.
    """
    p, y = _probabilities(probability, correct)
    return _binned_error(equal_width_bins(p, bins), p, y)


def equal_mass_ece(probability: ArrayLike, correct: ArrayLike, bins: int = 15) -> float:
    """Calibration error over bins of about as many answers each. Equal probabilities share a bin, so bins may merge."""
    p, y = _probabilities(probability, correct)
    _at_least_one(bins)
    last = np.ceil(np.arange(1, bins) * len(p) / bins).astype(np.int64) - 1
    return _binned_error(np.searchsorted(np.unique(np.sort(p)[last]), p, side="left"), p, y)


def brier(probability: ArrayLike, correct: ArrayLike) -> float:
    """Mean squared distance of probability and correctness. In [0, 1], strictly proper: lower is better."""
    p, y = _probabilities(probability, correct)
    return float(((p - y) ** 2).mean())


def nll(probability: ArrayLike, correct: ArrayLike) -> float:
    """Mean negative log-likelihood in nats, of probabilities kept 1e-6 away from 0 and 1."""
    p, y = _probabilities(probability, correct)
    p = np.clip(p, _PROBABILITY_FLOOR, 1 - _PROBABILITY_FLOOR)
    return float(-(y * np.log(p) + (1 - y) * np.log1p(-p)).mean())


def accuracy(probability: ArrayLike, correct: ArrayLike) -> float:
    """Share of answers of which probability >= .5 says truly whether they are right (`correct`: 0 or 1)."""
    p, y = _probabilities(probability, _binary(correct, "correct"))
    return float(((p >= 0.5) == (y == 1)).mean())


def balanced_accuracy(probability: ArrayLike, correct: ArrayLike) -> float:
    """Mean of the accuracies among right and among wrong answers; .5 says nothing. NaN without either."""
    p, y = _probabilities(probability, _binary(correct, "correct"))
    if y.all() or not y.any():
        return math.nan
    hit = (p >= 0.5) == (y == 1)
    return float((hit[y == 1].mean() + hit[y == 0].mean()) / 2)


def tie_groups(confidence: ArrayLike, residual: ArrayLike) -> TieGroups:
    """Residuals summed over groups of equal confidence, the surest first."""
    c, r = _checked(confidence, residual)
    order = np.argsort(-c)
    c = c[order]
    ends = np.r_[np.flatnonzero(c[1:] != c[:-1]), len(c) - 1]
    return TieGroups(c[ends], ends + 1.0, np.cumsum(r[order])[ends])


def checked_residual(residual: ArrayLike, name: str = "residual") -> Floats:
    """The residuals as float64, (answers,). Raises ValueError as all metrics do."""
    row = _finite(name, residual)
    _within(name, row)
    return row


def rejections(answers: int, max_rejection: float) -> int:
    """How many of the largest k a rejection ratio averages over: floor(share x n)."""
    return max(1, math.floor(max_rejection * answers + 1e-9))


def equal_width_bins(probability: Floats, bins: int) -> NDArray[np.int64]:
    """Number of the bin of each probability, from 0. Raises ValueError for fewer than one bin."""
    _at_least_one(bins)
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], probability, side="left")


def _risks(groups: TieGroups) -> Floats:
    """E(k) / k for k = 1..n."""
    k = np.arange(1, groups.size + 1)
    return np.interp(k, np.r_[0, groups.accepted], np.r_[0, groups.residual_sum]) / k


def _binned_error(bin_of: NDArray[np.int64], p: Floats, y: Floats) -> float:
    return float(np.abs(np.bincount(bin_of, weights=p - y)).sum() / len(p))


def _checked(
    confidence: ArrayLike, residual: ArrayLike, names: tuple[str, str] = ("confidence", "residual")
) -> tuple[Floats, Floats]:
    c, r = _finite(names[0], confidence), checked_residual(residual, names[1])
    if len(c) != len(r):
        raise ValueError(f"{names[0]} has {len(c)} values and {names[1]} {len(r)}")
    return c, r


def _finite(name: str, values: ArrayLike) -> Floats:
    row = np.asarray(values, dtype=np.float64)
    if row.ndim != 1 or not len(row):
        raise ValueError(f"{name} must be a row of at least one number, not of shape {row.shape}")
    if not np.isfinite(row).all():
        bad = np.flatnonzero(~np.isfinite(row))
        raise ValueError(f"{name} is {row[bad[0]]} at {bad[0]} ({len(bad)} of {len(row)} are not finite)")
    return row


def _probabilities(probability: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    p, y = _checked(probability, correct, ("probability", "correct"))
    _within("probability", p)
    return p, y


def _at_least_one(bins: int) -> None:
    if bins < 1:
        raise ValueError(f"bins must be at least 1, not {bins}")


def _within(name: str, values: Floats) -> None:
    outside = np.flatnonzero((values < 0) | (values > 1))
    if len(outside):
        raise ValueError(f"{name} is {values[outside[0]]} at {outside[0]}; it must lie in [0, 1]")


def _binary(values: ArrayLike, name: str = "residual") -> Floats:
    v = np.asarray(values, dtype=np.float64)
    other = np.flatnonzero(np.isfinite(v) & (v != 0) & (v != 1))
    if len(other):
        raise ValueError(f"{name} is {v.flat[other[0]]} at {other[0]}; this metric needs 0 or 1")
    return v

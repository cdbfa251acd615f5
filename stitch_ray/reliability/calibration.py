"""The threshold from which answers are given, with a finite-sample promise about the risk of those answers.

The promise: with probability at least 1 - delta over the n calibration answers, the selective risk (expected loss of an
answer that is given) is at most r. It holds for any scorer, whatever its quality, as long as the calibration answers
and those in use are draws from one distribution; the scorer decides only how many answers are given.

Confidence is higher = surer and an answer is given when `confidence >= threshold`. A NaN confidence is never accepted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betaincinv, xlogy  # scipy.stats has the same, and takes a second to import

Floats = NDArray[np.float64]
Test = Literal["binomial", "hoeffding_bentkus"]
Method = Literal["learn_then_test", "sgr"]

UNIFORM_GRID = tuple(step / 100 for step in range(100))
"""Thresholds 0, .01, ... .99: a grid that has seen no data, for confidences in [0, 1]."""

_PRIOR_ANSWERS = 2.0


@dataclass(frozen=True, slots=True)
class Choice:
    """The policy that fixed-sequence testing ends at, by position; None: none passed, and `reason` says why.

    The counts and the risk are those of the policy that was chosen, else of the first that was tested.
    """

    policy: int | None
    risk: float
    delta: float
    num_calibration: int
    num_accepted: int
    empirical_risk: float | None
    p_value: float | None
    reason: str | None

    @property
    def coverage(self) -> float:
        return self.num_accepted / self.num_calibration if self.policy is not None else 0.0


@dataclass(frozen=True, slots=True)
class Threshold:
    """`value`: give an answer from this confidence on; None: abstain on everything, for the `reason` given.

    `risk` and `delta` are what is promised. `num_accepted`, `coverage` and `empirical_risk` describe the calibration
    answers at the threshold (`empirical_risk` None where nothing is accepted).
    """

    value: float | None
    risk: float
    delta: float
    num_calibration: int
    num_accepted: int
    empirical_risk: float | None
    coverage: float
    p_value: float | None
    method: Method
    reason: str | None


def learn_then_test(
    confidence: ArrayLike,
    errors: ArrayLike,
    risk: float,
    delta: float,
    *,
    grid: ArrayLike | None = None,
    start: float | None = None,
    test: Test | None = None,
) -> Threshold:
    """The lowest threshold that passes fixed-sequence testing (Learn then Test, Angelopoulos et al. 2021).

    confidence: (n,); errors: (n,) losses in [0, 1]. `grid`: thresholds in any order, chosen without these labels (see
    `quantile_grid`); default: `UNIFORM_GRID`, for which confidences must lie in [0, 1]. `start`: leave out thresholds
    above it, also chosen without these labels (see `promising_start`). `test`: as in `p_values`. Raises ValueError for
    input outside these ranges.
    """
    scores, losses = _checked(confidence, errors)
    thresholds = _thresholds(scores, grid, start)
    order = np.argsort(-scores, kind="stable")
    cumulative = np.concatenate([[0.0], np.cumsum(losses[order])])
    accepted = np.searchsorted(-scores[order], -thresholds, side="right")  # NaN comes last and is never reached
    choice = _fixed_sequence(accepted, cumulative[accepted], len(scores), risk, delta, test or _test_for(losses))
    return as_threshold(choice, thresholds)


def learn_then_test_policies(
    accepted: ArrayLike, losses: ArrayLike, risk: float, delta: float, *, test: Test | None = None
) -> Choice:
    """The most lenient policy that passes fixed-sequence testing, for decisions of more than one stage.

    accepted: (policies, n) bool, which calibration questions each policy answers; losses: (policies, n) in [0, 1], of
    the answer that it gives (ignored where it gives none). Policies go from strict to lenient, in an order and of a kind
    chosen without these labels. Raises ValueError for other shapes or losses.
    """
    given, cost = np.asarray(accepted, np.bool_), np.asarray(losses, np.float64)
    if given.ndim != 2 or given.shape != cost.shape or not given.size:
        raise ValueError(f"expected accepted and losses as (policies, n), got {given.shape} and {cost.shape}")
    paid = np.where(given, cost, 0.0)
    if not ((paid >= 0) & (paid <= 1)).all():
        raise ValueError("losses of accepted answers must lie in [0, 1]")
    return _fixed_sequence(given.sum(1), paid.sum(1), given.shape[1], risk, delta, test or _test_for(paid))


def sgr(confidence: ArrayLike, errors: ArrayLike, risk: float, delta: float) -> Threshold:
    """Selection with guaranteed risk (Geifman and El-Yaniv 2017, Alg. 1), for comparison: it answers less.

    A binary search over the sorted confidences, each of its ceil(log2 n) probes with its share of delta. Errors are 0
    or 1. The p-value is that of the one threshold, without the correction for the search.
    """
    scores, losses = _checked(confidence, errors)
    if _test_for(losses) != "binomial":
        raise ValueError("sgr needs losses of 0 or 1")
    _check_promise(risk, delta)
    ordered = np.sort(scores[~np.isnan(scores)])
    low, high, best = 0, len(ordered) - 1, None
    steps = max(1, math.ceil(math.log2(len(ordered)))) if len(ordered) else 0
    for _ in range(steps):
        middle = (low + high + 1) // 2
        given = scores >= ordered[middle]
        if upper_bound(losses[given].sum(), int(given.sum()), delta / steps) <= risk:
            high, best = middle, min(float(ordered[middle]), math.inf if best is None else best)
        else:
            low = middle
    given = scores >= best if best is not None else np.zeros(len(scores), np.bool_)
    count, total = int(given.sum()), float(losses[given].sum())
    needed = minimal_accepted(risk, delta / max(steps, 1))
    short = f"needs at least {needed} accepted calibration answers without an error; there are {len(ordered)}"
    failed = f"no threshold that the search tried keeps to a risk of {risk:g} with probability {1 - delta:g}"
    return Threshold(
        value=best,
        risk=risk,
        delta=delta,
        num_calibration=len(scores),
        num_accepted=count,
        empirical_risk=total / count if count else None,
        coverage=count / len(scores),
        p_value=float(_binomial_cdf(total, count, risk)) if count else None,
        method="sgr",
        reason=None if best is not None else short if len(ordered) < needed else failed,
    )


def p_values(num_accepted: ArrayLike, total_loss: ArrayLike, risk: float, test: Test) -> Floats:
    """P-value of "the selective risk is above `risk`" for every policy; 1 where nothing is accepted.

    binomial: exact, for losses of 0 or 1. hoeffding_bentkus: for losses in [0, 1], the smaller of Hoeffding's
    exp(-k * KL(mean, risk)) and Bentkus' e * P(Bin(k, risk) <= ceil(sum of losses)) (Bates et al. 2021; Angelopoulos et
    al. 2021).
    """
    k, total = np.asarray(num_accepted, np.float64), np.asarray(total_loss, np.float64)
    if test == "binomial":
        return np.asarray(np.where(k > 0, _binomial_cdf(np.rint(total), k, risk), 1.0))
    mean = np.minimum(np.divide(total, k, out=np.full_like(total, risk), where=k > 0), risk)
    hoeffding = np.exp(-k * _divergence(mean, risk))
    bentkus = math.e * _binomial_cdf(np.ceil(total - 1e-9), k, risk)
    return np.asarray(np.where(k > 0, np.minimum(1.0, np.minimum(hoeffding, bentkus)), 1.0))


def _binomial_cdf(successes: ArrayLike, trials: ArrayLike, share: float) -> Floats:
    """P(at most `successes` of `trials`), by the incomplete beta function."""
    k, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
    return np.asarray(np.where(k >= n, 1.0, betainc(np.maximum(n - k, 1), k + 1, 1 - share)))


def minimal_accepted(risk: float, delta: float) -> int:
    """How many accepted calibration answers can pass at all, if none of them has a loss: ceil(ln delta / ln(1 - r))."""
    _check_promise(risk, delta)
    return max(1, math.ceil(math.log(delta) / math.log1p(-risk) - 1e-12))


def upper_bound(errors: float, num_accepted: int, delta: float) -> float:
    """Clopper and Pearson's upper bound of a binomial share, at confidence 1 - delta. 1 for nothing accepted."""
    return 1.0 if errors >= num_accepted else float(betaincinv(errors + 1, num_accepted - errors, 1 - delta))


def share_interval(errors: int, num: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's two-sided interval of a binomial share; (nan, nan) for num = 0."""
    if not num:
        return math.nan, math.nan
    half = (1 - level) / 2
    low = 0.0 if errors == 0 else float(betaincinv(errors, num - errors + 1, half))
    return low, upper_bound(errors, num, half)


def quantile_grid(confidence: ArrayLike, size: int) -> Floats:
    """At most `size` thresholds that accept 1/size, 2/size, ... 1 of `confidence`, (n,), strict to lenient.

    Take the confidences of another split than the one that is tested: then the grid knows nothing of its labels. Ties
    (isotonic output) make it shorter. Raises ValueError if no confidence is a number.
    """
    scores = np.asarray(confidence, np.float64)
    scores = scores[~np.isnan(scores)]
    if not len(scores):
        raise ValueError("a grid needs confidences, and all of them are NaN")
    return np.unique(np.quantile(scores, np.arange(size) / size, method="higher"))[::-1]


def promising_start(accepted: ArrayLike, losses: ArrayLike, num: int, risk: float) -> int | None:
    """The policy that fixed-sequence testing should begin with, by position; None: none looks good enough.

    accepted, losses: (policies, m) of *another* split than the one that is tested, as in `learn_then_test_policies`;
    num: size of the one that is. The strictest policies accept so few answers that one error among them ends the
    sequence, however good the rest is. Their order and where they begin may be learned from labels, as long as those are
    not tested (split fixed-sequence testing, Angelopoulos et al. 2021): the choice costs nothing of the promise, only
    answers if it is a bad one. Chosen is the policy of the most expected evidence, num * share accepted *
    KL(risk seen there, risk), with the risk drawn a little towards that of all answers.
    """
    given, cost = np.asarray(accepted, np.bool_), np.asarray(losses, np.float64)
    if given.ndim != 2 or given.shape != cost.shape or not given.size:
        raise ValueError(f"expected accepted and losses as (policies, m), got {given.shape} and {cost.shape}")
    count, total = given.sum(1), np.where(given, cost, 0.0).sum(1)
    overall = total.sum() / max(count.sum(), 1)
    seen = (total + _PRIOR_ANSWERS * overall) / (count + _PRIOR_ANSWERS)
    evidence = np.where(seen < risk, num * count / given.shape[1] * _divergence(np.minimum(seen, risk), risk), 0.0)
    best = int(evidence.argmax())
    return best if evidence[best] > 0 else None


def from_start(thresholds: Floats, start: float | None) -> Floats:
    """Thresholds, strict to lenient, that are not above `start`. Raises ValueError if none is left."""
    kept = thresholds if start is None else thresholds[thresholds <= start]
    if not len(kept):
        raise ValueError(f"no threshold is at or below the start {start}")
    return kept


def as_threshold(choice: Choice, thresholds: Sequence[float] | Floats) -> Threshold:
    """The threshold of a choice among policies that are thresholds themselves, in the order they were tested in."""
    return Threshold(
        value=None if choice.policy is None else float(thresholds[choice.policy]),
        risk=choice.risk,
        delta=choice.delta,
        num_calibration=choice.num_calibration,
        num_accepted=choice.num_accepted if choice.policy is not None else 0,
        empirical_risk=choice.empirical_risk if choice.policy is not None else None,
        coverage=choice.coverage,
        p_value=choice.p_value,
        method="learn_then_test",
        reason=choice.reason,
    )


def _fixed_sequence(
    accepted: NDArray[np.integer], total: Floats, num: int, risk: float, delta: float, test: Test
) -> Choice:
    """Test policy after policy at level delta each, from the first that accepts enough to pass, until one fails.

    No correction for their number is needed: an error can only happen at the first policy whose risk is too high, and
    it is tested at delta. Where to begin is told by confidences, not by labels.
    """
    needed = minimal_accepted(risk, delta)
    p = p_values(accepted, total, risk, test)
    enough = np.flatnonzero(accepted >= needed)
    first = int(enough[0]) if len(enough) else None
    chosen = None
    for policy in range(len(accepted) if first is None else first, len(accepted)):
        if p[policy] > delta:
            break
        chosen = policy
    shown = first if chosen is None else chosen
    reason = None
    if shown is None:
        most = int(accepted.max(initial=0))
        reason = f"needs at least {needed} accepted calibration answers without an error; there are {most}"
    elif chosen is None:
        reason = (
            f"the first threshold tested accepts {int(accepted[shown])} calibration answers with a loss of "
            f"{total[shown]:g} in sum, which is no evidence for a risk of at most {risk:g} (p-value {p[shown]:.3g}, needed "
            f"{delta:g})"
        )
    count = 0 if shown is None else int(accepted[shown])
    return Choice(
        policy=chosen,
        risk=risk,
        delta=delta,
        num_calibration=num,
        num_accepted=count,
        empirical_risk=float(total[shown] / count) if count and shown is not None else None,
        p_value=None if shown is None else float(p[shown]),
        reason=reason,
    )


def _divergence(mean: Floats, risk: float) -> Floats:
    """Relative entropy of Bernoulli(mean) to Bernoulli(risk), in nats."""
    return np.asarray(xlogy(mean, mean / risk) + xlogy(1 - mean, (1 - mean) / (1 - risk)))


def _checked(confidence: ArrayLike, errors: ArrayLike) -> tuple[Floats, Floats]:
    scores, losses = np.asarray(confidence, np.float64), np.asarray(errors, np.float64)
    if scores.ndim != 1 or scores.shape != losses.shape or not len(scores):
        raise ValueError(f"expected as many confidences as losses, at least one; got {scores.shape} and {losses.shape}")
    if np.isinf(scores).any():
        raise ValueError("a confidence is infinite")
    if not ((losses >= 0) & (losses <= 1)).all():
        raise ValueError("losses must lie in [0, 1]")
    return scores, losses


def _thresholds(scores: Floats, grid: ArrayLike | None, start: float | None) -> Floats:
    """Distinct thresholds, strict to lenient, from `start` on."""
    if grid is None:
        if (scores < 0).any() or (scores > 1).any():
            raise ValueError(
                "without a grid confidences must lie in [0, 1]; give one, such as quantile_grid of a split"
            )
        grid = UNIFORM_GRID
    thresholds = np.unique(np.asarray(grid, np.float64))[::-1]
    if not len(thresholds) or not np.isfinite(thresholds).all():
        raise ValueError("grid must hold finite thresholds, at least one")
    return from_start(thresholds, start)


def _test_for(losses: Floats) -> Test:
    return "binomial" if ((losses == 0) | (losses == 1)).all() else "hoeffding_bentkus"


def _check_promise(risk: float, delta: float) -> None:
    if not 0 < risk < 1 or not 0 < delta < 1:
        raise ValueError(f"risk and delta must lie between 0 and 1, got {risk} and {delta}")

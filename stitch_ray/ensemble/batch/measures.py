"""How right the ensemble and its parts are on labelled questions, how much each answers, and what each costs.

A system answers every question, or only some and abstains on the rest. All are measured on the same questions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stitch_ray.evaluation.answers import exact_match, normalise_answer, token_f1
from stitch_ray.reliability.bootstrap import percentile_interval, resample
from stitch_ray.reliability.calibration import share_interval
from stitch_ray.reliability.metrics import ROUNDING

Floats = NDArray[np.float64]

RESAMPLES = 1000
PRIMARY, DIALOGUE, CASCADE, MAJORITY = "primary alone", "always refined", "cascade", "majority of all"
CASCADE_FULL = "cascade without abstaining"


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval; NaN: not known."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One way of answering n questions. Costs are for each question asked, NaN where not known.

    coverage: share answered. accuracy: of the answers given. exact_match, token_f1: of the answers given, the best over
    all references.
    """

    name: str
    num: int
    answered: int
    accuracy: Interval
    exact_match: Interval
    token_f1: Interval
    calls: float
    tokens: float
    seconds: float

    @property
    def coverage(self) -> float:
        return self.answered / self.num if self.num else math.nan

    def as_dict(self) -> dict[str, Any]:
        cost = {name: getattr(self, name) for name in ("calls", "tokens", "seconds")}
        return {
            "name": self.name,
            "num": self.num,
            "answered": self.answered,
            "coverage": self.coverage if self.num else None,
            **{name: getattr(self, name).as_dict() for name in ("accuracy", "exact_match", "token_f1")},
            **{name: value if math.isfinite(value) else None for name, value in cost.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What a system says to every question; text None: it abstains, or has none. correct: None where it has no label.

    Costs are (n,), NaN where not known.
    """

    name: str
    texts: Sequence[str | None]
    correct: Sequence[bool | None]
    calls: Floats = field(default_factory=lambda: np.empty(0))
    tokens: Floats = field(default_factory=lambda: np.empty(0))
    seconds: Floats = field(default_factory=lambda: np.empty(0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A promise and what came of it: `risk` is the mean loss of `answered` answers, with its 95 % interval."""

    target_risk: float
    total: int
    answered: int
    wrong: float
    risk: float
    low: float
    high: float
    held: bool | None

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}


def measure(answers: Answers, references: Sequence[Sequence[str]], units: NDArray[np.int64], seed: int) -> System:
    """`references`, `units`: (n,). Units: what is redrawn together in the bootstrap. Exact where coverage is told."""
    given = [
        row for row, (text, right) in enumerate(zip(answers.texts, answers.correct, strict=True))
        if text is not None and right is not None
    ]  # fmt: skip
    correct = np.array([bool(answers.correct[row]) for row in given], np.float64)
    scores = {
        name: np.array(
            [max(of(str(answers.texts[row]), gold) for gold in references[row]) for row in given], np.float64
        )
        for name, of in (("exact_match", exact_match), ("token_f1", token_f1))
        if all(references[row] for row in given)
    }
    own = units[given]
    whole = len(given) == len(answers.texts)
    # Clopper and Pearson's interval is exact for the share of a sample, such as that of the answers a policy gave.
    exact = Interval(
        float(correct.mean()) if len(correct) else math.nan, *share_interval(int(correct.sum()), len(correct))
    )
    nothing = Interval(math.nan, math.nan, math.nan)
    return System(
        name=answers.name,
        num=len(answers.texts),
        answered=len(given),
        accuracy=mean_interval(correct, own, seed) if whole else exact,
        exact_match=mean_interval(scores["exact_match"], own, seed) if scores else nothing,
        token_f1=mean_interval(scores["token_f1"], own, seed) if scores else nothing,
        calls=_mean(answers.calls),
        tokens=_mean(answers.tokens),
        seconds=_mean(answers.seconds),
    )


def mean_interval(values: Floats, units: NDArray[np.int64], seed: int) -> Interval:
    """The mean of (n,) with a percentile interval over redrawn units."""
    if not len(values):
        return Interval(math.nan, math.nan, math.nan)
    numbered = np.unique(units, return_inverse=True)[1]
    drawn = [counts @ values / np.maximum(counts.sum(1), 1) for counts in resample(numbered, RESAMPLES, seed)]
    return Interval(float(values.mean()), *percentile_interval(np.concatenate(drawn)))


def promise_kept(target_risk: float, losses: Floats, total: int, seed: int) -> Kept:
    """`losses`: (answered,) in [0, 1] of the answers given, of `total` questions."""
    if not len(losses):
        return Kept(
            target_risk=target_risk, total=total, answered=0, wrong=0.0, risk=math.nan, low=math.nan, high=math.nan,
            held=None,
        )  # fmt: skip
    wrong = float(losses.sum())
    risk = wrong / len(losses)
    if np.isin(losses, (0, 1)).all():
        low, high = share_interval(round(wrong), len(losses))
    else:
        drawn = mean_interval(losses, np.arange(len(losses)), seed)
        low, high = drawn.low, drawn.high
    held = risk <= target_risk + ROUNDING
    return Kept(
        target_risk=target_risk,
        total=total,
        answered=len(losses),
        wrong=wrong,
        risk=risk,
        low=low,
        high=high,
        held=held,
    )


def majority(members: Sequence[Sequence[str | None]]) -> list[int | None]:
    """For every question the member whose answer is given: the first of those that most of them agree with.

    Answers agree that are equal after normalisation. Without a majority the first member that says something decides.
    members: (members, n); None: no answer.
    """
    found: list[int | None] = []
    for answers in zip(*members, strict=True):
        keys = [None if text is None else normalise_answer(text) or text.strip() for text in answers]
        counts = Counter(key for key in keys if key is not None)
        if not counts:
            found.append(None)
            continue
        most = max(counts.values())
        found.append(next(place for place, key in enumerate(keys) if key is not None and counts[key] == most))
    return found


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else math.nan

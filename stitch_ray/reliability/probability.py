"""A score made a probability of being right, by two monotone maps that are nothing but numbers in a JSON file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize
from scipy.special import expit

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Isotonic:
    """Isotonic regression: linear between the points (x, y), constant beyond them.

    x: increasing scores, y: non-decreasing probabilities. Scores inside a flat piece become equal: the map never swaps
    two answers, but it ties many. Whoever ranks answers should rank them by the score; a threshold can use either.
    """

    x: tuple[float, ...]
    y: tuple[float, ...]

    @classmethod
    def fit(cls, score: ArrayLike, correct: ArrayLike) -> Isotonic:
        """Least squares under monotonicity. score: (n,) finite; correct: (n,) in [0, 1]. ValueError for other input.

        With one class, or with one score for all, the result is constant (see `is_constant`).
        """
        from sklearn.isotonic import IsotonicRegression

        scores, labels = _checked(score, correct)
        fitted = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(scores, labels)
        return cls(tuple(map(float, fitted.X_thresholds_)), tuple(map(float, fitted.y_thresholds_)))

    def apply(self, score: ArrayLike) -> Floats:
        """Probabilities, in the shape of `score`. NaN stays NaN."""
        scores = np.asarray(score, np.float64)
        return np.where(np.isnan(scores), np.nan, np.interp(scores, self.x, self.y))  # of one point, NaN gives y

    @property
    def is_constant(self) -> bool:
        return self.y[0] == self.y[-1]

    def to_dict(self) -> dict[str, Any]:
        return {"x": list(self.x), "y": list(self.y)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Isotonic:
        """Raises ValueError if the points are no monotone map into [0, 1]."""
        x, y = _numbers(values, "x"), _numbers(values, "y")
        if len(x) != len(y) or not x:
            raise ValueError(f"isotonic has {len(x)} scores and {len(y)} probabilities; it needs as many, and some")
        if any(a >= b for a, b in pairwise(x)) or any(a > b for a, b in pairwise(y)):
            raise ValueError("isotonic.x must increase and isotonic.y must not fall")
        if y[0] < 0 or y[-1] > 1:
            raise ValueError("isotonic.y must lie in [0, 1]")
        return cls(x, y)


@dataclass(frozen=True, slots=True)
class Platt:
    """sigmoid(slope * score + intercept), slope >= 0 (Platt 1999). Strictly monotone unless the slope is 0: no ties."""

    slope: float
    intercept: float

    @classmethod
    def fit(cls, score: ArrayLike, correct: ArrayLike) -> Platt:
        """Maximum likelihood with Platt's smoothed labels, so that separated classes give finite numbers.

        Arguments as in `Isotonic.fit`. A score that points the wrong way gets slope 0, not a reversed order.
        """
        scores, labels = _checked(score, correct)
        right = labels.sum()
        wrong = len(labels) - right
        target = (right + 1) / (right + 2) * labels + 1 / (wrong + 2) * (1 - labels)
        mean, scale = scores.mean(), scores.std()
        if scale <= 1e-12 * max(1.0, abs(mean)):
            share = target.mean()
            return cls(0.0, float(np.log(share / (1 - share))))
        z = (scores - mean) / scale

        def loss(parameters: Floats) -> tuple[float, Floats]:
            logits = parameters[0] * z + parameters[1]
            error = expit(logits) - target
            value = np.logaddexp(0, logits).sum() - (target * logits).sum()
            return float(value), np.array([(error * z).sum(), error.sum()])

        found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=[(0, None), (None, None)])
        slope = float(found.x[0] / scale)
        return cls(slope, float(found.x[1] - slope * mean))

    def apply(self, score: ArrayLike) -> Floats:
        """Probabilities, in the shape of `score`. NaN stays NaN."""
        return np.asarray(expit(self.slope * np.asarray(score, np.float64) + self.intercept), np.float64)

    @property
    def is_constant(self) -> bool:
        return self.slope == 0

    def to_dict(self) -> dict[str, Any]:
        return {"slope": self.slope, "intercept": self.intercept}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Platt:
        """Raises ValueError for numbers that are missing, not finite, or a negative slope."""
        slope, intercept = (_numbers({name: [values.get(name)]}, name)[0] for name in ("slope", "intercept"))
        if slope < 0:
            raise ValueError("platt.slope must not be negative")
        return cls(slope, intercept)


def _checked(score: ArrayLike, correct: ArrayLike) -> tuple[Floats, Floats]:
    scores, labels = np.asarray(score, np.float64), np.asarray(correct, np.float64)
    if scores.ndim != 1 or scores.shape != labels.shape or not len(scores):
        raise ValueError(f"expected as many scores as labels, at least one; got {scores.shape} and {labels.shape}")
    if not np.isfinite(scores).all():
        raise ValueError("scores to calibrate must be finite; leave out unscored answers")
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError("labels must lie in [0, 1]")
    return scores, labels


def _numbers(values: Mapping[str, Any], name: str) -> tuple[float, ...]:
    found = values.get(name)
    if not isinstance(found, Sequence) or not all(isinstance(value, int | float) for value in found):
        raise ValueError(f"{name} must be a list of numbers" if name in "xy" else f"{name} must be a number")
    if not np.isfinite(np.asarray(found, np.float64)).all():
        raise ValueError(f"{name} must be finite")
    return tuple(map(float, found))

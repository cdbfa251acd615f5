"""Do live confidences still look like those of the calibration answers? A promise holds for questions like those."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

WINDOW = 500
ALPHA = 0.001
"""False alarms a window: one in a thousand windows, each of `WINDOW` new answers."""


@dataclass(frozen=True, slots=True)
class Drift:
    """distance: largest gap between the two distribution functions (Kolmogorov-Smirnov). From `bound` on it is no chance."""

    distance: float
    bound: float
    num: int

    @property
    def found(self) -> bool:
        return self.distance >= self.bound


def ks_distance(one: ArrayLike, other: ArrayLike) -> float:
    """Largest gap between the empirical distribution functions of two samples; in [0, 1]."""
    first, second = np.sort(np.asarray(one, np.float64)), np.sort(np.asarray(other, np.float64))
    places = np.concatenate([first, second])
    gaps = np.searchsorted(first, places, side="right") / len(first) - np.searchsorted(
        second, places, side="right"
    ) / len(second)
    return float(np.abs(gaps).max())


def ks_bound(num: int, other: int, alpha: float = ALPHA) -> float:
    """Distance that two samples of one distribution exceed with probability of about `alpha` (Smirnov 1948); with ties
    less often."""
    return math.sqrt(-math.log(alpha / 2) / 2 * (num + other) / (num * other))


class DriftWatch:
    """Compares each window of new confidences once with the reference; windows do not overlap, so that looking again and
    again is no way to find something."""

    def __init__(self, reference: ArrayLike, window: int = WINDOW) -> None:
        values = np.asarray(reference, np.float64)
        self._reference = np.sort(values[np.isfinite(values)])
        self._window = window
        self._recent: deque[float] = deque(maxlen=window)
        self.last: Drift | None = None

    def add(self, confidence: float) -> Drift | None:
        """The finding of a window that this confidence completes."""
        if not len(self._reference):
            return None
        self._recent.append(confidence)
        if len(self._recent) < self._window:
            return None
        distance = ks_distance(list(self._recent), self._reference)
        self.last = Drift(distance, ks_bound(self._window, len(self._reference)), self._window)
        self._recent.clear()
        return self.last

"""How far two scorings put the same examples in the same order."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation, ties given their mean rank. NaN if one side is constant or has fewer than two values.

    a, b: (examples,).
    """
    x, y = ranks(a), ranks(b)
    if x.shape != y.shape:
        raise ValueError(f"{x.size} and {y.size} values")
    x, y = x - x.mean() if x.size else x, y - y.mean() if y.size else y
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else float("nan")


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 1, equal values sharing the mean of theirs."""
    v = np.asarray(values, dtype=np.float64)
    _, inverse, counts = np.unique(v, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[inverse])

"""How far several scorings put the same examples in the same order."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's rank correlation of two scorings, each (examples,). NaN if one is constant."""
    return float(rank_correlations(np.stack([np.asarray(a), np.asarray(b)], axis=1))[0, 1])


def rank_correlations(columns: ArrayLike) -> Floats:
    """Spearman's correlation of every pair of columns. (examples, scorings) -> (scorings, scorings).

    NaN where a column is constant, as its ranks say nothing; with fewer than two examples everything is NaN.
    """
    values = np.asarray(columns, dtype=np.float64)
    by_rank = np.stack([ranks(column) for column in values.T], axis=1)
    by_rank -= by_rank.mean(axis=0)
    lengths = np.sqrt((by_rank**2).sum(axis=0))
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.clip(by_rank.T @ by_rank / np.outer(lengths, lengths), -1, 1))


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 1; equal values share the mean of theirs."""
    _, group, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[group])

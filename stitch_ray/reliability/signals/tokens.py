"""Signals of an answer's own tokens: how likely they were, and what else the model had in mind."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stitch_ray.config.reliability import SignalName


def token_signals(
    logprobs: Sequence[float] | None, entropies: Sequence[float] | None, margins: Sequence[float] | None
) -> dict[SignalName, float]:
    """The five signals of one answer from what `TokenStatistics` holds of it; NaN for those of a part that is None.

    The definitions are LM-Polygraph's (Fadeeva et al. 2023, Table 1), which gives the negated log-probability and the
    logarithm of the perplexity. The end of the answer is no token of it. An answer without tokens has none of them:
    the empty sum of log-probabilities would make it the surest of all.
    """
    likelihoods, spreads, leads = (_array(part) for part in (logprobs, entropies, margins))
    return {
        "sequence_log_probability": float(likelihoods.sum()) if likelihoods.size else math.nan,
        "perplexity": _exp(-_mean(likelihoods)),
        "mean_token_entropy": _mean(spreads),
        "max_token_entropy": float(spreads.max()) if spreads.size else math.nan,
        "mean_token_margin": _mean(leads),
    }


def needed_statistics(names: Sequence[SignalName]) -> frozenset[str]:
    """Which of logprobs, entropies and margins the signals `names` are made of."""
    return frozenset(_SOURCE[name] for name in names if name in _SOURCE)


_SOURCE: dict[SignalName, str] = {
    "sequence_log_probability": "logprobs",
    "perplexity": "logprobs",
    "mean_token_entropy": "entropies",
    "max_token_entropy": "entropies",
    "mean_token_margin": "margins",
}


def _array(values: Sequence[float] | None) -> NDArray[np.float64]:
    return np.asarray(() if values is None else values, np.float64)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else math.nan


def _exp(value: float) -> float:
    """Infinite only where a token had probability 0: the largest power that is finite stands for any beyond it."""
    return math.exp(min(value, 700.0)) if value != math.inf else math.inf

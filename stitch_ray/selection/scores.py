"""SelectIT's scores as pure functions of the rating logits (Liu et al. 2024, arXiv 2402.16705, Eq. 3-5).

Only the logits of the R rating tokens matter: the full-vocabulary partition sum cancels when the probabilities are
normalised over the ratings. All functions are invariant to a constant added to the logits of one (…, prompt).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Mode = Literal["paper", "repo"]
Array = NDArray[np.float64]

REPO_MODEL_WEIGHTS = (7 / 20, 13 / 20, 70 / 90)
"""Weights of the published code, by position on its command line. They do not sum to 1."""


def rating_probabilities(logits: ArrayLike) -> Array:
    """Softmax over the last axis, shape kept. Raises ValueError if a logit is not finite."""
    z = np.asarray(logits, dtype=np.float64)
    if not np.isfinite(z).all():
        raise ValueError("rating logits must be finite")
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return np.asarray(e / e.sum(axis=-1, keepdims=True))


def token_score(logits: ArrayLike, mode: Mode = "paper") -> Array:
    """Token-level score of every rating prompt: the favourite rating, weighted by how clearly it wins (Eq. 3).

    logits: (..., prompts, ratings) -> (..., prompts). `paper` ranges over [0, R]; `repo` applies a second softmax to
    the probabilities, as the published code does, and needs as many prompts as ratings, because that code uses one
    number for both. The lowest rating wins ties.
    """
    p = rating_probabilities(logits)
    prompts, ratings = p.shape[-2:]
    if ratings < 2:
        raise ValueError("at least two ratings are needed")
    if mode == "repo":
        if prompts != ratings:
            raise ValueError(f"mode 'repo' is defined for as many prompts as ratings, not {prompts} and {ratings}")
        p = rating_probabilities(p)
    elif mode != "paper":
        raise ValueError(f"mode must be 'paper' or 'repo', not {mode!r}")
    best = p.argmax(axis=-1)
    top = np.take_along_axis(p, best[..., None], axis=-1)[..., 0]
    return np.asarray((best + 1) * (ratings * top - p.sum(axis=-1)) / (ratings - 1))


def sentence_score(logits: ArrayLike, alpha: float = 0.2, mode: Mode = "paper") -> Array:
    """Sentence-level score: mean over the prompts, lowered where the prompts disagree (Eq. 4).

    logits: (..., prompts, ratings) -> (...). The standard deviation is the population one (ddof 0).
    """
    token = token_score(logits, mode)
    return np.asarray(token.mean(axis=-1) / (1 + alpha * token.std(axis=-1)))


def model_score(sentence: ArrayLike, parameters: ArrayLike) -> Array:
    """Model-level score: mean of the models' sentence scores, weighted by their sizes (Eq. 5).

    sentence: (..., models), parameters: (models,), any unit -> (...).
    """
    sizes = np.asarray(parameters, dtype=np.float64)
    if sizes.ndim != 1 or not (np.isfinite(sizes) & (sizes > 0)).all():
        raise ValueError("parameters must be positive, one number a model")
    return weighted_model_score(sentence, sizes / sizes.sum())


def weighted_model_score(sentence: ArrayLike, weights: Sequence[float] | ArrayLike) -> Array:
    """sum over models of weight x sentence score, weights as given. sentence: (..., models) -> (...)."""
    s, w = np.asarray(sentence, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if s.shape[-1:] != w.shape:
        raise ValueError(f"{w.size} weights for {s.shape[-1]} models")
    return np.asarray(s @ w)

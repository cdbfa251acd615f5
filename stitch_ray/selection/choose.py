"""Which of the rated examples are kept. Pure functions of scores and ids; the order of the input does not matter."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Embed = Callable[[Sequence[int]], NDArray[np.float32]]

_CHUNK = 256


def keep_count(rows: int, proportion: float | None, count: int | None) -> int:
    """How many of `rows` are kept. `proportion` is taken as the decimal it was written as: 0.29 of 100 is 29.

    Raises ValueError if more are asked for than there are, or if the proportion keeps none.
    """
    if count is not None:
        if count > rows:
            raise ValueError(f"select.count: {count} asked for, {rows} rated")
        return count
    if proportion is None:
        raise ValueError("give a proportion or a count")
    kept = math.floor(Decimal(str(proportion)) * rows)
    if not kept:
        raise ValueError(f"select.proportion: {proportion:g} of {rows} rows keeps none")
    return kept


def rank_by(scores: Floats, ids: Sequence[str]) -> NDArray[np.int64]:
    """Positions from the highest score to the lowest; the smaller id first among equals. Raises ValueError on NaN."""
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite")
    return np.lexsort((np.array(ids, dtype=np.str_), -np.asarray(scores, dtype=np.float64)))


def rank_random(ids: Sequence[str], seed: int) -> NDArray[np.int64]:
    """A random order that depends on `seed` and the ids alone, not on the order of the rows."""
    keys = [hashlib.sha256(f"{seed}:{name}".encode()).hexdigest() for name in ids]
    return np.argsort(np.array(keys), kind="stable")


def choose_diverse(order: Sequence[int], count: int, embed: Embed, max_cosine: float) -> list[int]:
    """Greedy: go down `order` and take an example unless its cosine with one taken is above `max_cosine`.

    `embed` maps positions to unit-length rows and is asked only for as many as are looked at. Fewer than `count` come
    back when the order is exhausted.
    """
    taken: list[int] = []
    kept: list[NDArray[np.float32]] = []
    for chunk in _chunks(order):
        vectors = embed(chunk)
        against = np.full(len(chunk), -np.inf)
        if kept:
            against = (vectors @ np.stack(kept).T).max(axis=1)
        within = vectors @ vectors.T
        new: list[int] = []
        for local, position in enumerate(chunk):
            closest = max(against[local], within[local, new].max() if new else -np.inf)
            if closest <= max_cosine:
                new.append(local)
                taken.append(position)
                if len(taken) == count:
                    return taken
        kept.extend(vectors[new])
    return taken


def overlap(a: Sequence[int], b: Sequence[int]) -> float:
    """Share of `a` that is also in `b`."""
    return len(set(a) & set(b)) / len(a) if len(a) else 0.0


def _chunks(order: Sequence[int]) -> Iterator[list[int]]:
    for start in range(0, len(order), _CHUNK):
        yield [int(position) for position in order[start : start + _CHUNK]]

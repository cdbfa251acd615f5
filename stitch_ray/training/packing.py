"""Which examples share a row, so that few tokens of it stay empty."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def pack(lengths: ArrayLike, capacity: int) -> list[list[int]]:
    """Best-fit decreasing (Johnson 1973): from long to short, each into the fullest row that still has room.

    lengths: (items,) tokens. Returns rows of item numbers, every item once; equal lengths in the order given. Time
    O(items x log(capacity)), apart from moving at most `capacity` numbers in memory. Raises ValueError if an item is
    longer than the capacity.
    """
    sizes = np.asarray(lengths, np.int64)
    if sizes.size and sizes.max() > capacity:
        item = int(sizes.argmax())
        raise ValueError(f"item {item} has {sizes[item]} tokens and a row holds {capacity}")
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room: rows that have exactly this much
    rooms: list[int] = []  # the keys of with_room that have rows, ascending
    for item in np.argsort(-sizes, kind="stable").tolist():
        length = int(sizes[item])
        at = bisect_left(rooms, length)
        if at == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[at]
        rows[row].append(item)
        left = room - length
        if left in with_room:
            with_room[left].append(row)
        else:
            with_room[left] = [row]
            insort(rooms, left)
    return rows


def utilisation(rows: Sequence[Sequence[int]], lengths: ArrayLike, capacity: int) -> float:
    """Share of the rows' capacity that holds tokens, between 0 and 1."""
    sizes = np.asarray(lengths, np.int64)
    return sum(int(sizes[list(row)].sum()) for row in rows) / (len(rows) * capacity)

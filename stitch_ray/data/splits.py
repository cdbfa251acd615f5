"""Train, validation and test by hash of the question: stable for ever, grouped, and the same in every task and job."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal, TypeVar

Name = TypeVar("Name", bound=str)
Split = Literal["train", "validation", "test"]


def split_of(group_id: str, validation: float, test: float, salt: str) -> Split:
    """The side of all examples of a group, from nothing but its id, the salt and the two shares.

    A group has a fixed place in [0, 1). Test takes the lower end and validation the upper one, so that each share can
    change without moving a group between the other two, and a larger share holds all of a smaller one.
    """
    place = place_of(group_id, salt)
    if place < test:
        return "test"
    return "validation" if place >= 1 - validation else "train"


def split_among(group_id: str, shares: Mapping[Name, float], salt: str) -> Name:
    """The side of a group among any number of splits, which take their shares of the axis in order from its lower end.

    The axis is that of `split_of`: a group in its test share is among the first splits here. Shares add up to 1.
    """
    place, end = place_of(group_id, salt), 0.0
    for name, share in shares.items():
        end += share
        if place < end and share:
            return name
    return next(name for name in reversed(list(shares)) if shares[name])  # the sum was rounded down


def place_of(group_id: str, salt: str) -> float:
    """Where a group stands in [0, 1), for ever."""
    digest = hashlib.sha256(f"{salt}\n{group_id}".encode()).digest()
    # 53 bits are what a float holds exactly: 64 could round up to 1.
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53

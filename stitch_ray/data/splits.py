"""Train, validation and test by hash of the question: stable for ever, grouped, and the same in every task and job."""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "validation", "test"]


def split_of(group_id: str, validation: float, test: float, salt: str) -> Split:
    """The side of all examples of a group, from nothing but its id, the salt and the two shares.

    A group has a fixed place in [0, 1). Test takes the lower end and validation the upper one, so that each share can
    change without moving a group between the other two, and a larger share holds all of a smaller one.
    """
    digest = hashlib.sha256(f"{salt}\n{group_id}".encode()).digest()
    # 53 bits are what a float holds exactly: 64 could round up to 1.
    place = (int.from_bytes(digest[:8], "big") >> 11) / 2**53
    if place < test:
        return "test"
    return "validation" if place >= 1 - validation else "train"

"""Which examples every optimizer step trains: pure functions of lengths, tasks, seed and epoch.

A step is a list of micro-batches, and who runs which of them is not the plan's business: it is the same for every number
of workers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from stitch_ray.config.finetune import MixingConfig
from stitch_ray.errors import UserError
from stitch_ray.training.mixing import epoch_order, shuffle
from stitch_ray.training.packing import pack

MicroBatch = tuple[int, ...]
"""Rows of the dataset that go through one forward."""

Step = tuple[MicroBatch, ...]
"""Micro-batches of one optimizer step, at least one."""

PACKING_WINDOW = 16_384
"""Examples packed together. More fill rows no better and keep what the order of the epoch brought together less close."""


def plan_epoch(
    lengths: NDArray[np.int32],
    task_ids: NDArray[np.int32],
    *,
    epoch: int,
    seed: int,
    mixing: MixingConfig,
    packing: bool,
    batch_tokens: int | None,
    batch_examples: int | None,
    micro_batches: int,
) -> list[Step]:
    """Steps of one epoch in order. lengths in tokens, task_ids: both (rows,).

    With `batch_examples` a micro-batch is that many examples in a row of the epoch's order (the last one of the epoch
    may have fewer). With `batch_tokens` and packing, windows of that order are packed into rows of at most so many
    tokens, and the rows of a window shuffled; ValueError if an example is longer. Without packing, examples are taken
    in order while all of them, padded to the longest, stay within `batch_tokens`; a longer example is alone.
    A step has `micro_batches` of them, the last one of the epoch maybe fewer.
    """
    order = epoch_order(task_ids, mixing, seed, epoch)
    if packing and not batch_examples:
        assert batch_tokens is not None, "give batch_tokens or batch_examples"
        rows = _packed(order, lengths, batch_tokens, seed, epoch)
    else:
        rows = list(_consecutive(order, lengths, batch_tokens, batch_examples))
    return [tuple(rows[i : i + micro_batches]) for i in range(0, len(rows), micro_batches)]


def plan_validation(
    lengths: NDArray[np.int32], *, packing: bool, batch_tokens: int | None, batch_examples: int | None
) -> list[MicroBatch]:
    """Micro-batches that hold every row once, from short to long examples, or packed as full as possible."""
    order = np.argsort(lengths, kind="stable")
    if packing and not batch_examples:
        assert batch_tokens is not None, "give batch_tokens or batch_examples"
        return [tuple(order[row].tolist()) for row in pack(lengths[order], batch_tokens)]
    return list(_consecutive(order, lengths, batch_tokens, batch_examples))


@dataclass
class StepPlan:
    """All steps of a run, made by `plan_steps`: `total_steps` of them, `step(i)` for the rows of one.

    Only one epoch is held in memory. Counting the steps of several epochs plans each of them once (about 2 s an epoch
    of a million examples).
    """

    lengths: NDArray[np.int32]
    task_ids: NDArray[np.int32]
    seed: int
    mixing: MixingConfig
    packing: bool
    batch_tokens: int | None
    batch_examples: int | None
    micro_batches: int
    total_steps: int = field(init=False)
    _ends: list[int] = field(init=False, default_factory=list)  # step behind the last one of every epoch seen so far
    _cached: tuple[int, list[Step]] | None = field(init=False, default=None)

    def step(self, i: int) -> Step:
        """Micro-batches of step i, counted from 0 over all epochs. Raises IndexError outside the run."""
        if not 0 <= i < self.total_steps:
            raise IndexError(f"step {i} of {self.total_steps}")
        epoch, at, _ = self._locate(i)
        return self._epoch(epoch)[at]

    def epoch(self, i: int) -> float:
        """Epochs that are over when step i begins, with the share of the one it belongs to."""
        epoch, at, steps = self._locate(i)
        return epoch + at / steps

    def _locate(self, i: int) -> tuple[int, int, int]:
        """The epoch of step i, its place in it and the epoch's number of steps."""
        while not self._ends or self._ends[-1] <= i:
            self._count(len(self._ends))
        epoch = bisect_right(self._ends, i)
        first = self._ends[epoch - 1] if epoch else 0
        return epoch, i - first, self._ends[epoch] - first

    def _steps_in(self, epochs: float) -> int:
        """Steps of so many epochs; of a part of an epoch its share, rounded up."""
        whole, part = int(epochs), epochs - int(epochs)
        while len(self._ends) < math.ceil(epochs):
            self._count(len(self._ends))
        before = self._ends[whole - 1] if whole else 0
        # Rounded first: 1.1 - 1 is a little more than 0.1.
        return before + (math.ceil(round(part * (self._ends[whole] - before), 6)) if part else 0)

    def _count(self, epoch: int) -> None:
        self._ends.append((self._ends[-1] if self._ends else 0) + len(self._epoch(epoch)))

    def _epoch(self, epoch: int) -> list[Step]:
        if self._cached is None or self._cached[0] != epoch:
            steps = plan_epoch(
                self.lengths,
                self.task_ids,
                epoch=epoch,
                seed=self.seed,
                mixing=self.mixing,
                packing=self.packing,
                batch_tokens=self.batch_tokens,
                batch_examples=self.batch_examples,
                micro_batches=self.micro_batches,
            )
            self._cached = (epoch, steps)
        return self._cached[1]


def plan_steps(
    lengths: NDArray[np.int32],
    task_ids: NDArray[np.int32],
    *,
    epochs: float | None = None,
    max_steps: int | None = None,
    seed: int,
    mixing: MixingConfig,
    packing: bool,
    batch_tokens: int | None,
    batch_examples: int | None,
    micro_batches: int,
) -> StepPlan:
    """The steps of `epochs` passes, which need not be whole, or `max_steps` steps over as many epochs as they take.

    The other arguments are those of `plan_epoch`. Raises UserError if there is no example.
    """
    if not len(lengths):
        raise UserError("tasks: no example is left to train on; look at the quarantined and dropped rows, and at split")
    plan = StepPlan(lengths, task_ids, seed, mixing, packing, batch_tokens, batch_examples, micro_batches)
    if max_steps is not None:
        plan.total_steps = max_steps
    else:
        assert epochs is not None, "give epochs or max_steps"
        plan.total_steps = plan._steps_in(epochs)
    return plan


def _packed(
    order: NDArray[np.int64], lengths: NDArray[np.int32], capacity: int, seed: int, epoch: int
) -> list[MicroBatch]:
    """Windows of equal size, so that none is a remainder too small to be packed well."""
    rows: list[MicroBatch] = []
    for window, part in enumerate(np.array_split(order, max(1, math.ceil(len(order) / PACKING_WINDOW)))):
        packed = pack(lengths[part], capacity)
        # The last word keeps the key apart from those of the tasks' shuffles.
        rows.extend(tuple(part[packed[i]].tolist()) for i in shuffle(len(packed), seed, epoch, window, 1))
    return rows


def _consecutive(
    order: NDArray[np.int64], lengths: NDArray[np.int32], tokens: int | None, examples: int | None
) -> Iterator[MicroBatch]:
    """Runs of `order` with at most `examples` examples, or `tokens` tokens once padded."""
    if examples:
        for i in range(0, len(order), examples):
            yield tuple(order[i : i + examples].tolist())
        return
    assert tokens is not None, "give batch_tokens or batch_examples"
    group: list[int] = []
    longest = 0
    for row, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        if group and (len(group) + 1) * max(longest, length) > tokens:
            yield tuple(group)
            group, longest = [], 0
        group.append(row)
        longest = max(longest, length)
    if group:
        yield tuple(group)

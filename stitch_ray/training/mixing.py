"""In which order the examples of several tasks are trained."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stitch_ray.config.finetune import MixingConfig


def spread(counts: ArrayLike) -> NDArray[np.int64]:
    """Task k exactly `counts[k]` times, each as evenly as the others allow. Shape (sum of counts,).

    Draw j of task k is due at `(j + 1/2) / counts[k]` of the way, and the draws are sorted by that (Webster's rule):
    no loop over draws. Megatron's greedy order, which MFTCoder uses, has the same counts in slightly another order.
    """
    sizes = np.asarray(counts, np.int64)
    task = np.repeat(np.arange(len(sizes)), sizes)
    draw = np.arange(len(task)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return task[np.argsort((draw + 0.5) / sizes[task], kind="stable")]


def epoch_order(task_ids: NDArray[np.int32], mixing: MixingConfig, seed: int, epoch: int) -> NDArray[np.int64]:
    """Rows of the dataset in the order in which `epoch` trains them. task_ids: (rows,); result: (rows,).

    Proportional mixing takes every row once, in a new order every epoch. Otherwise a task gets a fixed number of draws
    an epoch and walks through one shuffle of its rows after another: a row comes back only after all others of its task
    did, and an epoch goes on where the last one stopped. The draws sum to the number of rows. A task without rows is left
    out, one with less than about half a draw an epoch gets none.
    """
    present, sizes = np.unique(task_ids, return_counts=True)
    counts = sizes if mixing.proportional else _draws(_shares(present, sizes, mixing), len(task_ids))
    tasks = spread(counts)
    order = np.empty(len(tasks), np.int64)
    for k, task in enumerate(present):
        rows = np.flatnonzero(task_ids == task)
        order[tasks == k] = _walk(rows, int(counts[k]), epoch, seed, int(task))
    return order


def shuffle(n: int, *key: int) -> NDArray[np.int64]:
    """A permutation of n that depends on `key` alone.

    From raw PCG64 output, which NumPy promises to keep (NEP 19), unlike `Generator.permutation`. Keys that differ by
    trailing zeros only are the same key to `SeedSequence`.
    """
    return np.argsort(np.random.PCG64(np.random.SeedSequence(key)).random_raw(n), kind="stable")


def _shares(present: NDArray[np.int32], sizes: NDArray[np.int64], mixing: MixingConfig) -> NDArray[np.float64]:
    """Shares of the tasks that have rows; they sum to 1."""
    if mixing.weights is not None:
        shares = np.asarray(mixing.weights, np.float64)[present]
    else:
        shares = (sizes / sizes.max()) ** (1 / mixing.temperature)
    return np.asarray(shares / shares.sum())


def _draws(shares: NDArray[np.float64], n: int) -> NDArray[np.int64]:
    """Whole numbers in these shares that sum to n (largest remainders, the first task on a tie)."""
    counts = np.floor(shares * n).astype(np.int64)
    behind = np.argsort(counts - shares * n, kind="stable")
    counts[behind[: n - counts.sum()]] += 1
    return counts


def _walk(rows: NDArray[np.int64], draws: int, epoch: int, seed: int, task: int) -> NDArray[np.int64]:
    """Draws `epoch * draws` up to `(epoch + 1) * draws` of the endless chain of shuffles of `rows`."""
    start, stop = epoch * draws, (epoch + 1) * draws
    rounds = range(start // len(rows), -(-stop // len(rows)))
    chain = np.concatenate([rows[:0], *(rows[shuffle(len(rows), seed, r, task)] for r in rounds)])
    first = start - rounds.start * len(rows)
    return chain[first : first + draws]

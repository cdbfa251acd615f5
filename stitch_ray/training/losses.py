"""One number from token losses of several tasks, normalised over a whole optimizer step.

A step is run in parts: micro-batches, on several workers. `LossTotals` holds what the step as a whole divides by, so that the
losses of the parts add up to the loss of the step, however it was cut. MFTCoder divides inside every part and averages the
quotients; its loss, and the weight of a token, then depend on which rows happen to share a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stitch_ray.config.finetune import LossMode

Weights: TypeAlias = Tensor | Sequence[float] | NDArray[np.float64]


@dataclass(frozen=True)
class LossTotals:
    """What a loss divides by, per task, over all parts of a step. Totals of parts are added with `+`.

    weights: (tasks,) float64, sum of the token weights
    examples: (tasks,) float64, examples of which any token has weight
    """

    weights: Tensor
    examples: Tensor

    @classmethod
    def of(cls, mask: Tensor, task_ids: Tensor, num_tasks: int, example_ids: Tensor | None = None) -> LossTotals:
        """Totals of one part; shapes as in `multitask_loss`. An example lies in one part and belongs to one task."""
        tasks = _per_token(task_ids, mask)
        examples = _example_ids(example_ids, mask)
        # An example counts once for its task: distinct pairs of both among the tokens that carry weight.
        pairs = (examples * num_tasks + tasks)[mask != 0].unique()
        return cls(
            weights=_sum_by(tasks, mask, num_tasks),
            examples=torch.bincount(pairs % num_tasks, minlength=num_tasks).double(),
        )

    def __add__(self, other: LossTotals) -> LossTotals:
        return LossTotals(self.weights + other.weights, self.examples + other.examples)


def multitask_loss(
    token_losses: Tensor,
    mask: Tensor,
    task_ids: Tensor,
    task_weights: Weights | None = None,
    mode: LossMode = "task_token_mean",
    *,
    example_ids: Tensor | None = None,
    totals: LossTotals | None = None,
) -> Tensor:
    """Loss of a batch, or its share in the loss of the step that `totals` describes. The shares of a step add up.

    With token losses l, token weights m, and task weights v (MFTCoder `loss_func_mft`, the name of the case in brackets):

    token_mean (case1):        sum(m l) / sum(m)
    sample_mean (case2):       mean over examples of sum(m l) / sum(m)
    task_token_mean (case3):   mean over tasks, weighted by v, of the token mean of the task
    task_sample_mean (case4):  mean over tasks, weighted by v, of the sample mean of the task
    coba:                      task_token_mean; v are the weights of the moment, from `training.coba.CoBa`

    Examples and tasks without weight are absent: they are in no sum and no count. Where nothing is present the loss is 0 and
    so is its gradient. A loss that is not finite shows, unless its token has weight 0.

    token_losses: (rows, tokens), any float type; summed in float32 or better, which is the type of the result
    mask: (rows, tokens), weight of every token, not negative
    task_ids: (rows,) or (rows, tokens), from 0
    task_weights: (tasks,) tensor, array or list; None: equal. Without effect in token_mean and sample_mean
    example_ids: (rows, tokens), from 0 in this batch. None: every row is one example, so packed rows need it for sample means
    totals: denominators of the whole step, which includes this batch; None: this batch is all there is
    """
    tasks = _per_token(task_ids, mask)
    if totals is None:
        num_tasks = len(task_weights) if task_weights is not None else torch.bincount(tasks.flatten()).numel()
        totals = LossTotals.of(mask, tasks, num_tasks, example_ids)
    token_shares = _token_shares(mask, tasks, task_weights, mode, example_ids, totals)
    wide = token_losses.to(torch.promote_types(token_losses.dtype, torch.float32))
    return (torch.where(mask != 0, wide, 0) * token_shares.to(wide.dtype)).sum()


def task_losses(token_losses: Tensor, mask: Tensor, task_ids: Tensor, num_tasks: int) -> tuple[Tensor, Tensor]:
    """Weighted loss sums and weights of every task, both (tasks,) float64; parts add up, their quotient is the token mean.

    Shapes as in `multitask_loss`. The sums keep their graph: detach what is only logged.
    """
    tasks = _per_token(task_ids, mask)
    weighted = torch.where(mask != 0, token_losses.double(), 0) * mask
    return _sum_by(tasks, weighted, num_tasks), _sum_by(tasks, mask, num_tasks)


@torch.no_grad()
def _token_shares(
    mask: Tensor,
    tasks: Tensor,
    task_weights: Weights | None,
    mode: LossMode,
    example_ids: Tensor | None,
    totals: LossTotals,
) -> Tensor:
    """Factor of every token loss in the loss, (rows, tokens) float64. All modes are linear, they differ only in it."""
    counts = (totals.examples if mode.endswith("sample_mean") else totals.weights).to(mask.device)
    within = mask.double()
    if mode.endswith("sample_mean"):
        examples = _example_ids(example_ids, mask)
        num_examples = torch.bincount(examples.flatten()).numel()
        within = within * _reciprocal(_sum_by(examples, mask, num_examples))[examples]
    if mode in ("token_mean", "sample_mean"):
        return within * _reciprocal(counts.sum())
    if task_weights is None:
        weights = torch.ones_like(counts)
    else:
        weights = torch.as_tensor(task_weights, dtype=torch.float64, device=mask.device)
    weights = torch.where(counts > 0, weights, 0)
    return within * (weights * _reciprocal(counts) * _reciprocal(weights.sum()))[tasks]


def _per_token(ids: Tensor, mask: Tensor) -> Tensor:
    return ids[:, None].expand_as(mask) if ids.dim() == 1 else ids


def _example_ids(example_ids: Tensor | None, mask: Tensor) -> Tensor:
    return _per_token(torch.arange(len(mask), device=mask.device), mask) if example_ids is None else example_ids


def _sum_by(ids: Tensor, values: Tensor, size: int) -> Tensor:
    zeros = torch.zeros(size, dtype=torch.float64, device=values.device)
    return zeros.index_add(0, ids.flatten(), values.double().flatten())


def _reciprocal(denominator: Tensor) -> Tensor:
    """1 / denominator, and 0 for what is absent."""
    return torch.where(denominator > 0, 1 / denominator, 0)

"""Loss of the validation split, every example once, on all workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.training.dataset import TokenDataset
from stitch_ray.training.forward import ClassifierForward, Forward
from stitch_ray.training.losses import task_losses
from stitch_ray.training.plan import plan_validation


@dataclass(frozen=True, slots=True)
class ValidationLoss:
    """Nats a token, or the mean loss of a classifier: over all tasks, and of each (NaN: no validation example)."""

    loss: float
    tasks: NDArray[np.float64]
    examples: int


class Validation:
    """Measures a model on validation rows. Every method is called by all workers together."""

    def __init__(
        self,
        data: TokenDataset,
        config: FinetuneConfig,
        forward: Forward | ClassifierForward,
        device: torch.device,
    ) -> None:
        self._data = data
        self._config = config
        self._forward = forward
        self._device = device
        self._rows_of = [np.flatnonzero(data.task_ids == task) for task in range(len(config.tasks))]

    def __len__(self) -> int:
        return len(self._data)

    def loss(self, model: Callable[..., Any]) -> ValidationLoss:
        """Over the whole split."""
        tasks = self._measure(model, range(len(self._data)))
        return ValidationLoss(self._combined(tasks), tasks, len(self._data))

    def sample(self, model: Callable[..., Any], step: int, examples: int) -> NDArray[np.float64]:
        """Loss of each task over the next `examples` of its rows; which ones depends on `step` alone."""
        rows = [of[(step * examples + i) % len(of)] for of in self._rows_of if len(of) for i in range(examples)]
        return self._measure(model, sorted({int(row) for row in rows}))

    def _measure(self, model: Any, rows: Sequence[int]) -> NDArray[np.float64]:
        config = self._config
        chosen = np.asarray(rows, np.int64)
        batches = plan_validation(
            self._data.lengths[chosen],
            packing=config.packing,
            batch_tokens=config.batch_tokens,
            batch_examples=config.batch.examples,
        )
        rank, world_size = dist.get_rank(), dist.get_world_size()
        sums = torch.zeros(2, len(config.tasks), dtype=torch.float64, device=self._device)
        was_training = model.training
        model.eval()
        with torch.no_grad():
            # With weights shared out, all workers have to run the same number of forwards.
            for first in range(0, len(batches), world_size):
                mine = batches[first + rank] if first + rank < len(batches) else ()
                found = self._forward(model, self._data, [int(chosen[row]) for row in mine])
                losses, weights = task_losses(found.losses, found.weights, found.task_ids, len(config.tasks))
                sums += torch.stack((losses, weights)).double()
        model.train(was_training)
        dist.all_reduce(sums)
        losses, weights = sums.cpu().numpy()
        return np.divide(losses, weights, out=np.full(len(config.tasks), np.nan), where=weights > 0)

    def _combined(self, tasks: NDArray[np.float64]) -> float:
        """One number to compare checkpoints by: tasks weigh what they weigh in training, or by their tokens."""
        if self._config.loss in ("token_mean", "sample_mean"):
            weights = np.array([self._data.loss_weights[of].sum() for of in self._rows_of])
        else:
            weights = np.array([task.weight for task in self._config.tasks])
        there = np.isfinite(tasks) | np.array([len(of) > 0 for of in self._rows_of])
        return float(np.average(tasks[there], weights=weights[there])) if there.any() else float("nan")

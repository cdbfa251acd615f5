"""What the driver tells a training worker, what it hears back, and the plan both know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.training.plan import StepPlan, plan_steps

TRAIN, VALIDATION, METRICS, CHECKPOINTS = "train.arrow", "validation.arrow", "metrics.jsonl", "checkpoints"
"""Names in the folder of prepared data, and in the run folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJob:
    """What a worker is told. `folder` is the run folder, `data` the prepared data; all workers see both.

    `step_log` names a file outside the run to which every worker appends `step, slot, example ids`: an audit.
    """

    config: FinetuneConfig
    folder: Path
    data: Path
    step_log: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How training ended. `best_step` is the checkpoint with the lowest validation loss, if one was measured.

    `examples` are the ids of the micro-batches whose loss or gradient was not finite.
    """

    status: Literal["finished", "stopped_early", "not_finite"]
    step: int
    total_steps: int
    best_step: int | None = None
    best_loss: float | None = None
    examples: tuple[str, ...] = ()


def run_plan(config: FinetuneConfig, lengths: NDArray[np.int32], task_ids: NDArray[np.int32]) -> StepPlan:
    """The steps of the run that `config` asks for, over training examples of these lengths and tasks, both (rows,)."""
    return plan_steps(
        lengths,
        task_ids,
        epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        mixing=config.mixing,
        packing=config.packing,
        batch_tokens=config.batch_tokens,
        batch_examples=config.batch.examples,
        micro_batches=config.micro_batches,
    )

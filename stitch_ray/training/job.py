"""What the driver tells a training worker, what it hears back, and the plan both know."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.runs import write_json
from stitch_ray.training import checkpoints
from stitch_ray.training.plan import StepPlan, plan_steps

TRAIN, VALIDATION, METRICS, CHECKPOINTS = "train.arrow", "validation.arrow", "metrics.jsonl", "checkpoints"
"""Names in the folder of prepared data, and in the run folder."""

_OUTCOME = Path("work", "outcome.json")


@dataclass(frozen=True, slots=True)
class ClassifierHead:
    """Trains a sequence classifier with one output instead of a language model, on rows with labels in [0, 1].

    `loss`: bce, the cross-entropy of soft labels, or mse, regression. `train`: all weights, or those of the head alone,
    with the pooler of the model below where it has one: published encoders often come without a trained pooler.
    """

    loss: Literal["bce", "mse"]
    train: Literal["all", "head"] = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJob:
    """What a worker is told. `folder` is the run folder, `data` the prepared data; all workers see both.

    `classifier`: what kind of model it is unless it is a causal language model; the data then has labels, and `config`
    neither packing, adapters nor more than one task. `step_log` names a file outside the run to which every worker
    appends `step, slot, example ids`: an audit.
    """

    config: FinetuneConfig
    folder: Path
    data: Path
    classifier: ClassifierHead | None = None
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

    @classmethod
    def read(cls, folder: Path) -> Outcome | None:
        """What `write` left in a run folder; None: training has not ended."""
        file = folder / _OUTCOME
        return cls(**json.loads(file.read_text("utf-8"))) if file.exists() else None

    def write(self, folder: Path) -> None:
        """Remember it: a run that has one is not trained again."""
        write_json(folder / _OUTCOME, asdict(self))

    def model_step(self, config: FinetuneConfig) -> int:
        """The checkpoint that becomes the model: the best with early stopping, else the last."""
        return self.best_step if config.early_stopping and self.best_step is not None else self.step

    def checkpoint(self, folder: Path, step: int) -> Path:
        """The checkpoint of `step`. Raises RuntimeError for a damaged one, which the same command then replaces."""
        path = folder / CHECKPOINTS / checkpoints.name(step)
        damage = checkpoints.damage(path, step)
        if damage:
            (folder / _OUTCOME).unlink()
            newest = step == self.step
            remedy = "the same command goes on from the one before" if newest else "--overwrite trains anew"
            raise RuntimeError(f"checkpoint {path} is damaged: {damage}; {remedy}")
        return path

    def not_finite(self, learning_rate: str) -> FloatingPointError:
        """The error of a run that ended so. `learning_rate`: the key to lower."""
        shown = ", ".join(self.examples[:20]) + (", …" if len(self.examples) > 20 else "")
        return FloatingPointError(
            f"loss or gradient is not finite in step {self.step + 1} of {self.total_steps}; micro-batches with examples "
            f"{shown}. Lower {learning_rate}, or look at these examples; the same command resumes before that step"
        )


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

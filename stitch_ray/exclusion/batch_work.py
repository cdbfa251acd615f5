"""Batches of work on a pool of Ray Data actors: how the stages of EXAR that ask a model are run."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from stitch_ray.config.base import ModelConfig
from stitch_ray.runs import Progress, Step

log = logging.getLogger(__name__)

_MOST_BLOCKS = 1000


class BatchJob(Protocol):
    def is_done(self, batch_id: int) -> bool:
        """Whether nothing is left to do for the batch."""
        ...


class BatchActor(ABC):
    """A Ray Data actor; a subclass does one batch and returns how many rows it had and how many tokens they took."""

    @abstractmethod
    def do(self, batch_id: int) -> tuple[int, int]: ...

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = [self._report(int(number)) for number in batch["batch_id"]]
        return {key: np.array([row[key] for row in done]) for key in done[0]}

    def _report(self, batch_id: int) -> dict[str, Any]:
        """What was done, or why it failed: Ray Data wraps what a worker raises and loses the reason."""
        try:
            rows, tokens = self.do(batch_id)
        except Exception as error:
            log.exception("batch %d", batch_id)
            return {"rows": 0, "tokens": 0, "error": f"batch {batch_id}: {str(error) or type(error).__name__}"}
        return {"rows": rows, "tokens": tokens, "error": ""}


def run_batches(
    actor: type[BatchActor],
    job: BatchJob,
    model: ModelConfig,
    sizes: Sequence[int],
    progress: Progress,
    *,
    stage: str,
    unit: str,
) -> None:
    """Do the batches that are not done. sizes: rows of every batch. Raises RuntimeError for the first that fails."""
    pending = [batch for batch in range(len(sizes)) if not job.is_done(batch)]
    total, tokens = sum(sizes), 0
    done = total - sum(sizes[batch] for batch in pending)
    progress(Step(stage=stage, done=done, total=total, unit=unit))
    if not pending:
        return
    import ray.data

    items = [{"batch_id": batch} for batch in pending]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS)).map_batches(
        actor,
        batch_size=1,
        fn_constructor_args=(job,),
        compute=ray.data.ActorPoolStrategy(size=min(model.replicas, len(items))),
        num_cpus=model.num_threads,
        num_gpus=model.num_gpus,
    )
    for row in dataset.iter_rows():
        if row["error"]:
            raise RuntimeError(row["error"])
        done += int(row["rows"])
        tokens += int(row["tokens"])
        progress(Step(stage=stage, done=done, total=total, tokens=tokens, unit=unit))

"""Workers on Ray Train: placed, started, restarted after a loss, and resized.

Checkpoints go to the run folder by our own two-phase commit (`checkpoints.py`), not through `ray.train.report`: a
report that has returned is not yet durable, and a checkpoint here can be checked and fits any number of workers. What
Ray Train does is everything else.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stitch_ray.errors import UserError
from stitch_ray.training.job import Outcome, WorkerJob

_RESIZE_INTERVAL_S = float(os.environ.get("STITCH_RAY_RESIZE_INTERVAL_S", "60"))


@dataclass(frozen=True, slots=True)
class _Refused:
    """A UserError inside the workers. Returned, not raised: Ray Train would try again what cannot work."""

    message: str


def launch(job: WorkerJob) -> Outcome:
    """Train with the workers that `job.config` asks for, from the newest valid checkpoint on; needs a Ray session.

    Raises UserError for what only the user can change, RuntimeError when workers were lost more than
    `resources.max_failures` times.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    logging.getLogger("ray.train").setLevel(logging.ERROR)
    config = job.config
    resources = config.resources
    low, high = config.worker_range
    per_worker = {"CPU": float(resources.num_threads)}
    environment = {"OMP_NUM_THREADS": str(resources.num_threads), "TOKENIZERS_PARALLELISM": "false"}
    if resources.num_gpus:
        per_worker["GPU"] = resources.num_gpus
    else:
        environment["DS_ACCELERATOR"] = "cpu"
    trainer = TorchTrainer(
        _train,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if resources.num_gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=high if low == high else (low, high),
            use_gpu=bool(resources.num_gpus),
            resources_per_worker=per_worker,
            elastic_resize_monitor_interval_s=_RESIZE_INTERVAL_S,
        ),
        run_config=RunConfig(
            # A name of its own: what a run resumes from is in `checkpoints/`, never in Ray's memory of an earlier one.
            name=f"train-{uuid.uuid4().hex[:8]}",
            storage_path=str(job.folder / "work" / "ray"),
            failure_config=FailureConfig(max_failures=resources.max_failures),
            worker_runtime_env={"env_vars": environment},
        ),
    )
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        result = trainer.fit()
    except SystemExit:  # how Ray Train ends on Ctrl-C, with the exit code of success
        raise KeyboardInterrupt from None
    except TrainingFailedError as error:
        restarts = f"no restart is left (resources.max_failures: {resources.max_failures})"
        raise RuntimeError(f"training failed and {restarts}: {_cause(error)}") from error
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray Train leaves its own handler behind
            signal.signal(signal.SIGINT, on_interrupt)
    if isinstance(result.return_value, _Refused):
        raise UserError(result.return_value.message)
    assert isinstance(result.return_value, Outcome)
    return result.return_value


def _train(settings: Mapping[str, Any]) -> Outcome | _Refused:
    """What a Ray Train worker runs."""
    import ray.train

    from stitch_ray.training.worker import Worker

    try:
        return Worker(settings["job"], report=lambda metrics: ray.train.report(dict(metrics))).train()
    except UserError as error:
        return _Refused(str(error))


def _cause(error: BaseException) -> str:
    """Why the workers failed the last time, in one line. The others fail as well when one of them dies."""
    from ray.exceptions import RayActorError

    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in failures.items():
        if isinstance(getattr(failure, "health_check_failure", failure), RayActorError):
            return f"worker {rank} died: killed, out of memory, or lost with its node"
    first = next(iter(failures.values()), error)
    last = [line for line in str(first).strip().splitlines() if line.strip()]
    return last[-1] if last else type(first).__name__

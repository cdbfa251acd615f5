"""Single awaited requests under vLLM, each joining the running batch as it arrives."""

from __future__ import annotations

from contextlib import suppress
from itertools import count
from typing import Any

from stitch_ray.engines.base import EngineError
from stitch_ray.engines.threaded import Job, JobQueue, ThreadedEngine, closed, crashed
from stitch_ray.engines.vllm_core import has_nan, refusals
from stitch_ray.engines.vllm_engine import VllmEngine
from stitch_ray.engines.vllm_requests import Prepared


class AsyncVllmEngine(ThreadedEngine):
    """An `AsyncEngine` over `engine`, with the meaning of its methods and continuous batching.

    A request takes part from the next step on, so that a short one overtakes a long one; vLLM's own scheduler decides
    how many run at a time. A cancelled request is aborted. A `call`, and requests whose outputs hold NaN, wait until
    nothing else runs; what comes after them waits too.
    """

    def __init__(self, engine: VllmEngine) -> None:
        super().__init__(engine, lambda jobs: _Steps(engine, jobs).serve())


class _Steps:
    def __init__(self, engine: VllmEngine, jobs: JobQueue) -> None:
        self._engine = engine
        self._jobs = jobs
        self._ids = count()
        self._running: dict[str, tuple[Job, Prepared[Any]]] = {}
        self._suspects: list[tuple[Job, Prepared[Any]]] = []

    def serve(self) -> None:
        try:
            while self._admit():
                try:
                    self._step()
                    if self._suspects and not self._running:
                        self._run_again()
                except Exception as error:
                    self._drop(error)
        finally:
            for job in self._taken():
                job.fail(closed(job))

    def _admit(self) -> bool:
        """Take what may start now; False: the queue is closing."""
        jobs = self._jobs
        admitted: list[Job] = []
        with jobs.changed:
            jobs.changed.wait_for(lambda: jobs.closing or jobs.waiting or self._running)
            if jobs.closing:
                return False
            while jobs.waiting and not self._suspects:
                alone = jobs.waiting[0].work is not None
                if alone and (self._running or admitted):
                    break
                admitted.append(jobs.waiting.popleft())
                if alone:
                    break
            left = [name for name, (job, _) in self._running.items() if job.cancelled]
        if left:
            self._engine.core.abort(left)
        for name in left:
            del self._running[name]
        for job in admitted:
            if job.work is not None:
                job.call()
            else:
                self._start(job)
        return True

    def _start(self, job: Job) -> None:
        assert job.request is not None
        name = str(next(self._ids))
        try:
            prepared: Prepared[Any] = getattr(self._engine.requests, job.method)(job.request)
            self._engine.core.add(name, prepared.ids, prepared.params)
        except refusals() as error:
            job.fail(job.error(str(error)))
        except Exception as error:
            job.fail(crashed(job, error))
        else:
            self._running[name] = job, prepared

    def _step(self) -> None:
        for output in self._engine.core.step() if self._running else ():
            job, prepared = self._running.pop(output.request_id)
            if has_nan(output):
                self._suspects.append((job, prepared))
            else:
                _tell(job, prepared, output)

    def _run_again(self) -> None:
        """See `VllmCore`."""
        wanted = [(job, prepared) for job, prepared in self._suspects if not job.cancelled]
        outputs = self._engine.core.run_again([(prepared.ids, prepared.params) for _, prepared in wanted])
        for (job, prepared), output in zip(wanted, outputs, strict=True):
            _tell(job, prepared, output)
        self._suspects = []

    def _drop(self, error: Exception) -> None:
        """vLLM failed: fail all that it was working on, and leave none of it behind."""
        for job in self._taken():
            job.fail(crashed(job, error))
        with suppress(Exception):  # it has failed once already
            self._engine.core.abort(list(self._running))
        self._running, self._suspects = {}, []

    def _taken(self) -> list[Job]:
        return [job for job, _ in (*self._running.values(), *self._suspects)]


def _tell(job: Job, prepared: Prepared[Any], output: Any) -> None:
    try:
        job.settle(prepared.read(output))
    except EngineError as error:
        job.fail(error)
    except ValueError as error:
        job.fail(job.error(str(error)))

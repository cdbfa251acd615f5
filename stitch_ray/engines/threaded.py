"""A synchronous engine behind a thread of its own, as an `AsyncEngine`; how the thread works is given as a function."""

from __future__ import annotations

import asyncio
import threading
from asyncio import AbstractEventLoop, Future
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from stitch_ray.engines.base import EngineError, EngineInfo, Generation, LoadedEngine, Request, TokenStatistics
from stitch_ray.errors import UserError

T = TypeVar("T")
Method = Literal["generate", "loglikelihood", "token_statistics", "call"]


class ThreadedEngine:
    """One awaited request at a time over `engine`, which only the thread of this object uses from now on.

    `serve(jobs)` runs in the thread, answers the jobs it takes from the queue, and returns when the queue is closing.
    `info` is read from the engine at every access, for adapters come and go. Requests may come from any event loop.
    """

    def __init__(self, engine: LoadedEngine, serve: Callable[[JobQueue], None]) -> None:
        self._engine = engine
        self._jobs = JobQueue()
        self._serve = serve
        self._thread = threading.Thread(target=self._run, name=f"engine {engine.info.model}", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def waiting(self) -> int:
        """Requests that the thread has not taken yet."""
        return len(self._jobs.waiting)

    async def generate(self, request: Request) -> list[Generation]:
        answers: list[Generation] = await self._jobs.submit("generate", request)
        return answers

    async def loglikelihood(self, request: Request) -> tuple[float, bool]:
        total, greedy = await self._jobs.submit("loglikelihood", request)
        return total, greedy

    async def token_statistics(self, request: Request) -> TokenStatistics:
        statistics: TokenStatistics = await self._jobs.submit("token_statistics", request)
        return statistics

    async def stream(self, request: Request) -> AsyncIterator[str]:
        """The whole answer in one piece, once it is there."""
        if request.sampling.num_samples != 1:
            raise EngineError(request.request_id, "a stream has one answer; set num_samples to 1")
        for answer in await self.generate(request):
            yield answer.text

    async def call(self, work: Callable[[Any], T]) -> T:
        """`work(engine)` in the engine's thread, in its turn, with nothing else under way. Raises what `work` does."""
        result: T = await self._jobs.submit("call", None, lambda: work(self._engine))
        return result

    async def close(self) -> None:
        """Leave off what is under way, fail what waits, and close the engine. May be called twice."""
        self._jobs.close()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        try:
            self._serve(self._jobs)
        finally:  # were `serve` to fail, nobody should wait for it
            self._jobs.close()
            for job in self._jobs.waiting:
                job.fail(closed(job))
            self._jobs.waiting.clear()
            self._engine.close()


@dataclass(eq=False, slots=True)
class Job:
    """What one caller waits for: a request, or `work` for a call. `cancelled`: the caller has left."""

    method: Method
    request: Request | None
    work: Callable[[], Any] | None
    loop: AbstractEventLoop
    future: Future[Any]
    cancelled: bool = False

    def error(self, reason: str, *, retryable: bool = False) -> EngineError:
        return EngineError(self.request.request_id if self.request is not None else "call", reason, retryable=retryable)

    def settle(self, result: Any) -> None:
        self._tell(lambda: self.future.set_result(result))

    def fail(self, error: BaseException) -> None:
        self._tell(lambda: self.future.set_exception(error))

    def call(self) -> None:
        """Do the work of a call."""
        assert self.work is not None
        try:
            self.settle(self.work())
        except Exception as error:
            self.fail(error)

    def _tell(self, tell: Callable[[], None]) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody listens
            self.loop.call_soon_threadsafe(lambda: None if self.future.done() else tell())


class JobQueue:
    """Jobs that wait for the thread, oldest first. `waiting` and `closing` change only while `changed` is held."""

    def __init__(self) -> None:
        self.waiting: deque[Job] = deque()
        self.closing = False
        self.changed = threading.Condition()

    async def submit(self, method: Method, request: Request | None, work: Callable[[], Any] | None = None) -> Any:
        """The result of a new job. A caller that is cancelled takes it out of the queue, or marks it."""
        loop = asyncio.get_running_loop()
        job = Job(method, request, work, loop, loop.create_future())
        with self.changed:
            if self.closing:
                raise closed(job)
            self.waiting.append(job)
            self.changed.notify()
        try:
            return await job.future
        except asyncio.CancelledError:
            with self.changed:
                job.cancelled = True
                if job in self.waiting:
                    self.waiting.remove(job)
            raise

    def close(self) -> None:
        with self.changed:
            self.closing = True
            self.changed.notify()


def closed(job: Job) -> EngineError:
    return job.error("the engine is closed", retryable=True)


def crashed(job: Job, error: Exception) -> EngineError:
    """What an engine's exception means to a caller: another attempt may do, unless the user has to change something."""
    if isinstance(error, UserError):
        return job.error(str(error))
    return job.error(f"the engine failed: {type(error).__name__}: {error}", retryable=True)

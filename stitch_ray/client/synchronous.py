"""The client for threads: an AsyncClient on an event loop of its own."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from stitch_ray.client.asynchronous import AsyncClient, Event
from stitch_ray.client.errors import ApiError
from stitch_ray.client.reply import Reply

T = TypeVar("T")


class Client:
    """As AsyncClient, for any number of threads at a time; close it, or use it with `with`. Not for forked processes.

    A call that is interrupted (Ctrl-C) is cancelled on the server too.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", **options: Any) -> None:
        self._client = AsyncClient(url, **options)
        self.url = self._client.url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="stitch-ray-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Further calls raise RuntimeError."""
        if self._loop.is_closed():
            return
        self._run(self._client.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def predict(self, question: str, *, request_id: str | None = None, **options: Any) -> Reply:
        """As AsyncClient.predict."""
        return self._run(self._client.predict(question, request_id=request_id, **options))

    def predict_batch(
        self, questions: Sequence[str | Mapping[str, Any]], *, request_id: str | None = None
    ) -> list[Reply | ApiError]:
        """As AsyncClient.predict_batch."""
        return self._run(self._client.predict_batch(questions, request_id=request_id))

    def stream(self, question: str, *, request_id: str | None = None, **options: Any) -> Iterator[Event]:
        """As AsyncClient.stream."""
        events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async for event in self._client.stream(question, request_id=request_id, **options):
                    events.put(event)
            finally:
                events.put(None)

        work = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while (event := events.get()) is not None:
                yield event
            work.result()
        finally:
            work.cancel()

    def score(self, question: str, answer: str, *, context: str | None = None, task: str | None = None) -> float | None:
        """As AsyncClient.score."""
        return self._run(self._client.score(question, answer, context=context, task=task))

    def feedback(self, id: str, correct: bool) -> None:
        """As AsyncClient.feedback."""
        self._run(self._client.feedback(id, correct))

    def policy(self) -> dict[str, Any]:
        """As AsyncClient.policy."""
        return self._run(self._client.policy())

    def curve(self, task: str | None = None) -> dict[str, Any]:
        """As AsyncClient.curve."""
        return self._run(self._client.curve(task))

    def models(self) -> list[str]:
        """As AsyncClient.models."""
        return self._run(self._client.models())

    def health(self) -> dict[str, Any]:
        """As AsyncClient.health."""
        return self._run(self._client.health())

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the client is closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

"""The scorer in this process: calls that come while it reads share its next forward."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from stitch_ray.ensemble.asking import asked
from stitch_ray.ensemble.types import Question
from stitch_ray.reliability.scorer.batched import ScoreRequest, score_requests
from stitch_ray.reliability.scorer.combined import ReliabilityScorer

LARGEST_BATCH = 32

_Waiting = tuple[ScoreRequest, "asyncio.Future[dict[str, Any]]"]


class GatheredScoring:
    """One forward at a time, in a thread; no call waits for a batch to fill. To be used from one event loop."""

    def __init__(self, scorer: ReliabilityScorer, *, largest_batch: int = LARGEST_BATCH) -> None:
        self._scorer = scorer
        self._largest_batch = largest_batch
        self._waiting: list[_Waiting] = []
        self._reading: asyncio.Task[None] | None = None

    async def score(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """As `score_requests`, of one request. Raises ValueError for a request that is none."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append((ScoreRequest.parse(request), future))
        if self._reading is None:
            self._reading = asyncio.create_task(self._read())
        return await future

    async def _read(self) -> None:
        try:
            while self._waiting:
                batch = [one for one in self._waiting[: self._largest_batch] if not one[1].done()]
                del self._waiting[: self._largest_batch]
                if batch:
                    await self._read_batch(batch)
        finally:
            self._reading = None

    async def _read_batch(self, batch: list[_Waiting]) -> None:
        try:
            found = await asyncio.to_thread(score_requests, self._scorer, [request for request, _ in batch])
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
            return
        for (_, future), one in zip(batch, found, strict=True):
            if not future.done():
                future.set_result(one)


class LocalScorer:
    """A scorer that is loaded here. `signals`: what it must be given."""

    def __init__(self, scorer: ReliabilityScorer) -> None:
        self.fingerprint = scorer.fingerprint
        self.signals = scorer.signals
        self._scoring = GatheredScoring(scorer)

    async def score(self, question: Question, text: str, signals: Mapping[str, float | None]) -> float | None:
        shown = asked(question)
        request = {"question": shown.question, "answer": text, "context": shown.context, "signals": dict(signals)}
        found: float | None = (await self._scoring.score(request))["confidence"]
        return found

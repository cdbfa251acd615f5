"""The way of one question through an ensemble: what was found so far, what it cost, and what is told about it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

from stitch_ray.ensemble.budget import Budget
from stitch_ray.ensemble.types import Emit, Event, Limits, Prediction, Question

T = TypeVar("T")


class Passage:
    """Filled by the predictor, stage by stage. Times are in seconds, those of a stage since the one before it."""

    def __init__(self, question: Question, limits: Limits, emit: Emit | None) -> None:
        self.question = question
        self.budget = Budget(limits)
        self.target_risk: float | None = None
        self.draft: str | None = None
        self.draft_score: float | None = None
        self.draft_confidence: float | None = None
        self.refined: str | None = None
        self.final_confidence: float | None = None
        self._emit = emit
        self._trace: list[Mapping[str, Any]] = []
        self._began = self._since = time.monotonic()

    @property
    def seconds(self) -> float:
        return round(time.monotonic() - self._began, 6)

    async def timed(self, work: Awaitable[T]) -> T:
        """The result of `work`, within the deadline."""
        return await self.budget.wait_for(work)

    def note(self, stage: str, **facts: Any) -> Mapping[str, Any]:
        """Add a stage to the trace."""
        now = time.monotonic()
        entry = {"stage": stage, "seconds": round(now - self._since, 6), **facts}
        self._since = now
        self._trace.append(entry)
        return entry

    async def begin(self, stage: str, **facts: Any) -> None:
        """Tell that a stage begins, which is no part of the trace."""
        await self._send(Event("stage", {"stage": stage, **facts}))

    async def tell(self, stage: str, **facts: Any) -> None:
        """Add a stage to the trace and tell of it."""
        await self._send(Event("stage", self.note(stage, **facts)))

    async def pass_on(self, event: Event) -> None:
        """An event of the route. Its turns are stages of the trace."""
        if event.kind == "turn":
            self._trace.append({"stage": "turn", **event.data})
            self._since = time.monotonic()
        await self._send(event)

    def closed_trace(self, **decision: Any) -> tuple[Mapping[str, Any], ...]:
        """The trace, the decision being its last stage."""
        self.note("decision", **decision)
        return tuple(self._trace)

    async def finish(self, prediction: Prediction) -> None:
        """Tell the end, which is due however late it is."""
        if self._emit is not None:
            await self._emit(Event("final", prediction.to_dict()))

    async def _send(self, event: Event) -> None:
        if self._emit is not None:
            await self.budget.wait_for(self._emit(event))

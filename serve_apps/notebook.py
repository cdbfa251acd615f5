"""What a gateway tells the recorder: gathered, so that no request waits for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import Any

from serve_apps.calls import ServeCall
from serve_apps.meters import GatewayMeters
from serve_apps.recorder import SETTLES_S
from serve_apps.web.bodies import FeedbackBody
from serve_apps.web.errors import ApiError, unavailable
from serve_apps.web.service import Active
from stitch_ray.engines.base import EngineError
from stitch_ray.ensemble.serving.book import Entry
from stitch_ray.ensemble.types import Prediction

logger = logging.getLogger("ray.serve")

EVERY_S = 0.2
_MOST_UNSENT = 10_000
_LARGEST_MESSAGE = 500
_LOOKS = 3
_PATIENCE_S = SETTLES_S + 1.0


class Notebook:
    """The service's watcher. While the recorder is away rows wait here, the oldest of too many are dropped, and counted."""

    def __init__(self, recorder: ServeCall, meters: GatewayMeters, *, review_texts: bool) -> None:
        self._recorder = recorder
        self._meters = meters
        self._review_texts = review_texts
        self._unsent: deque[dict[str, Any]] = deque()
        self._dropped = 0
        self._sending = asyncio.Lock()
        self._tasks: frozenset[str] = frozenset()
        self._active: Active | None = None

    @property
    def unsent(self) -> int:
        return len(self._unsent)

    def use(self, active: Active) -> None:
        self._active = active
        self._tasks = frozenset(target.task for target in active.policy.targets if target.task is not None)

    def answered(self, prediction: Prediction) -> None:
        self._meters.answer(prediction, self._tasks)
        row: dict[str, Any] = {
            "entry": Entry.of(prediction).to_dict(),
            "draft_confidence": prediction.draft_confidence,
        }
        if self._review_texts and prediction.decision == "abstain":
            names = ("question", "context", "draft", "refined")
            row["texts"] = {name: getattr(prediction, name) for name in names}
        self._unsent.append(row)
        if len(self._unsent) > _MOST_UNSENT:
            self._unsent.popleft()
            self._dropped += 1

    async def labelled(self, label: FeedbackBody) -> dict[str, Any]:
        """Raises ApiError 404, 409 or 503.

        An answer of another gateway may still be on its way: asked for some times, and for longer while the recorder has
        only just come back, since then gateways have answers waiting.
        """
        await self.send()
        looks, ends = 0, time.monotonic() + _PATIENCE_S
        while True:
            found = await self._label(label)
            looks += 1
            unknown = found["status"] == "unknown" and looks < _LOOKS
            not_told_yet = found["status"] == "not_told_yet" and time.monotonic() < ends
            if not unknown and not not_told_yet:
                break
            await asyncio.sleep(2 * EVERY_S)
        if found["status"] == "not_told_yet":
            raise unavailable(f"{found['message']}, but the recorder has only just started again")
        if found["status"] == "unknown":
            raise ApiError(404, "not_found", found["message"])
        if found["status"] == "conflict":
            raise ApiError(409, "conflict", found["message"])
        return {"id": label.id, "recorded": True}

    async def send(self) -> None:
        """Tell the recorder what it does not know yet. What it does not take stays."""
        async with self._sending:  # who labels an answer waits for the message that may hold it
            await self._send()
        if self._dropped:
            logger.warning("%d answers were never told to the recorder", self._dropped)
            self._dropped = 0

    async def _send(self) -> None:
        while self._unsent and self._active is not None:
            rows = [self._unsent.popleft() for _ in range(min(len(self._unsent), _LARGEST_MESSAGE))]
            policy = {"version": self._active.policy.version, "path": self._active.path}
            try:
                await self._recorder("record", policy, rows)
            except EngineError as error:
                self._unsent.extendleft(reversed(rows))
                logger.warning("the recorder cannot be reached: %d answers wait (%s)", len(self._unsent), error.reason)
                return
            except asyncio.CancelledError:
                self._unsent.extendleft(reversed(rows))
                raise
            except Exception as error:
                logger.error("the recorder refused %d answers (%s)", len(rows), type(error).__name__)

    async def _label(self, label: FeedbackBody) -> dict[str, Any]:
        try:
            found: dict[str, Any] = await self._recorder("label", label.id, label.correct)
        except EngineError as error:
            raise unavailable(error.reason) from error
        return found

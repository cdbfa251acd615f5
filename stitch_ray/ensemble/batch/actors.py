"""Pools of Ray actors behind the calls that a predictor makes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

MAX_RESTARTS = 8
"""Of one actor. A question that takes its actor down every time ends the job after so many."""

_PATIENCE_S = 900.0
"""How long a call waits for an actor that is being started again: loading a large model takes minutes."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 2.0


class PoolLost(RuntimeError):
    """No actor of a pool is left, or none came back in time."""


class ActorPoolCall:
    """`await call("method", ...)` on the least busy actor; on another, or on the same once it is back, if it died.

    What the method raises comes as it is. `lost` says why the pool gave up, None while it works: whoever reads results
    must look, for a predictor takes a pool that is gone for a model that fails. Raises PoolLost.
    """

    def __init__(self, name: str, actors: Sequence[Any]) -> None:
        self._name = name
        self._actors = list(actors)
        self._busy = [0] * len(actors)
        self._away = [0.0] * len(actors)  # time until which an actor is not tried, infinite if it is dead
        self.lost: str | None = None

    async def __call__(self, method: str, *args: Any, **kwargs: Any) -> Any:
        gives_up = time.monotonic() + _PATIENCE_S
        pause = _FIRST_PAUSE_S
        while True:
            slot = await self._free_slot()
            try:
                return await self._ask(slot, method, args, kwargs)
            except RayTaskError as error:
                raise error.cause from None
            except ActorDiedError as error:
                self._away[slot] = float("inf")
                reason = str(error).strip().splitlines()[0]
            except RayActorError as error:
                self._away[slot] = time.monotonic() + pause
                reason = str(error).strip().splitlines()[0]
            if min(self._away) == float("inf") or time.monotonic() > gives_up:
                self.lost = f"{self._name}: {reason}"
                raise PoolLost(self.lost)
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    async def _free_slot(self) -> int:
        """The least busy of the actors that are not away; waits for the first that is due back if all are."""
        while True:
            now = time.monotonic()
            here = [slot for slot, until in enumerate(self._away) if until <= now]
            if here:
                return min(here, key=lambda slot: self._busy[slot])
            due = min(self._away)
            if due == float("inf"):
                raise PoolLost(self.lost or f"{self._name}: all its actors died")
            await asyncio.sleep(due - now)

    async def _ask(self, slot: int, method: str, args: Any, kwargs: Any) -> Any:
        self._busy[slot] += 1
        reference = getattr(self._actors[slot], method).remote(*args, **kwargs)
        try:
            return await reference
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        finally:
            self._busy[slot] -= 1

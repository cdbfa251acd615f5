"""Which members answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

from serve_apps.calls import ServeCall

_FOR_S = 1.0
_TIMEOUT_S = 2.0


class Health:
    """Asks every member, at most once a second. Ready: the first, which is the primary, and the scorer answer."""

    def __init__(self, calls: Mapping[str, ServeCall]) -> None:
        self._calls = calls
        self._needed = {next(iter(calls)), "scorer"}
        self._looking = asyncio.Lock()
        self._members: dict[str, bool] = {}
        self._at = float("-inf")

    async def look(self) -> tuple[dict[str, bool], bool]:
        """Member -> whether it answers, and whether questions can be answered."""
        async with self._looking:
            if time.monotonic() - self._at > _FOR_S:
                found = await asyncio.gather(*(_answers(call) for call in self._calls.values()))
                self._members = dict(zip(self._calls, found, strict=True))
                self._at = time.monotonic()
        return self._members, all(self._members[name] for name in self._needed)


async def _answers(call: ServeCall) -> bool:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            await call("describe")
    except Exception:
        return False
    return True

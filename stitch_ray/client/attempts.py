"""Which failures of a call are tried again, and how long a call may take."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from stitch_ray.client.errors import ApiError, TimedOut, Unreachable
from stitch_ray.client.protocol import BUSY, Call, Lost
from stitch_ray.retry_after import retry_after_s

T = TypeVar("T")


class Attempts:
    """The attempts of one call; its time begins now.

    429, 503 and replies that did not arrive whole are tried again; other errors would only come again. Before attempt
    k + 1 it waits a random part of `first_wait_s` * 2^(k-1) seconds, at most `longest_wait_s`, so that the clients of a
    server that comes back do not all return at once; after a Retry-After for that long and a random bit more.
    """

    def __init__(
        self,
        call: Call,
        *,
        timeout_s: float,
        max_retries: int,
        first_wait_s: float = 0.2,
        longest_wait_s: float = 10.0,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._call, self._timeout_s, self._max_retries, self._draw = call, timeout_s, max_retries, draw
        self._first_wait_s, self._longest_wait_s = first_wait_s, longest_wait_s
        self._ends = time.monotonic() + timeout_s
        self._made = 0
        self._last: Exception | None = None

    async def in_time(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when the call's time is up. Raises TimedOut then."""
        try:
            async with asyncio.timeout(max(0.0, self._ends - time.monotonic())):
                return await work
        except TimeoutError as error:
            before = f"; before that: {self._last}" if self._last else ""
            raise TimedOut(
                f"no reply within {self._timeout_s:g} s{before} (request {self._call.request_id})"
            ) from error

    def wait_s(self, failure: ApiError | Lost, retry_after: str | None = None) -> float:
        """Seconds until the next attempt; raises what the caller is to see if there is none."""
        self._made += 1
        self._last = failure
        if isinstance(failure, ApiError) and failure.status not in BUSY:
            raise failure
        asked = retry_after_s(retry_after)
        most = min(self._longest_wait_s, self._first_wait_s * 2 ** (self._made - 1))
        wait_s = self._draw() * most if asked is None else asked + self._draw() * self._first_wait_s
        if self._made > self._max_retries or wait_s >= self._ends - time.monotonic():
            raise failure if isinstance(failure, ApiError) else unreachable(self._call, failure, self._made)
        return wait_s


def unreachable(call: Call, failure: Lost, attempts: int) -> Unreachable:
    times = f"{attempts} attempt{'s' if attempts > 1 else ''}"
    return Unreachable(f"{failure} ({times}, request {call.request_id})")

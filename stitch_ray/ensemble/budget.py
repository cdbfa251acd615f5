"""What is left of an answer's calls, tokens and time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

from stitch_ray.ensemble.types import Limits

T = TypeVar("T")


class BudgetExceeded(Exception):
    """The next call would exceed `max_calls`, or the last one exceeded `max_tokens`."""


class DeadlineExceeded(Exception):
    """No time is left."""


class Budget:
    """Counts one answer's calls and tokens, and keeps its deadline. `calls` and `tokens` are what was spent."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.calls = 0
        self.tokens = 0
        self._ends = time.monotonic() + limits.deadline_s

    @property
    def seconds_left(self) -> float:
        return self._ends - time.monotonic()

    def spend(self, calls: int, tokens: int) -> None:
        self.calls += calls
        self.tokens += tokens

    def check(self, calls: int = 1) -> None:
        """Raises BudgetExceeded or DeadlineExceeded if `calls` further calls must not be made."""
        if self.seconds_left <= 0:
            raise DeadlineExceeded(f"no answer within {self.limits.deadline_s:g} s")
        if self.calls + calls > self.limits.max_calls:
            raise BudgetExceeded(f"an answer may take {self.limits.max_calls} calls")
        if self.tokens >= self.limits.max_tokens:
            raise BudgetExceeded(f"an answer may take {self.limits.max_tokens} tokens, and took {self.tokens}")

    async def wait_for(self, work: Awaitable[T]) -> T:
        """The result of `work`, which is cancelled when no time is left. Raises DeadlineExceeded then."""
        try:
            async with asyncio.timeout(max(0.0, self.seconds_left)) as scope:
                return await work
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise DeadlineExceeded(f"no answer within {self.limits.deadline_s:g} s") from error

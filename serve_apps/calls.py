"""Calls of another deployment, repeated where a replica died or was busy. What a predictor sees of Ray Serve."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from stitch_ray.engines.base import EngineError

ATTEMPTS_DEAD = 6
ATTEMPTS_BUSY = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0

OnRetry = Callable[[str, str], None]
"""(member, cause): called before a call is repeated."""


class Overloaded(EngineError):
    """The replicas have as much to do as they may have waiting. `retry_after_s`: when it may be worth asking again."""

    retry_after_s = 1.0

    def __init__(self, member: str) -> None:
        super().__init__(member, "every replica is busy and the queue is full", retryable=True)


class MemberUnavailable(EngineError):
    """No replica could be reached, however often it was tried."""

    def __init__(self, member: str, cause: str) -> None:
        super().__init__(member, f"no replica could be reached ({cause})", retryable=True)


class WrongVersion(RuntimeError):
    """The replica holds another version of the model than the caller was checked for."""


class ServeCall:
    """`await call("method", ...)` on the deployment behind `handle`, which has `call(version, method, arguments)`.

    A call whose replica dies is made again on another, one that meets full queues after a short pause; both a bounded
    number of times, and never beyond the deadline, since the caller cancels. Cancelling cancels the call on the replica.
    `version` is set once it is known: a replica of another version refuses, so that within one answer versions never mix.
    `outdated`: the last call found none of its version any more, only replicas of another.
    Raises what the method raised (not wrapped by Ray), Overloaded or MemberUnavailable.
    """

    def __init__(
        self, handle: DeploymentHandle, member: str, *, retry: bool = True, on_retry: OnRetry = lambda *_: None
    ) -> None:
        self.version: str | None = None
        self.outdated = False
        # Options make a new handle, which is no small part of a call; what the members exchange needs no cloudpickle.
        self._handle = handle.options(
            method_name="call", request_serialization="pickle", response_serialization="pickle"
        )
        self._member = member
        self._retry = retry
        self._on_retry = on_retry

    async def __call__(self, method: str, *args: Any, adapter: str | None = None) -> Any:
        """`adapter`: goes, as far as possible, to a replica that has it in memory, which finds it in the request."""
        handle = self._handle if adapter is None else self._handle.options(multiplexed_model_id=adapter)
        dead = busy = 0
        while True:
            try:
                found = await self._once(handle, method, args)
                self.outdated = False
                return found
            except BackPressureError as error:
                busy += 1
                if not self._retry or busy >= ATTEMPTS_BUSY:
                    raise Overloaded(self._member) from error
                cause, tries = "busy", busy
            except (ActorUnavailableError, RayActorError, DeploymentUnavailableError, WrongVersion) as error:
                dead += 1
                cause, tries = type(error).__name__, dead
                if not self._retry or dead >= ATTEMPTS_DEAD:
                    self.outdated = isinstance(error, WrongVersion)
                    raise MemberUnavailable(self._member, cause) from error
            self._on_retry(self._member, cause)
            await asyncio.sleep(_pause(tries))

    async def _once(self, handle: DeploymentHandle, method: str, args: tuple[Any, ...]) -> Any:
        response = handle.remote(self.version, method, args)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError as error:
            # as_instanceof_cause hides the class of an exception that cannot be subclassed or has its own arguments.
            if isinstance(error.cause, Exception):
                raise error.cause from None
            raise


def _pause(tries: int) -> float:
    """Seconds, with jitter so that all callers of a dead replica do not come back at once."""
    longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (tries - 1))
    return longest * random.uniform(0.5, 1.0)

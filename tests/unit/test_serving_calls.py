"""Calls of members: what is made again, what is told at once, and what the caller gets to see."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError

from serve_apps import calls
from serve_apps.calls import ATTEMPTS_BUSY, ATTEMPTS_DEAD, MemberUnavailable, Overloaded, ServeCall, WrongVersion
from stitch_ray.engines.base import EngineError

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")


class Response:
    def __init__(self, outcome: Any) -> None:
        self._outcome = outcome
        self.cancelled = False

    def __await__(self) -> Any:
        return self._give().__await__()

    async def _give(self) -> Any:
        if self._outcome is None:
            await asyncio.Event().wait()
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return self._outcome

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """Gives `outcomes` one after the other, the last for ever; None: no answer at all."""

    def __init__(self, *outcomes: Any) -> None:
        self._outcomes = list(outcomes)
        self.responses: list[Response] = []
        self.asked: list[Any] = []
        self.model_ids: list[str] = []

    def options(self, *, multiplexed_model_id: str | None = None, **_: str) -> Handle:
        if multiplexed_model_id is not None:
            self.model_ids.append(multiplexed_model_id)
        return self

    def remote(self, *what: Any) -> Response:
        self.asked.append(what)
        outcome = self._outcomes.pop(0) if len(self._outcomes) > 1 else self._outcomes[0]
        self.responses.append(Response(outcome))
        return self.responses[-1]


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "FIRST_PAUSE_S", 0.0)


def wrapped(cause: Exception) -> RayTaskError:
    return RayTaskError("call", "a traceback", cause)


def made(handle: Handle, **options: Any) -> ServeCall:
    return ServeCall(handle, "primary", **options)  # type: ignore[arg-type]


def test_a_call_whose_replica_dies_is_made_again_and_counted() -> None:
    handle, retries = Handle(ActorDiedError(), ActorDiedError(), "answer"), []
    call = made(handle, on_retry=lambda *what: retries.append(what))
    call.version = "v1"
    assert asyncio.run(call("answer", "question", adapter="math")) == "answer"
    assert handle.asked == [("v1", "answer", ("question",))] * 3
    assert (retries, handle.model_ids) == ([("primary", "ActorDiedError")] * 2, ["math"])


@pytest.mark.parametrize(
    ("outcome", "attempts", "raised"),
    [
        (ActorDiedError(), ATTEMPTS_DEAD, MemberUnavailable),
        (wrapped(WrongVersion("other")), ATTEMPTS_DEAD, MemberUnavailable),
        (BackPressureError(5, 5), ATTEMPTS_BUSY, Overloaded),
        (wrapped(EngineError("x", "too long")), 1, EngineError),
        (wrapped(ValueError("no request")), 1, ValueError),
    ],
)
def test_calls_are_made_again_a_bounded_number_of_times_and_mistakes_never(
    outcome: Exception, attempts: int, raised: type[Exception]
) -> None:
    handle = Handle(outcome)
    with pytest.raises(raised) as caught:
        asyncio.run(made(handle)("answer"))
    assert type(caught.value) is raised
    assert len(handle.asked) == attempts


def test_members_that_went_over_to_another_version_are_noticed_and_those_that_died_are_not() -> None:
    for outcome, outdated in ((wrapped(WrongVersion("other")), True), (ActorDiedError(), False)):
        call = made(Handle(*[outcome] * ATTEMPTS_DEAD, "answer"))
        with pytest.raises(MemberUnavailable):
            asyncio.run(call("answer"))
        assert call.outdated == outdated
        assert asyncio.run(call("answer")) == "answer"
        assert not call.outdated


def test_without_fault_tolerance_nothing_is_made_again() -> None:
    handle = Handle(ActorDiedError(), "answer")
    with pytest.raises(MemberUnavailable):
        asyncio.run(made(handle, retry=False)("answer"))


def test_who_stops_waiting_cancels_the_call_on_the_replica() -> None:
    handle = Handle(None)

    async def test() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(made(handle)("answer"), 0.05)

    asyncio.run(test())
    assert handle.responses[0].cancelled


@pytest.mark.parametrize("make", [Overloaded, lambda who: MemberUnavailable(who, "dead")])
def test_what_is_raised_travels_between_processes(make: Callable[[str], EngineError]) -> None:
    import pickle

    again = pickle.loads(pickle.dumps(make("primary")))
    assert (again.request_id, again.retryable) == ("primary", True)

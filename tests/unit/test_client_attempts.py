"""Which failures of a call are tried again and how long is waited, on a clock of the test's own."""

from __future__ import annotations

import asyncio

import pytest

from stitch_ray.client.attempts import Attempts
from stitch_ray.client.errors import ApiError, TimedOut, Unreachable
from stitch_ray.client.protocol import Call, Lost

CALL = Call("POST", "/v1/predict", request_id="mine")
BUSY = ApiError(503, "overloaded", "full", "mine")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("stitch_ray.client.attempts.time", clock)
    return clock


def attempts(*, timeout_s: float = 60.0, max_retries: int = 4, draw: float = 1.0, **waits: float) -> Attempts:
    return Attempts(CALL, timeout_s=timeout_s, max_retries=max_retries, draw=lambda: draw, **waits)


@pytest.mark.usefixtures("clock")
def test_waits_double_up_to_the_longest() -> None:
    made = attempts(max_retries=6, first_wait_s=0.5, longest_wait_s=3.0)
    assert [made.wait_s(BUSY) for _ in range(5)] == [0.5, 1.0, 2.0, 3.0, 3.0]


@pytest.mark.usefixtures("clock")
def test_a_random_part_of_a_wait_is_waited() -> None:
    made = attempts(draw=0.25, first_wait_s=0.5)
    assert [made.wait_s(BUSY), made.wait_s(Lost("gone"))] == [0.125, 0.25]
    assert attempts(draw=0.0).wait_s(BUSY) == 0


@pytest.mark.usefixtures("clock")
def test_a_server_that_says_when_is_asked_no_sooner_even_beyond_the_longest_wait() -> None:
    made = attempts(draw=0.5, first_wait_s=0.2, longest_wait_s=1.0)
    assert made.wait_s(BUSY, "7") == pytest.approx(7.1)
    assert made.wait_s(BUSY, "soon") == pytest.approx(0.2)  # what cannot be read was not said: half of 0.2 * 2


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("status", [429, 502, 503])
def test_a_busy_server_is_asked_as_often_as_allowed_and_its_last_words_are_raised(status: int) -> None:
    made, error = attempts(max_retries=2), ApiError(status, "overloaded", "full", "mine")
    for _ in range(2):
        made.wait_s(error)
    with pytest.raises(ApiError) as caught:
        made.wait_s(error)
    assert caught.value is error


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 500, 504])
def test_an_error_that_would_only_come_again_is_raised_at_once(status: int) -> None:
    error = ApiError(status, "no", "no", "mine")
    with pytest.raises(ApiError) as caught:
        attempts().wait_s(error, "1")
    assert caught.value is error


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("retries", "told"), [(0, "1 attempt,"), (2, "3 attempts,")])
def test_replies_that_do_not_arrive_end_in_a_number_of_attempts(retries: int, told: str) -> None:
    made = attempts(max_retries=retries)
    for _ in range(retries):
        made.wait_s(Lost("reset"))
    with pytest.raises(Unreachable, match=rf"reset \({told} request mine\)"):
        made.wait_s(Lost("reset"))


def test_a_wait_that_would_outlast_the_call_is_not_begun(clock: Clock) -> None:
    made = attempts(timeout_s=10, first_wait_s=4, longest_wait_s=4)
    assert made.wait_s(BUSY) == 4
    clock.now += 6
    with pytest.raises(ApiError):
        made.wait_s(BUSY)  # 4 seconds are left, and 4 would be waited
    with pytest.raises(ApiError):
        attempts(timeout_s=10).wait_s(BUSY, "10")


def test_work_is_cancelled_when_the_time_of_the_call_is_up_and_the_failure_before_is_told(clock: Clock) -> None:
    cancelled = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    made = attempts(timeout_s=10)
    made.wait_s(BUSY)
    clock.now += 10
    with pytest.raises(TimedOut, match=r"no reply within 10 s; before that: HTTP 503 .*\(request mine\)"):
        asyncio.run(made.in_time(endless()))
    assert cancelled == [True]


def test_work_that_is_done_in_time_gives_its_result() -> None:
    async def work() -> str:
        return "done"

    assert asyncio.run(attempts().in_time(work())) == "done"

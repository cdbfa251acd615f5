"""The way of one question: what is told, what is kept in the trace, and that nobody who listens can stop the clock."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import pytest

from stitch_ray.ensemble import passage
from stitch_ray.ensemble.budget import DeadlineExceeded
from stitch_ray.ensemble.passage import Passage
from stitch_ray.ensemble.types import Event, Limits, Prediction, Question

QUESTION = Question(example_id="q1", question="Capital of Italy?")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(passage, "time", SimpleNamespace(monotonic=lambda: found.now))
    return found


class Listener:
    def __init__(self) -> None:
        self.heard: list[Event] = []

    async def __call__(self, event: Event) -> None:
        self.heard.append(event)


async def deaf(_: Event) -> None:
    await asyncio.Event().wait()


def prediction() -> Prediction:
    return Prediction(
        example_id="q1",
        question="Capital of Italy?",
        draft=None,
        draft_confidence=None,
        answer=None,
        confidence=None,
        decision="abstain",
        reason="deadline",
        route="none",
    )


def test_the_trace_has_the_stages_in_order_with_the_time_since_the_one_before(clock: SimpleNamespace) -> None:
    way = Passage(QUESTION, Limits(), None)
    clock.now += 2
    way.note("draft", text="Rome")
    clock.now += 0.5
    way.note("score", confidence=0.4)
    assert way.closed_trace(decision="abstain") == (
        {"stage": "draft", "seconds": 2.0, "text": "Rome"},
        {"stage": "score", "seconds": 0.5, "confidence": 0.4},
        {"stage": "decision", "seconds": 0.0, "decision": "abstain"},
    )
    assert way.seconds == 2.5


def test_a_turn_of_the_route_is_a_stage_as_it_came_and_the_next_one_is_timed_from_it(clock: SimpleNamespace) -> None:
    listener = Listener()
    way = Passage(QUESTION, Limits(), listener)
    turn = Event("turn", {"speaker": "Ada", "text": "Milan", "seconds": 7.0})

    async def run() -> None:
        clock.now += 7
        await way.pass_on(turn)
        clock.now += 1
        await way.pass_on(Event("stage", {"stage": "refine"}))
        await way.tell("rescore", confidence=0.8)

    asyncio.run(run())
    trace = way.closed_trace()
    assert trace[0] == {"stage": "turn", **turn.data}
    assert [(step["stage"], step["seconds"]) for step in trace[1:]] == [("rescore", 1.0), ("decision", 0.0)]
    assert [event.kind for event in listener.heard] == ["turn", "stage", "stage"]


def test_what_begins_is_told_and_is_no_part_of_the_trace() -> None:
    listener = Listener()
    way = Passage(QUESTION, Limits(), listener)
    asyncio.run(way.begin("refine", route="dialogue"))
    assert listener.heard == [Event("stage", {"stage": "refine", "route": "dialogue"})]
    assert [step["stage"] for step in way.closed_trace()] == ["decision"]


def test_without_a_listener_the_trace_is_the_same() -> None:
    async def run(way: Passage) -> list[str]:
        await way.begin("refine")
        await way.tell("draft", text="Rome")
        await way.finish(prediction())
        return [step["stage"] for step in way.closed_trace()]

    assert asyncio.run(run(Passage(QUESTION, Limits(), None))) == ["draft", "decision"]
    assert asyncio.run(run(Passage(QUESTION, Limits(), Listener()))) == ["draft", "decision"]


def test_a_listener_that_does_not_listen_and_work_that_does_not_end_meet_the_deadline() -> None:
    way = Passage(QUESTION, Limits(deadline_s=0.01), deaf)
    with pytest.raises(DeadlineExceeded):
        asyncio.run(way.tell("draft"))
    with pytest.raises(DeadlineExceeded):
        asyncio.run(way.timed(asyncio.sleep(math.inf)))


def test_the_end_is_told_however_late_it_is() -> None:
    listener = Listener()
    way = Passage(QUESTION, Limits(deadline_s=0.0), listener)
    with pytest.raises(DeadlineExceeded):
        asyncio.run(way.timed(asyncio.sleep(math.inf)))
    asyncio.run(way.finish(prediction()))
    assert listener.heard == [Event("final", prediction().to_dict())]

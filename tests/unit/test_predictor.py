"""Every way through the predictor: what is given, what is not, and that nothing is given unchecked."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch_ray.config.ensemble import DialogueConfig
from stitch_ray.engines.base import EngineError
from stitch_ray.ensemble.budget import BudgetExceeded, DeadlineExceeded
from stitch_ray.ensemble.dialogue_route import DialogueRoute
from stitch_ray.ensemble.predictor import Predictor
from stitch_ray.ensemble.types import (
    Answer,
    Event,
    Limits,
    Prediction,
    Question,
    Refined,
    Route,
    RouteFailed,
    ScorerUnavailable,
)
from stitch_ray.errors import UserError
from stitch_ray.reliability.cascade import decide, replay
from stitch_ray.reliability.policy import Policy, UnknownTarget
from tests.scripted import ScriptedEngine, ScriptedPrimary, ScriptedScorer, policy_for, said

QUESTION = Question(example_id="q1", question="Capital of Italy?", task="geography")
THRESHOLD = 0.7
AUXILIARIES = ("fingerprint of Ada", "fingerprint of Bo")
NO_TIME = Limits(deadline_s=0.05)


def dialogue(first: Any, second: Any = "Milan", **settings: object) -> DialogueRoute:
    """Of two who each say one thing all the time."""
    engines = [
        ScriptedEngine(*[said(reply) if isinstance(reply, str) else reply] * 3, name=name)
        for name, reply in (("Ada", first), ("Bo", second))
    ]
    return DialogueRoute(DialogueConfig.model_validate(settings), engines, ["Ada", "Bo"])


def ensemble(
    confidences: dict[str, Any], route: Route | None = None, primary: ScriptedPrimary | None = None, **options: Any
) -> Predictor:
    return Predictor(primary=primary or ScriptedPrimary(), scorer=ScriptedScorer(confidences), route=route, **options)


def policy(predictor: Predictor, threshold: float | None = THRESHOLD) -> Policy:
    marks = predictor.fingerprints
    return policy_for(threshold, route=marks.route, auxiliaries=marks.auxiliaries or ())


def predict(predictor: Predictor, limits: Limits = Limits(), threshold: float | None = THRESHOLD) -> Prediction:
    return asyncio.run(predictor.predict(QUESTION, policy=policy(predictor, threshold), limits=limits))


def outcome(found: Prediction) -> tuple[Any, ...]:
    return found.decision, found.reason, found.answer, found.confidence, found.route


def test_a_sure_draft_is_given_and_nothing_else_is_asked() -> None:
    found = predict(ensemble({"Rome": 0.9}, dialogue("Milan")))
    assert outcome(found) == ("answer", "confident", "Rome", 0.9, "none")
    assert (found.calls, found.tokens, found.refined) == (1, 50, None)
    assert [entry["stage"] for entry in found.trace] == ["draft", "score", "decision"]
    assert (found.draft, found.draft_confidence, found.task, found.target_risk) == ("Rome", 0.9, "geography", 0.1)


def test_an_unsure_draft_is_refined_scored_again_and_given_if_that_is_sure() -> None:
    primary = ScriptedPrimary()
    predictor = ensemble({"Rome": 0.4, "Milan": 0.8}, dialogue("Milan"), primary)
    found = predict(predictor)
    assert outcome(found) == ("answer", "refined", "Milan", 0.8, "dialogue")
    assert (found.draft, found.draft_confidence, found.refined, found.final_confidence) == ("Rome", 0.4, "Milan", 0.8)
    assert primary.measured == ["Milan"]
    assert (found.calls, found.tokens) == (1 + 2 + 1, 50 + 2 * 110 + 50)
    assert [entry["stage"] for entry in found.trace] == ["draft", "score", "turn", "turn", "rescore", "decision"]
    assert all(entry["unchecked"] for entry in found.trace if "text" in entry)
    assert found.model_version == predictor.model_version
    assert found.policy_version == policy(predictor).version


def test_what_stays_unsure_is_not_given() -> None:
    found = predict(ensemble({"Rome": 0.4, "Milan": 0.6}, dialogue("Milan")))
    assert outcome(found) == ("abstain", "unsure", None, 0.6, "dialogue")
    assert found.refined == "Milan"
    alone = predict(ensemble({"Rome": 0.4}))
    assert outcome(alone) == ("abstain", "unsure", None, 0.4, "none")


def test_a_dialogue_that_keeps_the_draft_costs_no_second_score() -> None:
    primary = ScriptedPrimary()
    found = predict(ensemble({"Rome": 0.4}, dialogue("Rome", "Rome"), primary))
    assert outcome(found) == ("abstain", "unsure", None, 0.4, "dialogue")
    assert primary.measured == []
    assert found.trace[-2]["same_as_draft"]


def test_a_policy_that_abstains_on_everything_refines_nothing() -> None:
    found = predict(ensemble({"Rome": 1.0}, dialogue("Milan")), threshold=None)
    assert outcome(found) == ("abstain", "unsure", None, 1.0, "none")
    assert found.calls == 1


@pytest.mark.parametrize("broken", [ScorerUnavailable("gone"), RuntimeError("bug"), ValueError("unread")])
def test_without_the_scorer_nothing_is_given_and_nothing_refined(broken: Exception) -> None:
    found = predict(ensemble({"Rome": broken}, dialogue("Milan")))
    assert outcome(found) == ("abstain", "scorer_unavailable", None, None, "none")
    assert found.calls == 1
    later = predict(ensemble({"Rome": 0.4, "Milan": broken}, dialogue("Milan")))
    assert outcome(later) == ("abstain", "scorer_unavailable", None, None, "none")
    with pytest.raises(ScorerUnavailable):
        predict(ensemble({"Rome": broken}, dialogue("Milan"), on_failure="error"))


@pytest.mark.parametrize("unscored", [None, math.nan, math.inf, -0.5, 1.5])
def test_an_answer_without_a_confidence_is_never_given(unscored: float | None) -> None:
    found = predict(ensemble({"Rome": unscored}))
    assert outcome(found) == ("abstain", "scorer_unavailable", None, None, "none")
    refined = predict(ensemble({"Rome": unscored, "Milan": unscored}, dialogue("Milan")))
    assert outcome(refined) == ("abstain", "scorer_unavailable", None, None, "dialogue")
    saved = predict(ensemble({"Rome": unscored, "Milan": 0.8}, dialogue("Milan")))
    assert outcome(saved) == ("answer", "refined", "Milan", 0.8, "dialogue")


@pytest.mark.parametrize(
    ("confidences", "route"),
    [
        ({"Rome": "inf s"}, None),
        ({"Rome": 0.4, "Milan": "inf s"}, dialogue("Milan")),
        ({"Rome": 0.4}, dialogue(math.inf)),
    ],
    ids=["scorer", "second score", "speaker"],
)
def test_whoever_is_late_the_deadline_holds(confidences: dict[str, Any], route: Route | None) -> None:
    """Who is late never comes: that there is a prediction shows that nobody waited."""
    found = predict(ensemble(confidences, route), NO_TIME)
    assert outcome(found) == ("abstain", "deadline", None, None, "none")
    with pytest.raises(DeadlineExceeded):
        predict(ensemble(confidences, route, on_failure="error"), NO_TIME)


def test_a_primary_that_is_late_leaves_no_draft() -> None:
    found = predict(ensemble({}, primary=ScriptedPrimary(seconds=math.inf)), NO_TIME)
    assert outcome(found) == ("abstain", "deadline", None, None, "none")
    assert (found.draft, found.calls) == (None, 0)


def test_a_listener_that_does_not_listen_cannot_stop_the_clock() -> None:
    async def run() -> Prediction:
        async def deaf(event: Event) -> None:
            if event.kind != "final":
                await asyncio.Event().wait()

        predictor = ensemble({"Rome": 0.9})
        return await predictor.predict(QUESTION, policy=policy(predictor), limits=NO_TIME, emit=deaf)

    assert asyncio.run(run()).reason == "deadline"


def test_a_dialogue_without_a_readable_turn_fails_the_answer() -> None:
    garbage = EngineError("q1", "broken", retryable=True)
    found = predict(ensemble({"Rome": 0.4}, dialogue(garbage)))
    assert outcome(found) == ("abstain", "route_failed", None, None, "none")
    assert found.calls == 4
    with pytest.raises(RouteFailed):
        predict(ensemble({"Rome": 0.4}, dialogue(garbage), on_failure="error"))


class OddRoute:
    """Yields `items`, or raises those that are exceptions."""

    name, fingerprint, auxiliaries = "odd", "odd:1", ()

    def __init__(self, *items: Event | Refined | Exception) -> None:
        self.items = items

    async def refine(self, question: Question, draft: Answer, budget: Any) -> AsyncIterator[Event | Refined]:
        for item in self.items:
            if isinstance(item, Exception):
                raise item
            yield item


@pytest.mark.parametrize("route", [OddRoute(), OddRoute(EngineError("q1", "out of memory"))])
def test_a_route_that_comes_to_nothing_has_failed(route: OddRoute) -> None:
    assert outcome(predict(ensemble({"Rome": 0.4}, route)))[:3] == ("abstain", "route_failed", None)


def test_a_refined_answer_that_the_primary_cannot_read_has_failed() -> None:
    class Reads(ScriptedPrimary):
        async def signals(self, question: Question, text: str, samples: Any) -> Answer:
            raise EngineError("q1", "600 tokens")

    found = predict(ensemble({"Rome": 0.4}, dialogue("Milan"), Reads()))
    assert outcome(found) == ("abstain", "route_failed", None, None, "none")


@pytest.mark.parametrize(
    "limits", [Limits(max_calls=1), Limits(max_calls=2), Limits(max_calls=3), Limits(max_tokens=50)]
)
def test_beyond_the_budget_nothing_is_asked_and_nothing_given(limits: Limits) -> None:
    predictor = ensemble({"Rome": 0.4, "Milan": 0.9}, dialogue("Milan"))
    found = predict(predictor, limits)
    assert outcome(found) == ("abstain", "budget", None, None, "none")
    assert found.calls <= limits.max_calls
    sure = predict(ensemble({"Rome": 0.9}, dialogue("Milan")), limits)
    assert sure.answer == "Rome"
    with pytest.raises(BudgetExceeded):
        predict(ensemble({"Rome": 0.4}, dialogue("Milan"), on_failure="error"), limits)


def test_without_an_answer_of_the_primary_there_is_an_error() -> None:
    with pytest.raises(EngineError, match="too long"):
        predict(ensemble({}, primary=ScriptedPrimary(fails=EngineError("q1", "too long"))))


def test_what_cannot_be_promised_costs_nothing() -> None:
    primary = ScriptedPrimary()
    predictor = ensemble({}, dialogue("Milan"), primary)
    with pytest.raises(UnknownTarget, match=r"calibrated are 0\.1"):
        asyncio.run(predictor.predict(QUESTION, policy=policy(predictor), target_risk=0.2))
    with pytest.raises(ValueError, match="calibrated without one"):
        asyncio.run(predictor.predict(QUESTION, policy=policy_for(THRESHOLD)))
    with pytest.raises(ValueError, match="empty"):
        asyncio.run(predictor.predict(Question(example_id="q", question=" "), policy=policy(predictor)))
    assert primary.asked == []


@pytest.mark.parametrize("always", [False, True])
def test_cancelling_cancels_who_is_being_asked(*, always: bool) -> None:
    engine = ScriptedEngine(60.0, name="Ada")
    route = DialogueRoute(DialogueConfig.model_validate({}), [engine, ScriptedEngine()], ["Ada", "Bo"])
    predictor = ensemble({"Rome": 0.4}, route)
    ask = predictor.both_stages if always else predictor.predict

    async def run() -> None:
        task = asyncio.create_task(ask(QUESTION, policy=policy(predictor)))
        while not engine.requests:
            await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
    assert engine.cancelled == 1


def test_events_tell_the_stages_as_they_happen_and_the_prediction_at_the_end() -> None:
    events: list[Event] = []

    async def keep(event: Event) -> None:
        events.append(event)

    predictor = ensemble({"Rome": 0.4, "Milan": 0.8}, dialogue("Milan"))
    found = asyncio.run(predictor.predict(QUESTION, policy=policy(predictor), emit=keep))
    assert [event.data.get("stage", event.kind) for event in events] == [
        *("draft", "score", "refine", "turn", "turn", "rescore"),
        "final",
    ]
    assert events[-1].data == found.to_dict()
    json.dumps([event.data for event in events], allow_nan=False)
    assert all(event.data.get("unchecked") for event in events[:-1] if "text" in event.data)


def test_a_prediction_survives_json() -> None:
    found = predict(ensemble({"Rome": 0.4, "Milan": 0.8}, dialogue("Milan")))
    assert Prediction.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False))) == found


def test_a_policy_for_other_members_is_refused() -> None:
    predictor = ensemble({}, dialogue("Milan"))
    assert predictor.check(policy(predictor)) == []
    other = ensemble({}, dialogue("Milan", max_turns=6))
    assert other.model_version != predictor.model_version
    with pytest.raises(UserError, match="route is dialogue"):
        other.check(policy(predictor))


# Both stages, for calibration


def both(predictor: Predictor, made: Policy | None = None, limits: Limits = Limits()) -> Prediction:
    return asyncio.run(predictor.both_stages(QUESTION, policy=made, limits=limits))


def test_calibration_keeps_both_answers_and_decides_nothing_without_a_policy() -> None:
    found = both(ensemble({"Rome": 0.9, "Milan": None}, dialogue("Milan")))
    assert (found.draft, found.draft_confidence, found.refined, found.final_confidence) == ("Rome", 0.9, "Milan", None)
    assert outcome(found) == (None, None, None, None, "dialogue")
    assert found.policy_version is None


def test_calibration_under_a_policy_decides_as_in_use_and_refines_all_the_same() -> None:
    for draft, final in [(0.9, 0.8), (0.9, 0.2), (0.4, 0.8), (0.4, 0.2)]:
        predictor = ensemble({"Rome": draft, "Milan": final}, dialogue("Milan"))
        found, used = (
            both(predictor, policy(predictor)),
            predict(ensemble({"Rome": draft, "Milan": final}, dialogue("Milan"))),
        )
        assert outcome(found)[:4] == outcome(used)[:4]
        assert (found.refined, found.final_confidence) == ("Milan", final)


def test_calibration_marks_a_refinement_that_failed() -> None:
    garbage = EngineError("q1", "broken", retryable=True)
    found = both(ensemble({"Rome": 0.9}, dialogue(garbage)))
    assert (found.draft_confidence, found.refined, found.final_confidence) == (0.9, None, None)
    assert (found.decision, found.reason) == (None, "route_failed")
    predictor = ensemble({"Rome": 0.9}, dialogue(garbage))
    assert outcome(both(predictor, policy(predictor))) == ("answer", "confident", "Rome", 0.9, "none")
    with pytest.raises(ValueError, match="no route"):
        both(ensemble({"Rome": 0.9}))


CONFIDENCE = st.none() | st.just(math.nan) | st.floats(0, 1) | st.sampled_from([0.25, 0.5, 0.75])


@given(CONFIDENCE, CONFIDENCE, st.none() | st.floats(0, 1) | st.sampled_from([0.25, 0.5, 0.75]), st.booleans())
def test_an_answer_is_given_where_the_cascade_says_so_and_only_there(
    draft: float | None, final: float | None, threshold: float | None, has_route: bool
) -> None:
    predictor = ensemble({"Rome": draft, "Milan": final}, dialogue("Milan") if has_route else None)
    made = policy(predictor, threshold)
    found = predict(predictor, threshold=threshold)
    expected = decide(made, draft=draft, has_route=has_route)
    if expected.action == "escalate":
        expected = decide(made, draft=draft, final=math.nan if final is None else final, has_route=True)
    assert (found.decision, found.confidence, found.reason) == (expected.action, expected.confidence, expected.reason)
    assert found.answer == (
        None if expected.action == "abstain" else {"draft": "Rome", "refined": "Milan"}[expected.stage]
    )
    if threshold is not None and has_route:
        pair = [[math.nan if value is None else value] for value in (draft, final)]
        accepted, _ = replay(pair[0], np.zeros(1), pair[1], np.zeros(1), [threshold])
        assert (found.answer is not None) == bool(accepted[0, 0])

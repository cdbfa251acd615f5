"""The route excludes what was turned down, and gives nothing that the validator did not accept."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from stitch_ray.config.ensemble import EnsembleConfig, ExcludeConfig
from stitch_ray.config.loading import validate
from stitch_ray.engines.base import EngineError, Request
from stitch_ray.ensemble.budget import Budget, BudgetExceeded, DeadlineExceeded
from stitch_ray.ensemble.exclude_route import ExcludeRoute, exclude_fingerprint
from stitch_ray.ensemble.predictor import Predictor
from stitch_ray.ensemble.types import Answer, Event, Limits, Question, Refined, RouteFailed
from stitch_ray.errors import UserError
from tests.scripted import ScriptedEngine, ScriptedPrimary, ScriptedScorer, policy_for

QUESTION = Question(example_id="q1", question="Capital of Italy?", context="Today.")
DRAFT = Answer(text="Milan")


class Judge(ScriptedEngine):
    """Accepts by the answer that its prompt holds."""

    def __init__(self, probabilities: dict[str, float | Exception], name: str = "judge") -> None:
        super().__init__(name=name)
        self.probabilities = probabilities

    async def compare(self, request: Request, word: str, other: str) -> tuple[float, int]:
        self.requests.append(request)
        assert (word, other) == ("CORRECT", "WRONG")
        text = request.prompt[-1].content  # type: ignore[union-attr]
        found = next(value for answer, value in self.probabilities.items() if f"answer: {answer}\n" in text)
        if isinstance(found, Exception):
            raise found
        return found, 40


def route(answering: ScriptedEngine, judge: Judge, **settings: Any) -> ExcludeRoute:
    return ExcludeRoute(ExcludeConfig.model_validate(settings), answering, judge, ["exar", "judge"])


def refine(one: ExcludeRoute, limits: Limits = Limits()) -> tuple[list[Event], Refined, Budget]:
    budget = Budget(limits)

    async def run() -> list[Event | Refined]:
        return [item async for item in one.refine(QUESTION, DRAFT, budget)]

    *events, last = asyncio.run(run())
    assert isinstance(last, Refined)
    return [event for event in events if isinstance(event, Event)], last, budget


def test_the_first_accepted_answer_is_the_refined_one() -> None:
    answering, judge = ScriptedEngine("Turin", "Rome"), Judge({"Turin": 0.4, "Rome": 0.6})
    events, refined, budget = refine(route(answering, judge))
    assert (refined.text, refined.changed_by, refined.calls, refined.tokens) == ("Rome", "exar", 4, 2 * 110 + 2 * 40)
    assert (budget.calls, budget.tokens) == (4, 300)
    assert [(e.data["text"], e.data["probability"], e.data["changed"]) for e in events] == [
        ("Turin", 0.4, True),
        ("Rome", 0.6, True),
    ]
    assert all(event.data["unchecked"] for event in events)
    prompts = [request.prompt[-1].content for request in answering.requests]  # type: ignore[union-attr]
    assert "- Milan" in prompts[0]
    assert "- Turin" not in prompts[0]
    assert "- Milan\n- Turin" in prompts[1]
    assert "Today." in prompts[1]
    assert [request.sampling.temperature for request in answering.requests] == [0.2, 0.4]
    assert len({request.sampling.seed for request in answering.requests}) == 2


def test_the_draft_is_never_accepted_and_a_repeated_answer_costs_no_verdict() -> None:
    answering, judge = ScriptedEngine("milan.", "Rome"), Judge({"Rome": 0.9})
    events, refined, budget = refine(route(answering, judge))
    assert (refined.text, budget.calls, len(judge.requests)) == ("Rome", 3, 1)
    assert events[0].data["comment"] == "turned down before"
    with pytest.raises(RouteFailed, match=r"none of 1 further answers was accepted \(cycle\)"):
        refine(route(ScriptedEngine("Milan"), judge, on_cycle="stop"))


def test_without_an_accepted_answer_the_refinement_has_failed() -> None:
    answering = ScriptedEngine("a", "b", "")
    with pytest.raises(RouteFailed, match=r"none of 3 further answers was accepted \(exhausted\)"):
        refine(route(answering, Judge({"a": 0.4, "b": 0.49})))


def test_engines_that_fail_and_limits_end_it() -> None:
    with pytest.raises(EngineError, match="no room"):
        refine(route(ScriptedEngine(EngineError("q1", "no room")), Judge({})))
    with pytest.raises(EngineError, match="away"):
        refine(route(ScriptedEngine("a"), Judge({"a": EngineError("q1", "away")})))
    with pytest.raises(BudgetExceeded):
        refine(route(ScriptedEngine("a"), Judge({"a": 0.9})), Limits(max_calls=1))
    slow = ScriptedEngine(math.inf)
    with pytest.raises(DeadlineExceeded):
        refine(route(slow, Judge({})), Limits(deadline_s=0.05))
    assert slow.cancelled == 1


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [({"Rome": 0.9}, ("answer", "Rome", "refined")), ({"Rome": 0.1}, ("abstain", None, "route_failed"))],
)
def test_what_the_validator_accepts_is_scored_like_anything_else(
    verdicts: dict[str, float | Exception], expected: tuple[str, str | None, str]
) -> None:
    one = route(ScriptedEngine("Rome"), Judge(verdicts), max_attempts=1)
    scorer = ScriptedScorer({"Milan": 0.2, "Rome": 0.8})
    predictor = Predictor(primary=ScriptedPrimary("Milan"), scorer=scorer, route=one)
    policy = policy_for(0.7, route=one.fingerprint, auxiliaries=one.auxiliaries)
    found = asyncio.run(predictor.predict(QUESTION, policy=policy))
    assert (found.decision, found.answer, found.reason) == expected
    assert predictor.fingerprints.auxiliaries == ("fingerprint of engine", "fingerprint of judge")


def test_an_accepted_answer_that_the_scorer_doubts_is_kept_back() -> None:
    one = route(ScriptedEngine("Rome"), Judge({"Rome": 1.0}))
    scorer = ScriptedScorer({"Milan": 0.2, "Rome": 0.3})
    predictor = Predictor(primary=ScriptedPrimary("Milan"), scorer=scorer, route=one)
    policy = policy_for(0.7, route=one.fingerprint, auxiliaries=one.auxiliaries)
    found = asyncio.run(predictor.predict(QUESTION, policy=policy))
    assert (found.decision, found.refined, found.reason) == ("abstain", "Rome", "unsure")


def test_its_fingerprint_follows_settings_and_members() -> None:
    marks = {
        exclude_fingerprint(ExcludeConfig.model_validate(settings), names)
        for settings, names in (({}, ["a"]), ({}, ["b"]), ({"threshold": 0.6}, ["a"]), ({"exclude": "last"}, ["a"]))
    }
    assert len(marks) == 4
    assert all(mark.startswith("exclude:") for mark in marks)


@pytest.mark.parametrize(
    ("auxiliaries", "problem"),
    [
        ([], "route: exclude needs an auxiliary"),
        ([{"endpoint": {"url": "http://127.0.0.1:9/v1", "model": "m"}}], "needs a local model as its validator"),
    ],
)
def test_a_route_that_could_not_judge_is_refused(auxiliaries: list[Any], problem: str) -> None:
    values = {"primary": {"model": {"path": "p"}}, "route": "exclude", "auxiliaries": auxiliaries}
    with pytest.raises(UserError, match=problem):
        validate(EnsembleConfig, values, "ensemble")

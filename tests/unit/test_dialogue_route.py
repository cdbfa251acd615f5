"""The route asks both auxiliaries in turn; no turn that could not be read takes part, and every attempt is paid for."""

from __future__ import annotations

import asyncio
import math

import pytest

from stitch_ray.config.ensemble import DialogueConfig
from stitch_ray.engines.base import EngineError
from stitch_ray.ensemble.budget import Budget, BudgetExceeded, DeadlineExceeded
from stitch_ray.ensemble.dialogue_route import DialogueRoute, dialogue_fingerprint
from stitch_ray.ensemble.types import Answer, Event, Limits, Question, Refined, RouteFailed
from tests.scripted import ScriptedEngine, said

QUESTION = Question(example_id="q1", question="Capital of Italy?")
DRAFT = Answer(text="Rome")
BUSY = EngineError("q1", "busy", retryable=True)


def refine(
    first: ScriptedEngine, second: ScriptedEngine, limits: Limits = Limits(), seed: int = 0, **settings: object
) -> tuple[list[Event], Refined, Budget]:
    config = DialogueConfig.model_validate(settings)
    route = DialogueRoute(config, [first, second], ["Ada", "Bo"], seed=seed)
    budget = Budget(limits)

    async def run() -> list[Event | Refined]:
        return [item async for item in route.refine(QUESTION, DRAFT, budget)]

    *events, last = asyncio.run(run())
    assert isinstance(last, Refined)
    return [event for event in events if isinstance(event, Event)], last, budget


def test_engines_speak_in_turn_until_they_agree() -> None:
    first, second = ScriptedEngine(said("Milan"), said("turin.")), ScriptedEngine(said("Turin"))
    events, refined, budget = refine(first, second)
    assert [(e.data["speaker"], e.data["text"], e.data["changed"]) for e in events] == [
        ("Ada", "Milan", True),
        ("Bo", "Turin", True),
        ("Ada", "turin.", False),
    ]
    assert all(event.kind == "turn" and event.data["unchecked"] for event in events)
    assert (refined.text, refined.changed_by, refined.calls, refined.tokens) == ("turin.", "Bo", 3, 330)
    assert (budget.calls, budget.tokens) == (3, 330)
    assert "Milan" in second.requests[0].prompt[1].content  # type: ignore[union-attr]


def test_a_turn_is_asked_again_warmer_and_with_another_seed_until_it_can_be_read() -> None:
    first = ScriptedEngine("no JSON", BUSY, said("Milan"))
    events, refined, budget = refine(first, ScriptedEngine(said("Milan")))
    assert refined.text == "Milan"
    assert (events[0].data["attempts"], events[0].data["tokens"], budget.calls) == (3, 220, 4)
    settings = [request.sampling for request in first.requests]
    assert [one.temperature for one in settings] == [0.0, 0.7, 0.7]
    assert len({one.seed for one in settings}) == 3
    assert all(one.json_schema for one in settings)


def test_seeds_are_the_same_for_the_same_question_and_other_for_another_seed() -> None:
    seeds = []
    for seed in (0, 0, 1):
        first = ScriptedEngine(said("Rome"))
        refine(first, ScriptedEngine(said("Rome")), seed=seed)
        seeds.append(first.requests[0].sampling.seed)
    assert seeds[0] == seeds[1] != seeds[2]


def test_after_a_reply_that_was_cut_off_the_next_is_bounded() -> None:
    first = ScriptedEngine('{"comment": "and on and on', said("Rome"), finish="length")
    refine(first, ScriptedEngine(said("Rome")))
    schemas = [request.sampling.json_schema or "" for request in first.requests]
    assert ["maxLength" in schema for schema in schemas] == [False, True]


@pytest.mark.parametrize("reply", ["no JSON", BUSY, "", '{"comment": "", "answer": 3}'])
def test_when_no_attempt_is_any_good_the_route_fails_and_no_earlier_turn_is_used(reply: str | Exception) -> None:
    with pytest.raises(RouteFailed, match="turn 2, of Bo"):
        refine(ScriptedEngine(said("Milan")), ScriptedEngine(reply, reply), attempts=2)


def test_a_server_that_refuses_the_schema_is_asked_without_it_from_then_on() -> None:
    refused = EngineError("q1", "HTTP 400: response_format")
    first = ScriptedEngine(refused, said("Milan"), said("Pisa"))
    refine(first, ScriptedEngine(said("Turin"), said("Pisa")))
    assert [request.sampling.json_schema is None for request in first.requests] == [False, True, True]


def test_a_prompt_that_the_engine_refuses_fails_the_route_at_once() -> None:
    refused = EngineError("q1", "600 prompt tokens; the model takes 511")
    first = ScriptedEngine(refused, refused, refused, refused)
    with pytest.raises(RouteFailed, match="600 prompt tokens"):
        refine(first, ScriptedEngine(), attempts=4)
    assert len(first.requests) == 2


def test_attempts_end_where_the_budget_does() -> None:
    with pytest.raises(BudgetExceeded):
        refine(ScriptedEngine("?", "?", "?"), ScriptedEngine(), Limits(max_calls=2))
    with pytest.raises(BudgetExceeded):
        refine(ScriptedEngine(said("a"), said("c")), ScriptedEngine(said("b")), Limits(max_tokens=150))


def test_a_speaker_that_is_late_is_cancelled() -> None:
    first = ScriptedEngine(math.inf)
    with pytest.raises(DeadlineExceeded):
        refine(first, ScriptedEngine(), Limits(deadline_s=0.05))
    assert first.cancelled == 1


def test_the_fingerprint_changes_with_all_that_changes_what_is_said() -> None:
    def mark(names: tuple[str, str] = ("Ada", "Bo"), **settings: object) -> str:
        return dialogue_fingerprint(DialogueConfig.model_validate(settings), names)

    marks = [
        mark(),
        mark(("Bo", "Ada")),
        mark(max_turns=5),
        mark(max_tokens=64),
        mark(temperature=0.5),
        mark(attempts=1),
        mark(stop_on_agreement=False),
    ]
    assert len(set(marks)) == len(marks)
    assert all(one.startswith("dialogue:") for one in marks)
    assert mark() == mark()

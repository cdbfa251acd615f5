"""What is asked online is what `sample-answers` asks: the same turns, context and hash."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch_ray.data import formats
from stitch_ray.data.readers import SourceRow
from stitch_ray.ensemble.asking import asked, seed_for, unasked
from stitch_ray.ensemble.types import Question
from stitch_ray.records import Turn
from stitch_ray.reliability.answers.questions import question_of
from stitch_ray.reliability.answers.sampling import sample_seed


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


SYSTEM, FIRST, REPLY = message("system", "Be brief."), message("user", "Who wrote it?"), message("assistant", "Homer.")
SECOND, LAST = message("user", "And when?"), message("assistant", "Long ago.")

ROWS = {
    "question": {"question": "Capital of Italy?", "answer": "Rome"},
    "question and context": {
        "question": "Capital?",
        "context": "Italy is a country.\n\nIts capital is Rome.",
        "answer": "Rome",
    },
    "alpaca": {"instruction": "Name a city.", "input": "in Italy", "output": "Rome"},
    "alpaca without input": {"instruction": "Name a city.", "input": "", "output": "Rome"},
    "messages": {"messages": [FIRST, REPLY]},
    "system": {"messages": [SYSTEM, FIRST, REPLY]},
    "conversation": {"messages": [SYSTEM, FIRST, REPLY, SECOND, LAST]},
    "conversation with blank lines": {"messages": [message("user", "a\n\nb\n\nc"), REPLY, SECOND, LAST]},
    "conversation and context": {"messages": [message("user", "a\n\nb"), REPLY, SECOND, LAST], "context": "c\n\nd"},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())
def test_a_planned_question_is_asked_online_as_it_was_sampled(row: dict[str, object]) -> None:
    example = formats.convert(SourceRow("file", 1, json.dumps(row), row, None))
    planned = question_of(example, "q1")
    again = asked(unasked(planned))
    assert (again.turns, again.question, again.context) == (planned.turns, planned.question, planned.context)
    assert (again.asked, again.task, again.example_id) == (planned.asked, planned.task, "q1")


TEXT = st.text("ab \n", min_size=1).filter(str.strip)


@given(TEXT, st.none() | TEXT, st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXT), max_size=4))
def test_any_question_survives_being_planned(
    question: str, context: str | None, history: list[tuple[str, str]]
) -> None:
    given_ = Question(
        example_id="q", question=question, context=context, history=tuple(Turn(*turn) for turn in history)
    )
    planned = asked(given_)
    again = asked(unasked(planned))
    assert (again.turns, again.context, again.asked) == (planned.turns, planned.context, planned.asked)


def test_history_comes_before_the_question_and_into_the_scorers_context() -> None:
    history = (Turn("system", "Be brief."), Turn("user", "Who?"), Turn("assistant", "Homer."))
    shown = asked(Question(example_id="q", question="When?", context="Iliad", history=history))
    assert shown.turns == (history[0], Turn("user", "Who?\n\nIliad"), history[2], Turn("user", "When?"))
    assert (shown.question, shown.context) == ("When?", "system: Be brief.\nuser: Who?\nassistant: Homer.\nIliad")


@pytest.mark.parametrize(
    ("question", "context", "reason"),
    [(" \n", None, "empty"), ("\ud800", None, "surrogate"), ("Who?", "\udfff", "surrogate")],
)
def test_what_is_no_question_is_refused(question: str, context: str | None, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        asked(Question(example_id="q", question=question, context=context))


def test_seeds_depend_on_question_stage_attempt_and_seed() -> None:
    seeds = {
        seed_for(*key)
        for key in [("a", "s", 0, 0), ("b", "s", 0, 0), ("a", "t", 0, 0), ("a", "s", 1, 0), ("a", "s", 0, 1)]
    }
    assert len(seeds) == 5
    assert seed_for("a", "sample", 3, 7) == sample_seed(7, "a", "sample", 3)

"""What the page shows of a reply: the answer and nothing unchecked as one, every text escaped, and commands that run."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from serve_apps.page_views import (
    answer_card,
    commands,
    dialogue,
    error_card,
    error_words,
    promise_line,
    steps_table,
    waiting_card,
)
from stitch_ray.client import ApiError, ClientError, Reply, TimedOut, Unreachable
from tests.page import Page

EVIL = "<script>alert(1)</script> & \"'"


def reply(**changes: Any) -> Reply:
    values: dict[str, Any] = {
        "id": "r1",
        "answer": "Paris",
        "confidence": 0.93,
        "decision": "answer",
        "reason": "confident",
        "route": "none",
        "calls": 1,
        "tokens": 1234,
        "target_risk": 0.1,
        "policy_version": "p1",
        "model_version": "m1",
        "seconds": 0.5,
        "trace": (),
    }
    return Reply.of({**values, **changes})


TRACE: list[dict[str, Any]] = [
    {"stage": "draft", "text": "a red bridge", "calls": 1, "tokens": 31, "seconds": 0.05, "signals": {"perplexity": 1.5}},
    {"stage": "score", "confidence": 0.42, "seconds": 0.004},
    {"stage": "turn", "number": 1, "speaker": "Ada", "text": "a red viaduct", "comment": "Look.", "changed": True,
     "attempts": 2, "tokens": 90, "seconds": 0.06},
    {"stage": "turn", "number": 2, "speaker": "Bo", "text": "a red viaduct", "comment": "", "changed": False, "seconds": 0.06},
]  # fmt: skip


def classes(page: Page) -> list[str]:
    return [str(attributes["class"]) for _, attributes in page.tags if "class" in attributes]


def test_an_answer_stands_with_its_confidence_and_its_cost() -> None:
    page = Page(answer_card(reply()))
    assert page.words[:2] == ["confidence 93 %", "Paris"]
    assert "The first draft was sure enough. 1 call, 1,234 tokens, 0.50 s" in page.text
    assert "policy p1 · request r1" in page.text
    assert "sr-card answer" in classes(page)
    assert "Given after refinement. 3 calls" in Page(answer_card(reply(reason="refined", calls=3))).text


def test_an_abstention_gives_its_reason_and_no_answer() -> None:
    unsure = reply(answer=None, decision="abstain", reason="unsure", confidence=0.4)
    page = Page(answer_card(unsure))
    assert page.words[:2] == ["abstained", "No answer: no answer was sure enough."]
    assert "· confidence 40 %" in page.text
    assert "sr-card abstain" in classes(page)
    unscored = Page(answer_card(reply(answer=None, decision="abstain", reason="scorer_unavailable", confidence=None)))
    assert "the answer could not be checked" in unscored.text
    assert "confidence" not in unscored.text


def test_no_text_becomes_markup() -> None:
    trace = [{**step, **({"text": EVIL, "comment": EVIL, "speaker": EVIL} if "text" in step else {})} for step in TRACE]
    signals = [{"stage": EVIL, "note": EVIL, "signals": {EVIL: 1.0}, "seconds": 0.0}]
    target = {"threshold": None, "reason": EVIL}
    for html in (
        answer_card(reply(answer=EVIL, id="r1", policy_version=EVIL)),
        answer_card(reply(answer=None, decision="abstain", reason=EVIL)),
        waiting_card([("stage", {"stage": EVIL})]),
        error_card(ApiError(422, "invalid_request", EVIL)),
        promise_line(target),
        dialogue(trace),
        steps_table([*trace, *signals]),
    ):
        page = Page(html)
        assert "script" not in {tag for tag, _ in page.tags}
        assert "alert(1)" in page.text


def test_while_nothing_is_decided_the_last_step_is_told_without_texts() -> None:
    assert "the primary drafts an answer …" in Page(waiting_card([])).text
    steps = [("stage", TRACE[1]), ("turn", TRACE[2])]
    page = Page(waiting_card(steps))
    assert page.words[-1] == "turn 1: Ada changed the answer …"
    assert "viaduct" not in page.text
    assert Page(waiting_card([*steps, ("restart", {})])).words[-1] == "the connection broke; asking again …"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ApiError(401, "unauthorized", "no"), "does not accept this page's token"),
        (ApiError(413, "too_large", "101 characters"), "does not take this question: 101 characters"),
        (ApiError(422, "invalid_request", "empty"), "does not take this question: empty"),
        (ApiError(429, "overloaded", "full"), "busy or not ready"),
        (ApiError(503, "unavailable", "starting"), "busy or not ready"),
        (ApiError(504, "deadline", "late"), "no answer in time"),
        (TimedOut("late"), "no answer in time"),
        (
            ApiError(500, "internal", "secret", "r9"),
            r"The server failed (internal). Its log has more under request r9.",
        ),
        (Unreachable("refused"), "cannot be reached"),
    ],
)
def test_every_error_is_told_in_words_and_a_failure_of_the_server_without_its_message(
    error: ClientError, words: str
) -> None:
    assert words in error_words(error)
    assert "secret" not in error_words(error)
    assert words in Page(error_card(error)).text


def test_the_promise_is_told_and_a_policy_that_gives_none_says_why() -> None:
    target = {"task": None, "target_risk": 0.1, "delta": 0.05, "threshold": 0.7, "n_calibration": 400, "reason": None}
    assert (
        "Promise: at most 10 % of the answers given are wrong, with probability 95 %" in Page(promise_line(target)).text
    )
    told = {**target, "threshold": None, "reason": "needs 22 answers"}
    assert Page(promise_line(told)).text == "Abstains on everything: needs 22 answers."
    assert promise_line(None) == ""


def test_a_dialogue_shows_what_every_turn_changed_and_marks_all_of_it_unchecked() -> None:
    page = Page(dialogue(TRACE))
    assert classes(page).count("sr-chip unchecked") == 3
    assert [tag for tag, _ in page.tags if tag in ("del", "ins")] == ["del", "ins"]
    words = [word for word in page.words if word.strip()]
    assert words[words.index("Ada") - 1 :] == [
        *("turn 1", "Ada", "unchecked", "changed the answer", "2 attempts", "a red ", "bridge", "viaduct", "Look."),
        *("turn 2", "Bo", "unchecked", "kept the answer", "a red viaduct"),
    ]


def test_a_draft_alone_is_no_dialogue() -> None:
    assert dialogue(TRACE[:2]) == ""


def test_the_table_has_a_row_for_every_step_with_its_confidence_signals_and_time() -> None:
    page = Page(steps_table([*TRACE, {"stage": "rescore", "confidence": 0.8, "signals": {"p_true": None}}]))
    assert sum(tag == "tr" for tag, _ in page.tags) == 1 + 5
    assert "draft calls 1, tokens 31 perplexity 1.5 50 ms" in page.text
    assert "score 42 % 4 ms" in page.text
    assert "turn 1: Ada attempts 2, tokens 90 60 ms" in page.text
    assert "rescore 80 % p_true not had 0 ms" in page.text
    assert "viaduct" not in page.text
    assert "Nothing asked yet." in Page(steps_table([])).text


@pytest.mark.parametrize("with_token", [False, True])
def test_the_commands_ask_the_same_question_whatever_stands_in_it(with_token: bool) -> None:
    body = {
        "question": 'It\'s "$HOME"; `rm`\n?',
        "context": "-x 'y'",
        "task": "art",
        "target_risk": 0.05,
        "include_trace": True,
    }
    curl, ask = commands("http://host:8000", body, with_token)
    words = shlex.split(curl.replace("\\\n", " "))
    assert words[:3] == ["curl", "-sS", "http://host:8000/v1/predict"]
    assert json.loads(words[words.index("-d") + 1]) == {**body, "include_trace": False}
    assert ("authorization: Bearer $STITCH_RAY_TOKEN" in words) == with_token
    expected = ["stitch-ray", "ask", body["question"], "--context", "-x 'y'", "--task", "art", "--risk", "0.05"]
    token = ["--token-env", "STITCH_RAY_TOKEN"] if with_token else []
    assert shlex.split(ask) == [*expected, "--url", "http://host:8000", *token]


def test_what_was_not_given_is_in_no_command() -> None:
    curl, ask = commands("http://host", {"question": "Who?"}, False)
    assert '{"question": "Who?"}' in curl
    assert ask == "stitch-ray ask 'Who?' --url http://host"

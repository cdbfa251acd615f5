"""Replies in JSON, and the distractors made of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch_ray.config.reliability import EndpointConfig
from stitch_ray.config.sample_answers import DistractorsConfig
from stitch_ray.engines.base import EngineError, Generation, Request
from stitch_ray.engines.openai_api import OpenAIEngine
from stitch_ray.reliability.answers.distractors import DistractorItem, ask, distractor_request
from stitch_ray.reliability.answers.replies import ReplyError, parse_answers, parse_verdict
from tests.fake_endpoint import Fault, serving


@pytest.mark.parametrize(
    ("reply", "answers", "repaired"),
    [
        ('["a", "b"]', ["a", "b"], False),
        ('```json\n["a", "b"]\n```', ["a", "b"], False),
        ('Sure, as in [1]: ["a", "b"] Anything else?', ["a", "b"], False),
        ('<think>["x", "y"] no</think>["a", "b"]', ["a", "b"], False),
        ('["a", "b", "c"]', ["a", "b"], False),
        ('{"answer2": "b", "answer1": "a", "id": 3}', ["a", "b"], False),
        ('{"answers": ["a", "b"]}', ["a", "b"], False),
        ('{"answer": {"answer1": "a", "answer2": "b"}}', ["a", "b"], False),
        ("[1815, 1.50]", ["1815", "1.50"], False),
        ('["a", "b",]', ["a", "b"], True),
        ("['a', 'b']", ["a", "b"], True),
        ('["say "hi" twice", "b"]', ['say "hi" twice', "b"], True),
        ('["a", "b"', ["a", "b"], True),
        ('See [1]: ["a" "b"]', ["a", "b"], True),
    ],
)
def test_answers_are_read_from_whole_and_broken_json(reply: str, answers: list[str], repaired: bool) -> None:
    found = parse_answers(reply, 2)
    assert (list(found.answers), found.repaired) == (answers, repaired)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("<think>[]</think>", "empty"),
        ("I'm sorry, I cannot help with that.", "refusal"),
        ('["a"]', "1 of 2"),
        ('["a"]["b"]', "1 of 2"),
        ('["a", null]', "answer 2 is no text"),
        ('["a", true]', "answer 2 is no text"),
        ('["a", {"text": "b"}]', "answer 2 is no text"),
        ('["a", " "]', "answer 2 is blank"),
        ('{"question": "a", "reference": "b"}', "object without answers"),
        ("{}", "object without answers"),
        ("[" * 100_000, "cannot be repaired"),
    ],
)
def test_replies_without_the_answers_are_errors_with_a_reason(reply: str, reason: str) -> None:
    with pytest.raises(ReplyError, match=reason):
        parse_answers(reply, 2)


def test_a_reply_that_was_cut_off_does_not_end_in_half_an_answer() -> None:
    reply = '["Denver Broncos", "Carolina Panthers", "New Engl'
    assert parse_answers(reply, 2, cut=True).answers == ("Denver Broncos", "Carolina Panthers")
    with pytest.raises(ReplyError, match="cut off"):
        parse_answers(reply, 3, cut=True)


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=6), st.booleans())
def test_any_list_of_texts_comes_back(answers: list[str], ascii_only: bool) -> None:
    reply = parse_answers(json.dumps(answers, ensure_ascii=ascii_only), len(answers))
    assert list(reply.answers) == [answer.strip() for answer in answers]
    assert not reply.repaired


@given(st.text(), st.booleans())
def test_no_reply_raises_anything_else(text: str, cut: bool) -> None:
    for reply in (text, "[" + text, '{"' + text):
        try:
            parse_answers(reply, 2, cut=cut)
            parse_verdict(reply)
        except ReplyError:
            pass


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [('{"correct": true}', (True, False)), ('So: {"correct": false}.', (False, False)), ("{'correct': True}", (True, True))],
)  # fmt: skip
def test_verdict_is_read(reply: str, verdict: tuple[bool, bool]) -> None:
    assert parse_verdict(reply) == verdict


@pytest.mark.parametrize(
    "reply",
    ["yes", "", '{"correct": "yes"}', '{"correct": 1}', '{"right": true}', "[true]", '{"correct": true}{"correct": false}'],
)  # fmt: skip
def test_no_verdict_is_made_up(reply: str) -> None:
    with pytest.raises(ReplyError):
        parse_verdict(reply)


ITEMS = [DistractorItem(item_id=name, question=f"who {name}?", reference="Ada") for name in "abc"]


def scripted(
    answer: Callable[[Request, int], str | EngineError], log: list[Request]
) -> Callable[[Sequence[Request]], list[list[Generation] | EngineError]]:
    """A generate function; `answer` gets the request and how often its item was asked before."""

    def generate(requests: Sequence[Request]) -> list[list[Generation] | EngineError]:
        results: list[list[Generation] | EngineError] = []
        for request in requests:
            text = answer(request, sum(earlier.request_id == request.request_id for earlier in log))
            log.append(request)
            whole = isinstance(text, str)
            results.append(
                [Generation(text=text, token_ids=(), finish_reason="stop", prompt_tokens=1)] if whole else text  # type: ignore[arg-type,list-item]
            )
        return results

    return generate


def test_useless_replies_are_asked_for_again_with_another_seed() -> None:
    replies = {"a": ['["x", "y"]'], "b": ["Sorry.", '["x" "y"]'], "c": ["", "[]", "{}"]}
    log: list[Request] = []
    found = ask(scripted(lambda request, times: replies[request.request_id][times], log), ITEMS, config())
    assert found.answers == (("x", "y"), ("x", "y"), ())
    assert list(found.failures) == ["c"]
    counts = found.counts
    assert (counts.asked, counts.retried, counts.repaired, counts.failed) == (3, 3, 1, 1)
    assert len({request.sampling.seed for request in log}) == len(log) == 6


def test_errors_that_may_pass_are_tried_again_and_others_are_not() -> None:
    def answer(request: Request, times: int) -> str | EngineError:
        if request.request_id == "a":
            return EngineError("a", "too long")
        return EngineError("b", "busy", retryable=True) if times == 0 else '["x", "y"]'

    log: list[Request] = []
    found = ask(scripted(answer, log), ITEMS, config())
    assert found.failures == {"a": "too long"}
    assert [request.request_id for request in log] == ["a", "b", "c", "b", "c"]


def test_at_temperature_zero_a_useless_reply_is_final() -> None:
    log: list[Request] = []
    found = ask(scripted(lambda *_: "no", log), ITEMS, config(temperature=0))
    assert (len(log), found.counts.failed, found.counts.retried) == (3, 3, 0)


def test_repeats_are_dropped_and_the_reference_is_kept() -> None:
    found = ask(scripted(lambda *_: '["Ada", "ada ", "Bob", "Eve"]', []), ITEMS[:1], config(num=4))
    assert found.answers == (("Ada", "Bob", "Eve"),)
    assert found.counts.repeats == 1


def test_a_prompt_and_seed_depend_on_the_item_alone() -> None:
    log: list[Request] = []
    ask(scripted(lambda *_: '["x", "y"]', log), ITEMS, config(), seed=1)
    ask(scripted(lambda *_: '["x", "y"]', log), ITEMS[2:], config(), seed=1)
    assert log[2] == log[3]
    other = distractor_request(ITEMS[2], config(), 0, seed=2)
    assert other.prompt == log[2].prompt
    assert other.sampling.seed != log[2].sampling.seed


def test_prompt_shows_question_context_and_reference_as_they_are() -> None:
    item = DistractorItem(item_id="a", question='who "$num"?', context="line 1\nline 2", reference="Zoë")
    (turn,) = distractor_request(item, config(num=7), 0, 0).prompt
    shown = json.loads(turn.content[turn.content.rindex("{") :])  # type: ignore[union-attr]
    assert shown == {"question": item.question, "context": item.context, "reference": item.reference}
    assert "list of 7 strings" in turn.content  # type: ignore[union-attr]


def test_distractors_come_from_an_endpoint_too() -> None:
    faults = [Fault(status=503), Fault(truncated=True)]
    with serving('Here: ["x", "y"]', faults=faults) as endpoint:
        engine = OpenAIEngine(EndpointConfig(url=endpoint.url, model="fake"), first_wait_s=0.01)
        found = ask(engine.generate_many, ITEMS, config())
    assert found.answers == (("x", "y"),) * 3
    assert found.counts.retried == 0  # the engine's own retries are not ours


def config(**options: float) -> DistractorsConfig:
    return DistractorsConfig(**{"num": 2, **options})  # type: ignore[arg-type]

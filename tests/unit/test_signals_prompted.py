"""P(True) and verbalised confidence: what is asked, what is read, and what stays unscored."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch_ray.engines.base import EngineError, Generation, Request
from stitch_ray.engines.hf import HfEngine
from stitch_ray.records import Turn
from stitch_ray.reliability.signals.prompted import p_true, parse_percentage, verbalized_confidence

pytestmark = pytest.mark.numeric

QUESTION = (Turn("system", "Be brief."), Turn("user", "What does $x cost, {in} dollars?"))


class Scripted:
    """Answers with what `reply` makes of a request; keeps the requests."""

    def __init__(self, reply):
        self.reply = reply
        self.requests: list[Request] = []

    def loglikelihood(self, requests):
        self.requests += requests
        return [self.reply(one) for one in requests]

    def generate(self, requests):
        self.requests += requests
        found = [self.reply(one) for one in requests]
        return [
            one if isinstance(one, EngineError)
            else [Generation(text=one, token_ids=(1,), finish_reason="stop", prompt_tokens=1)]
            for one in found
        ]  # fmt: skip


def words(**likelihoods):
    """By word, " True" as _true; a word without likelihood is refused."""

    def reply(request):
        value = likelihoods.get(request.continuation.replace(" ", "_").lower())
        return EngineError(request.request_id, "shares a token") if value is None else (value, False)

    return reply


# P(True)


@settings(deadline=None)
@given(st.lists(st.floats(-600, 0), min_size=4, max_size=4))
def test_p_true_is_the_share_of_true_among_true_and_false(values):
    true, spaced_true, false, spaced_false = values
    engine = Scripted(words(true=true, _true=spaced_true, false=false, _false=spaced_false))
    (found,) = p_true(engine, [(QUESTION, "5")])
    top = max(values)
    yes, no = (sum(math.exp(v - top) for v in pair) for pair in ((true, spaced_true), (false, spaced_false)))
    assert found == pytest.approx(yes / (yes + no), abs=1e-12)


def test_a_spelling_that_the_engine_refuses_is_left_out_on_both_sides():
    problems = Counter()
    (found,) = p_true(Scripted(words(_true=-1.0, _false=-2.0, true=-0.1)), [(QUESTION, "5")], problems)
    assert found == pytest.approx(1 / (1 + math.exp(-1)))
    assert not problems


def test_a_refusal_is_unscored_and_counted_once_an_answer():
    problems = Counter()
    found = p_true(Scripted(words()), [(QUESTION, "5"), (QUESTION, "6")], problems)
    assert np.isnan(found).all()
    assert problems == {"p_true: shares a token": 2}


def test_equal_answers_are_asked_about_once_and_blank_ones_never():
    engine = Scripted(lambda request: (-1.0 if "6 dollars" in request.prompt[-1].content else -3.0, False))
    asked = [(QUESTION, "5"), (QUESTION, ""), (QUESTION, " 5 "), (QUESTION, "6 dollars"), (QUESTION, "\n")]
    found = p_true(engine, asked)
    assert len(engine.requests) == 2 * 4
    assert np.isnan(found[[1, 4]]).all()
    np.testing.assert_allclose(found[[0, 2, 3]], 0.5)
    assert len(p_true(engine, [])) == 0


def test_the_prompt_keeps_the_conversation_and_whatever_signs_stand_in_it():
    engine = Scripted(words(true=-1.0, false=-1.0))
    p_true(engine, [(QUESTION, "${y} $answer {z}")])
    prompt = engine.requests[0].prompt
    assert prompt[0] == QUESTION[0]
    assert prompt[1].role == "user"
    assert QUESTION[1].content in prompt[1].content
    assert "${y} $answer {z}" in prompt[1].content


def test_p_true_of_a_model_is_that_of_its_next_token_probabilities(tiny_model):
    engine = HfEngine(str(tiny_model), dtype="float32", device="cpu")
    try:
        turns = (Turn("user", "What colour is the sky?"),)
        (found,) = p_true(engine, [(turns, "blue")])
        recorder = Scripted(words(true=-1.0, false=-1.0))
        p_true(recorder, [(turns, "blue")])
        prompt = recorder.requests[0].prompt

        def probability(word):
            stats = engine.token_statistics([Request(request_id="", prompt=prompt, continuation=word)])[0]
            return math.exp(sum(stats.logprobs))

        true, false = (sum(probability(w) for w in (word, " " + word)) for word in ("True", "False"))
        assert found == pytest.approx(true / (true + false), abs=1e-5)
    finally:
        engine.close()


# Verbalised confidence


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("85", 0.85), ("85%", 0.85), (" 85 %.\n", 0.85), ("\n\n7\nbecause", 0.07), ("0", 0.0), ("100", 1.0), ("1", 0.01),
        ("99.5", 0.995), ("0.85%", 0.0085), ("100.0%", 1.0), ("050", 0.5),
        ("0.85", None), ("1.0", None), ("101", None), ("100.5", None), ("-5", None), ("", None), ("  ", None),
        ("about 85", None), ("85 out of 100", None), ("8 5", None), ("85/100", None), ("nan", None), ("1e2", None),
        ("٨٥", 0.85), ("high", None), ("80-90", None),
    ],
)  # fmt: skip
def test_only_a_number_from_0_to_100_is_a_confidence(reply, value):
    found = parse_percentage(reply)
    assert math.isnan(found) if value is None else found == pytest.approx(value)


def test_unreadable_replies_and_refusals_are_unscored_and_counted():
    def reply(request):
        answer = request.prompt[-1].content
        if "too long" in answer:
            return EngineError(request.request_id, "exceeds the context")
        return "90%" if "good" in answer else "I am sure"

    engine, problems = Scripted(reply), Counter()
    asked = [(QUESTION, text) for text in ("good", "bad", "too long", "good", "", "worse")]
    found = verbalized_confidence(engine, asked, problems)
    np.testing.assert_array_equal(found, [0.9, math.nan, math.nan, 0.9, math.nan, math.nan])
    assert problems == {
        "verbalized_confidence: the reply is no number from 0 to 100": 2,
        "verbalized_confidence: exceeds the context": 1,
    }
    assert len(engine.requests) == 4
    assert all(one.sampling.temperature == 0 for one in engine.requests)

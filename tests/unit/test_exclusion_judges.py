"""Who says whether an answer is right: every judge answers each question in its place, and controls do as they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from stitch_ray.config.sample_answers import LabelsConfig
from stitch_ray.data import formats
from stitch_ray.data.readers import SourceRow
from stitch_ray.engines.base import EngineError, Request
from stitch_ray.engines.pretrained import load_tokenizer
from stitch_ray.exclusion.judges import ModelJudge, OracleJudge, RandomJudge, ScorerJudge, Verdict
from stitch_ray.exclusion.prompts import validator_prompt
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.reliability.answers.labels import Labeller
from stitch_ray.reliability.answers.questions import Question, question_of
from stitch_ray.reliability.probability import Isotonic
from stitch_ray.reliability.scorer.combined import ReliabilityScorer
from stitch_ray.reliability.scorer.file import ScorerFile
from stitch_ray.reliability.scorer.logistic import LogisticStack


def question(text: str = "Who?", answer: Any = "Ada", **more: Any) -> Question:
    record = {"question": text, "answer": answer, **more}
    return question_of(formats.convert(SourceRow("qa.jsonl", 1, "{}", record, None)), "q1")


class Engine:
    """Likelihoods by the answer that is judged: of CORRECT and of WRONG, each in both spellings; None: refused."""

    def __init__(self, odds: dict[str, tuple[float, float] | None]) -> None:
        self.odds = odds
        self.requests: list[Request] = []

    def loglikelihood(self, requests: list[Request]) -> list[tuple[float, bool] | EngineError]:
        self.requests += requests
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> tuple[float, bool] | EngineError:
        text = request.prompt[-1].content  # type: ignore[union-attr]
        odds = next(found for answer, found in self.odds.items() if answer in text)
        if odds is None:
            return EngineError(request.request_id, "exceeds the context")
        return math.log(odds["WRONG" in str(request.continuation)]), False


@pytest.fixture(scope="module")
def template(tiny_model: Path) -> ChatTemplate:
    return ChatTemplate.resolve("chat", load_tokenizer(str(tiny_model)))


def test_a_model_gives_the_share_of_its_two_words_and_a_refusal_stays_in_its_place(template: ChatTemplate) -> None:
    engine: Any = Engine({"Lovelace": (0.3, 0.1), "Grace": None, "Turing": (0.02, 0.08)})
    asked = [(question(), text) for text in ("Lovelace", "Grace", "Turing")]
    found = ModelJudge(engine, template, "judge").judge(asked)
    assert [one.probability for one in found] == [pytest.approx(0.75), None, pytest.approx(0.2)]
    assert [one.problem for one in found] == ["", "exceeds the context", ""]
    assert {request.adapter for request in engine.requests} == {"judge"}
    assert engine.requests[0].prompt == validator_prompt(question().turns, "Lovelace")
    prompt = template.render(engine.requests[0].prompt, add_generation_prompt=True)
    ids = template.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert (found[0].tokens, found[1].tokens) == (len(ids) + 1, 0)
    assert ModelJudge(engine, template).judge([]) == []


def test_the_oracle_accepts_what_any_gold_answer_says_and_knows_nothing_without_one() -> None:
    judge = OracleJudge(Labeller(LabelsConfig(metric="exact_match")))
    unknown = question()
    unknown = Question(**{name: getattr(unknown, name) for name in unknown.__slots__} | {"references": ()})
    found = judge.judge([(question(answer=["Ada", "Lovelace"]), "lovelace."), (question(), "Grace"), (unknown, "Ada")])
    assert found == [Verdict(1.0), Verdict(0.0), Verdict(None, 0, "no gold answer")]
    assert judge.judge([]) == []


def test_chance_accepts_its_share_of_the_answers_and_the_same_ones_in_every_run() -> None:
    asked = [(question(f"Question {number}?"), "an answer") for number in range(2000)]
    found = [one.probability for one in RandomJudge(0.3, seed=1).judge(asked)]
    assert set(found) == {0.0, 1.0}
    assert sum(found) / len(found) == pytest.approx(0.3, abs=0.04)  # type: ignore[arg-type]
    assert [one.probability for one in RandomJudge(0.3, seed=1).judge(asked[::-1])] == found[::-1]
    assert [one.probability for one in RandomJudge(0.3, seed=2).judge(asked)] != found
    other = [(asked_question, "another answer") for asked_question, _ in asked]
    assert [one.probability for one in RandomJudge(0.3, seed=1).judge(other)] != found


@pytest.mark.parametrize(("share", "verdict"), [(1.0, Verdict(1.0)), (0.0, Verdict(0.0))])
def test_a_share_of_one_accepts_all_and_of_none_nothing(share: float, verdict: Verdict) -> None:
    asked = [(question(f"Question {number}?"), "x") for number in range(50)]
    assert RandomJudge(share, seed=0).judge(asked) == [verdict] * 50


def test_a_scorer_that_needs_a_signal_gives_no_verdict_and_says_which() -> None:
    stack = LogisticStack(("perplexity",), (0.0,), (1.0,), (-1.0,), 0.0)
    isotonic = Isotonic((-10.0, 10.0), (0.0, 1.0))
    file = ScorerFile(
        encoder_fingerprint=None, loss=None, max_length=None, stack=stack, isotonic=isotonic, answers_from=None
    )
    (found,) = ScorerJudge(ReliabilityScorer(file, None)).judge([(question(), "Ada")])
    assert found == Verdict(None, 0, "no finite value of perplexity")

"""The primary answers, and measures its answers, as `sample-answers` did when the scorer was trained."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from stitch_ray.config.ensemble import EnsembleConfig, PrimaryConfig
from stitch_ray.config.sample_answers import SampleAnswersConfig
from stitch_ray.data import formats, readers
from stitch_ray.engines.base import EngineError
from stitch_ray.ensemble.asking import asked, unasked
from stitch_ray.ensemble.fingerprints import ensemble_fingerprints, local_member, primary_fingerprint
from stitch_ray.ensemble.members import load_primary
from stitch_ray.ensemble.primary import PrimaryModel
from stitch_ray.ensemble.types import Answer, Question
from stitch_ray.errors import UserError
from stitch_ray.reliability.answers.judging import Judging
from stitch_ray.reliability.answers.preflight import check
from stitch_ray.reliability.answers.questions import prompt_ids, question_of
from stitch_ray.reliability.answers.respondent import respondent
from stitch_ray.reliability.answers.sampling import answer_rows, distractor_rows, requests_for

pytestmark = pytest.mark.numeric

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]

NAMES = [
    "sequence_log_probability",
    "perplexity",
    "mean_token_entropy",
    "max_token_entropy",
    "mean_token_margin",
    "p_true",
    "self_consistency",
    "lexical_similarity",
    "semantic_entropy",
    "verbalized_confidence",
    "answer_length",
]
SEED = 5
OTHER = "Rome, the capital"
TOLERANCE = 1e-4  # the batches differ: float32 rounds sums of 2,000 products to 2e-4 of the largest at worst


def ensemble(model: Path, **primary: Any) -> EnsembleConfig:
    return EnsembleConfig.model_validate(
        {
            "primary": {"model": {"path": str(model), "dtype": "float32"}, "max_tokens": 8, **primary},
            "signals": {"samples": 4, "prompted": True, "temperature": 0.8, "top_p": 0.9},
        }
    )


@pytest.fixture(scope="module")
def questions(corpus_file: Path) -> list[Any]:
    """Planned questions, among them one with a context."""
    examples = [formats.convert(row) for row in readers.iter_rows(str(corpus_file))][:6]
    return [question_of(example, f"q{number}") for number, example in enumerate(examples)]


@pytest.fixture(scope="module")
def sampled(tiny_model: Path, corpus_file: Path, questions: list[Any]) -> dict[str, dict[str, Any]]:
    """Question -> the greedy answer of `sample-answers` with its signals."""
    config = SampleAnswersConfig.model_validate(
        {
            "data": {"paths": [str(corpus_file)]},
            "model": {"path": str(tiny_model), "dtype": "float32"},
            "samples": {"num": 4, "temperature": 0.8, "top_p": 0.9, "max_tokens": 8},
            "signals": {"names": NAMES},
            "labels": {"metric": "none"},
            "seed": SEED,
        }
    )
    ready = check(config)
    engine = respondent(config, ready.prompter).engine
    rows = []
    for question in questions:
        asks = requests_for(question, config.samples, SEED, together=False)
        rows += answer_rows(question, asks, engine.generate([one.request for one in asks]))
        rows += [{**dict.fromkeys(rows[0]), **row} for row in distractor_rows(question, [OTHER])]
    table, _ = Judging(config).signals(rows, {one.example_id: one for one in questions}, lambda: engine)
    found = {
        row["example_id"]: {"answer": row["answer"], "answers_from": ready.answers_from, **signals}
        for row, signals in zip(rows, table.to_pylist(), strict=True)
        if row["kind"] == "greedy"
    }
    for row, signals in zip(rows, table.to_pylist(), strict=True):
        if row["kind"] == "sample":
            found[row["example_id"]].setdefault("samples", []).append(row["answer"])
        elif row["kind"] == "distractor":
            found[row["example_id"]]["other"] = signals
    return found


@pytest.fixture(scope="module")
def runner() -> Any:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def primary(tiny_model: Path, runner: Run[Any]) -> Any:
    model = load_primary(ensemble(tiny_model), frozenset(NAMES), seed=SEED)
    yield model
    runner(model.close())


def same(found: dict[str, float | None], expected: dict[str, Any]) -> bool:
    for name in NAMES:
        value, other = found[name], expected[name]
        if (value is None) != (other is None):
            return False
        if value is not None and not math.isclose(value, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE):
            return False
    return True


def test_answers_and_all_signals_are_those_of_sample_answers(
    primary: PrimaryModel, sampled: dict[str, dict[str, Any]], questions: list[Any], runner: Run[Any]
) -> None:
    async def all_at_once() -> list[Answer]:
        return await asyncio.gather(*(primary.answer(unasked(question)) for question in questions))

    answers: list[Answer] = runner(all_at_once())
    for question, answer in zip(questions, answers, strict=True):
        expected = sampled[question.example_id]
        assert answer.text == expected["answer"]
        assert answer.samples == tuple(expected["samples"])
        assert same(dict(answer.signals), expected)
    assert {primary.fingerprint} == {one["answers_from"] for one in sampled.values()}
    json.dumps([answer.to_dict() for answer in answers], allow_nan=False)


def test_an_answer_of_somebody_else_has_the_signals_that_sample_answers_gives_a_distractor(
    primary: PrimaryModel, sampled: dict[str, dict[str, Any]], questions: list[Any], runner: Run[Any]
) -> None:
    for question in questions:
        expected = sampled[question.example_id]
        found: Answer = runner(primary.signals(unasked(question), OTHER, expected["samples"]))
        assert same(dict(found.signals), expected["other"])
        assert None not in [found.signals[name] for name in NAMES if name != "verbalized_confidence"]
        assert (found.text, found.samples) == (OTHER, tuple(expected["samples"]))


def test_calls_and_tokens_are_counted(primary: PrimaryModel, tiny_model: Path, runner: Run[Any]) -> None:
    question = Question(example_id="q", question="Capital of Italy?")
    template = local_member(ensemble(tiny_model).primary).prompter.chat_template()
    prompt = len(prompt_ids(asked(question).turns, template))
    other: Answer = runner(primary.signals(question, OTHER, ("a", "b")))
    assert other.calls == 1 + 4 + 1  # its tokens, four words of p_true, the confidence in words
    assert other.tokens > 6 * prompt
    plain = load_primary(ensemble(tiny_model), frozenset())
    alone: Answer = runner(plain.answer(question))
    runner(plain.close())
    assert (alone.calls, dict(alone.signals), alone.samples) == (1, {}, ())
    assert prompt <= alone.tokens <= prompt + 8


def test_what_a_question_is_asked_with_does_not_change_its_answer(primary: PrimaryModel, runner: Run[Any]) -> None:
    question = Question(example_id="q", question="Capital of Italy?")

    async def among_others() -> Answer:
        others = [Question(example_id=f"o{n}", question="Why? " * (n + 1)) for n in range(5)]
        answers = await asyncio.gather(*(primary.answer(one) for one in [*others, question]))
        return answers[-1]

    alone, crowded = runner(primary.answer(question)), runner(among_others())
    assert (alone.text, alone.samples) == (crowded.text, crowded.samples)
    assert same(dict(alone.signals), dict(crowded.signals))


def test_a_cancelled_question_leaves_the_model_usable(primary: PrimaryModel, runner: Run[Any]) -> None:
    async def run() -> Answer:
        tasks = [asyncio.create_task(primary.answer(Question(example_id=f"c{n}", question="Why?"))) for n in range(6)]
        for _ in range(20):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in ended)
        return await primary.answer(Question(example_id="q", question="Why?"))

    assert len(runner(run()).samples) == 4


def test_a_question_that_does_not_fit_is_an_error(primary: PrimaryModel, runner: Run[Any]) -> None:
    with pytest.raises(EngineError, match="prompt tokens"):
        runner(primary.answer(Question(example_id="q", question="why " * 5000)))


@pytest.mark.parametrize(
    ("names", "changes", "key"),
    [
        (["semantic_entropy"], {"signals": {}}, "signals.samples"),
        (["p_true"], {"signals": {}}, "signals.prompted"),
        (["p_true"], {"endpoint": True}, "cannot be had from endpoint"),
        (["perplexity"], {"endpoint": True, "route": True}, "primary.endpoint"),
        (["answer_length"], {"endpoint": True, "route": True}, "primary.endpoint"),
        (["of the moon"], {}, "of the moon"),
    ],
)
def test_signals_that_cannot_be_had_are_refused_before_anything_is_loaded(
    names: list[str], changes: dict[str, Any], key: str
) -> None:
    server = {"url": "http://127.0.0.1:9/v1", "model": "m"}
    values: dict[str, Any] = {
        "primary": {"model": {"path": "/no/such/model"}},
        "signals": changes.get("signals", {"prompted": True}),
    }
    if "endpoint" in changes:
        values["primary"] = {"endpoint": server}
    if "route" in changes:
        values["route"] = "dialogue"
        values["auxiliaries"] = [{"endpoint": {**server, "name": name}} for name in ("a", "b")]
    with pytest.raises(UserError, match=key):
        load_primary(EnsembleConfig.model_validate(values), frozenset(names))


def test_fingerprints_are_known_without_loading_and_change_with_what_they_stand_for(
    tiny_model: Path, primary: PrimaryModel
) -> None:
    config = ensemble(tiny_model)
    assert primary_fingerprint(config.primary) == primary.fingerprint
    stored = PrimaryConfig.model_validate({"model": {"path": str(tiny_model)}})
    assert primary_fingerprint(stored) != primary.fingerprint
    assert primary_fingerprint(ensemble(tiny_model, template="raw").primary) != primary.fingerprint
    marks = ensemble_fingerprints(config, "scorer")
    assert (marks.primary, marks.auxiliaries, marks.scorer, marks.route) == (primary.fingerprint, (), "scorer", "none")

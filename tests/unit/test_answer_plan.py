"""From rows to planned questions and their requests: what is asked, once, with which seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch_ray.batch_files import batch_file
from stitch_ray.config.sample_answers import SampleAnswersConfig, SamplesConfig
from stitch_ray.data import formats
from stitch_ray.data.quarantine import BadRow
from stitch_ray.data.readers import SourceRow
from stitch_ray.engines.base import EngineError, Generation, Request
from stitch_ray.records import Example, Turn, question_group
from stitch_ray.reliability.answers.plan import (
    PLAN_SCHEMA,
    Planned,
    batch_sizes,
    plan_batches,
    plan_table,
    rows_a_batch,
)
from stitch_ray.reliability.answers.questions import QUESTION_SCHEMA, Question, question_of
from stitch_ray.reliability.answers.sampler import AnswerJob, Sampler
from stitch_ray.reliability.answers.sampling import SAMPLE_SCHEMA, answer_rows, distractor_rows, requests_for
from stitch_ray.reliability.answers.templated import TemplatedEngine
from tests.fake_endpoint import Fault, serving


def example(record: dict[str, Any]) -> Example:
    return formats.convert(SourceRow("data.jsonl", 1, "{}", record, None))


def question(**record: Any) -> Question:
    return question_of(example(record), "q1")


def samples(**values: Any) -> SamplesConfig:
    return SamplesConfig(**{"num": 3, **values})


# Batches


@given(st.lists(st.integers(0, 40_000), max_size=200), st.integers(1, 50))
def test_plan_holds_every_question_once_in_order(tokens: list[int], least: int) -> None:
    questions = [Planned(f"q{n}", count) for n, count in enumerate(tokens)]
    batches = list(plan_batches(questions, least))
    assert [one for batch in batches for one in batch] == questions
    for batch in batches:
        assert len(batch) <= least
        assert len(batch) == 1 or sum(one.tokens for one in batch) <= 1024 * least
    table = plan_table(batches)
    assert table.schema.equals(PLAN_SCHEMA)
    assert batch_sizes(table) == [len(batch) for batch in batches]


def test_batches_grow_with_the_data_but_stay_small_for_small_data() -> None:
    assert [rows_a_batch(n) for n in (10, 64_000, 200_000, 10**8)] == [32, 32, 100, 1024]


def test_plan_of_a_server_has_no_lengths() -> None:
    assert plan_table([(Planned("a", 0),)])["tokens"].to_pylist() == [None]


# Questions


def test_question_is_what_stands_before_the_last_answer() -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Two and two?"},
        {"role": "assistant", "content": "Four."},
        {"role": "user", "content": "And one more?"},
        {"role": "assistant", "content": "Five."},
    ]
    found = question(messages=talk)
    assert found.turns == tuple(Turn(turn["role"], turn["content"]) for turn in talk[:4])
    assert found.question == "And one more?"
    assert found.context == "system: Be brief.\nuser: Two and two?\nassistant: Four."
    assert found.references == ("Five.",)
    assert found.group_id == question_group("Two and two?", None)


def test_context_stands_behind_the_question_in_the_prompt_and_alone_in_its_column() -> None:
    found = question(question="Which river?", context="The Rhine is a river.", answer=["The Rhine", "Rhine"])
    assert found.turns == (Turn("user", "Which river?\n\nThe Rhine is a river."),)
    assert (found.question, found.context) == ("Which river?", "The Rhine is a river.")
    assert found.references == ("The Rhine", "Rhine")
    assert found.asked == found.group_id == question_group("Which river?", "The Rhine is a river.")


def test_questions_that_differ_in_case_and_space_are_asked_once() -> None:
    one, other = (question(question=text, answer="x") for text in ("Which  river?", "which river? "))
    assert one.asked == other.asked
    assert one.asked != question(question="Which river?", context="There is one.", answer="x").asked


def test_example_without_an_answer_is_refused() -> None:
    alone = Example(messages=(Turn("user", "Well?"),), source="s", line=1, raw="")
    with pytest.raises(BadRow, match="no answer"):
        question_of(alone, "q1")


# Requests


def test_requests_are_one_greedy_and_the_samples_with_seeds_of_their_own() -> None:
    asked = requests_for(question(question="Q?", answer="A"), samples(), 0, together=False)
    assert [(one.kind, one.number, one.request.sampling.temperature) for one in asked] == [
        ("greedy", 0, 0.0),
        ("sample", 0, 1.0),
        ("sample", 1, 1.0),
        ("sample", 2, 1.0),
    ]
    assert len({one.request.sampling.seed for one in asked}) == 4
    assert all(one.request.sampling.token_stats for one in asked)
    assert [one.request.request_id for one in asked[:2]] == ["q1/greedy-0", "q1/sample-0"]


def test_together_the_samples_are_one_request() -> None:
    asked = requests_for(question(question="Q?", answer="A"), samples(num=4), 0, together=True)
    assert [(one.kind, one.request.sampling.num_samples) for one in asked] == [("greedy", 1), ("sample", 4)]
    assert len(requests_for(question(question="Q?", answer="A"), samples(num=0), 0, together=True)) == 1
    assert len(requests_for(question(question="Q?", answer="A"), samples(greedy=False), 0, together=True)) == 1


def test_seeds_depend_on_question_and_number_only() -> None:
    def seeds(text: str, seed: int, num: int = 3, answer: str = "A") -> list[int | None]:
        asked = requests_for(question(question=text, answer=answer), samples(num=num), seed, together=False)
        return [one.request.sampling.seed for one in asked]

    assert seeds("Q?", 0) == seeds(" q? ", 0, answer="another reference")
    assert seeds("Q?", 0, num=5)[:4] == seeds("Q?", 0)
    assert not set(seeds("Q?", 0)) & set(seeds("Q?", 1))
    assert not set(seeds("Q?", 0)) & set(seeds("Other?", 0))


# Rows


def generation(text: str, **values: Any) -> Generation:
    return Generation(**{"text": text, "token_ids": (), "finish_reason": "stop", "prompt_tokens": 3, **values})


def test_rows_number_the_answers_of_each_kind() -> None:
    asked = requests_for(one := question(question="Q?", answer="A"), samples(num=2), 0, together=True)
    local = generation("a", token_ids=(4, 5), logprobs=(-1.0, -2.0), entropies=(0.5, 0.1), margins=(0.2, 0.3))
    rows = answer_rows(one, asked, [[local], [generation("b"), generation("", logprobs=())]])
    assert [(row["kind"], row["number"], row["answer"], row["tokens"]) for row in rows] == [
        ("greedy", 0, "a", 2),
        ("sample", 0, "b", None),
        ("sample", 1, "", 0),
    ]
    table = pa.Table.from_pylist([*rows, *distractor_rows(one, ["w"])], SAMPLE_SCHEMA)
    assert table["margins"][0].as_py() == pytest.approx([0.2, 0.3])
    assert table["token_ids"].to_pylist() == [[4, 5], None, None, None]
    assert table["kind"][3].as_py() == "distractor"


def test_one_failed_request_fails_the_question() -> None:
    asked = requests_for(one := question(question="Q?", answer="A"), samples(num=2), 0, together=True)
    rows = answer_rows(one, asked, [[generation("a")], EngineError("q1/sample-0", "HTTP 500")])
    assert rows == [{"example_id": "q1", "kind": "", "number": 0, "error": "HTTP 500"}]


# The template


class _Template:
    """Knows no system turns; a token is a character."""

    def render(self, turns: tuple[Turn, ...], add_generation_prompt: bool) -> str:
        assert add_generation_prompt
        if turns[0].role == "system":
            raise BadRow("no system turns")
        return "".join(f"[{turn.content}]" for turn in turns)

    @staticmethod
    def tokenizer(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}


class _Echo:
    info = None

    def generate(self, requests: list[Request]) -> list[list[Generation]]:
        return [[generation("".join(map(chr, request.prompt)))] for request in requests]  # type: ignore[arg-type]


def test_conversations_go_through_the_template_of_the_job_and_refusals_stay_in_their_slot() -> None:
    engine = TemplatedEngine(_Echo(), _Template())  # type: ignore[arg-type]
    prompts: list[Any] = [(Turn("user", "a"),), (Turn("system", "b"),), (120, 121), (Turn("user", "c"),)]
    found = engine.generate([Request(request_id=str(n), prompt=prompt) for n, prompt in enumerate(prompts)])
    assert isinstance(found[1], EngineError)
    assert found[1].reason == "no system turns"
    assert [result[0].text for result in found if not isinstance(result, EngineError)] == ["[a]", "xy", "[c]"]


# The actor, without Ray


def job_of(folder: Path, url: str, questions: Sequence[Question]) -> AnswerJob:
    """Everything to answer one batch with a server."""
    config = SampleAnswersConfig.model_validate(
        {
            "data": {"paths": ["-"]},
            "endpoint": {"url": url, "model": "fake", "max_retries": 0, "concurrency": 1},
            "samples": {"num": 2},
            "signals": {"names": ["self_consistency"]},
        }
    )
    for name in ("questions", "attempts"):
        (folder / name).mkdir()
    table = pa.Table.from_pylist([asdict(one) for one in questions], QUESTION_SCHEMA)
    pq.write_table(table, batch_file(folder / "questions", 0))
    return AnswerJob(
        config=config,
        prompter=None,
        name="fake",
        questions=folder / "questions",
        samples=folder / "samples",
        labels=folder / "labels-a",
        signals=folder / "signals-b",
        attempts=folder / "attempts",
    )


def do(job: AnswerJob) -> dict[str, Any]:
    """What the actor returns for batch 0."""
    return {key: values[0] for key, values in Sampler(job)({"batch_id": np.array([0])}).items()}


def test_actor_writes_a_file_a_stage_and_says_what_it_cost(tmp_path: Path) -> None:
    questions = [question_of(example({"question": f"Q{n}?", "answer": "yes"}), f"q{n}") for n in range(3)]
    with serving("yes") as server:
        job = job_of(tmp_path, server.url, questions)
        assert not job.is_done(0)
        cost = do(job)
        asked = len(server.seen)
    assert (cost["error"], cost["questions"], cost["failed"], cost["answers"], cost["tokens"]) == ("", 3, 0, 9, 9)
    assert asked == 6  # two requests a question
    assert job.is_done(0)
    assert pq.read_table(tmp_path / "labels-a" / "000000.parquet")["label"].to_pylist() == [1.0] * 9
    assert pq.read_table(tmp_path / "signals-b" / "000000.parquet")["self_consistency"].to_pylist() == [1.0] * 9


def test_labels_that_a_dead_judge_left_out_and_torn_files_are_to_do(tmp_path: Path) -> None:
    with serving("yes") as server:
        job = job_of(tmp_path, server.url, [question(question="Q?", answer="yes")])
        do(job)
    file = batch_file(tmp_path / "labels-a", 0)
    whole = file.read_bytes()
    table = pq.read_table(file)
    pq.write_table(table.replace_schema_metadata({"counts": '{"judge_failed": 1}'}), file)
    assert not job.is_done(0)
    file.write_bytes(whole[: len(whole) // 2])
    assert not job.is_done(0)
    assert not file.exists()


def test_question_that_fails_is_asked_again_by_a_server_and_its_old_labels_go(tmp_path: Path) -> None:
    questions = [question_of(example({"question": f"Q{n}?", "answer": "yes"}), f"q{n}") for n in range(3)]
    with serving("yes", faults=[Fault(status=400, message="busy")]) as server:
        job = job_of(tmp_path, server.url, questions)
        first = do(job)
        assert (first["failed"], first["reason"]) == (1, "HTTP 400: busy")
        assert len(job.unanswered(0)) == 1
        assert not job.is_done(0)
        second = do(job)
    assert (second["failed"], second["answers"]) == (0, 3)
    samples = pq.read_table(batch_file(tmp_path / "samples", 0))
    assert samples["example_id"].to_pylist() == ["q0"] * 3 + ["q1"] * 3 + ["q2"] * 3
    assert pq.read_table(batch_file(tmp_path / "labels-a", 0)).num_rows == 9
    assert job.is_done(0)


def test_batch_that_takes_its_worker_down_is_given_up(tmp_path: Path) -> None:
    with serving("yes") as server:
        job = job_of(tmp_path, server.url, [question(question="Q?", answer="yes")])
        (tmp_path / "attempts" / "000000").write_text("xxx")
        assert "took its worker down 3 times" in do(job)["error"]
    assert not job.is_done(0)

"""From the files of all batches to the tables of a run: every attempt, and what became of every question."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.batch_files import batch_file
from stitch_ray.data.quarantine import Quarantined
from stitch_ray.exclusion.refinement import Attempt, Refinement
from stitch_ray.exclusion.refining.worker import RefineJob, rules_of
from stitch_ray.reliability.answers.labels import Labelled, Labeller
from stitch_ray.reliability.answers.questions import Question, read_questions
from stitch_ray.runs import atomic_path

REFINED, ATTEMPTS = "refined.parquet", "attempts.parquet"
ATTEMPT_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("group_id", pa.string()),
        ("number", pa.int32()),
        ("answer", pa.string()),
        ("temperature", pa.float64()),
        ("checked", pa.string()),
        ("probability", pa.float64()),
        ("logprob", pa.float64()),
        ("tokens", pa.int32()),
        ("validator_tokens", pa.int32()),
        ("label", pa.float64()),
        ("correct", pa.bool_()),
    ]
)
"""One row an attempt, numbered from 0. `label`: how right the answer is, and `correct`; null: not labelled."""

REFINED_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("group_id", pa.string()),
        ("question", pa.string()),
        ("context", pa.string()),
        ("references", pa.list_(pa.string())),
        ("first", pa.string()),
        ("first_probability", pa.float64()),
        ("first_correct", pa.bool_()),
        ("answer", pa.string()),
        ("confidence", pa.float64()),
        ("decision", pa.string()),
        ("reason", pa.string()),
        ("correct", pa.bool_()),
        ("attempts", pa.int32()),
        ("repeats", pa.int32()),
        ("calls", pa.int32()),
        ("tokens", pa.int64()),
    ]
)
"""One row a question. `answer` null: abstained. `reason`: accepted, unjudged, exhausted, cycle, or failed (the model
could not answer again). `correct` null: abstained, or not labelled."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The tables, and the questions that got no answer at all."""

    refined: pa.Table
    attempts: pa.Table
    failed: tuple[Quarantined, ...]
    problems: Counter[str]


def put_together(job: RefineJob, path: Path, batches: int) -> Outcome:
    """Write `refined.parquet` and `attempts.parquet`. Raises RuntimeError if more than half of the questions failed."""
    questions: list[Question] = []
    states: list[Refinement] = []
    failed: list[Quarantined] = []
    stopped: dict[str, str] = {}
    rules = rules_of(job.config)
    for batch in range(batches):
        rows = pq.read_table(batch_file(job.results, batch)).to_pylist()
        for question, row in zip(read_questions(batch_file(job.questions, batch)), rows, strict=True):
            attempts = tuple(Attempt(**one) for one in json.loads(row["trace"]))
            if not attempts:
                failed.append(
                    Quarantined.of(question.source, question.line, row["problem"], question.question, row["example_id"])
                )
                continue
            if row["problem"] is not None:
                stopped[row["example_id"]] = row["problem"]
            questions.append(question)
            states.append(Refinement(rules, attempts))
    if 2 * len(failed) > len(failed) + len(questions):
        raise RuntimeError(
            f"{len(failed)} of {len(failed) + len(questions)} questions got no answer from {job.name}; "
            f"the first: {failed[0].reason}"
        )
    labels = _labels(job, questions, states)
    rows, of_questions = [], []
    for question, state, own in zip(questions, states, labels, strict=True):
        base = {"example_id": question.example_id, "group_id": question.group_id}
        for number, (attempt, (label, correct)) in enumerate(zip(state.trace(), own, strict=True)):
            rows.append({**base, "number": number, **attempt, "label": label, "correct": correct})
        of_questions.append({**base, **_question(question, state, own)})
    refined = pa.Table.from_pylist(sorted(of_questions, key=lambda row: row["example_id"]), REFINED_SCHEMA)
    attempted = pa.Table.from_pylist(sorted(rows, key=lambda row: (row["example_id"], row["number"])), ATTEMPT_SCHEMA)
    for name, table in ((ATTEMPTS, attempted), (REFINED, refined)):
        with atomic_path(path / name) as temporary:
            pq.write_table(table, temporary, write_page_checksum=True)
    return Outcome(refined, attempted, tuple(failed), Counter(stopped.values()))


_Label = tuple[float | None, bool | None]


def _labels(job: RefineJob, questions: Sequence[Question], states: Sequence[Refinement]) -> list[list[_Label]]:
    """Label and correctness of every attempt."""
    if job.config.labels.metric == "none":
        return [[(None, None)] * len(state.attempts) for state in states]
    items = [
        Labelled(question=one.question, answer=attempt.answer, references=one.references, context=one.context)
        for one, state in zip(questions, states, strict=True)
        for attempt in state.attempts
    ]
    found = Labeller(job.config.labels).label(items)
    every = iter(
        (None if math.isnan(label) else float(label), correct)
        for label, correct in zip(found.label, found.correct, strict=True)
    )
    return [[next(every) for _ in state.attempts] for state in states]


def _question(question: Question, state: Refinement, labels: Sequence[_Label]) -> dict[str, Any]:
    outcome = state.outcome
    answer = None if outcome is None else outcome.answer
    return {
        "question": question.question,
        "context": question.context,
        "references": list(question.references),
        "first": state.attempts[0].answer,
        "first_probability": state.attempts[0].probability,
        "first_correct": labels[0][1],
        "answer": answer,
        "confidence": None if outcome is None else outcome.confidence,
        "decision": "abstain" if answer is None else "answer",
        "reason": "failed" if outcome is None else outcome.reason,
        "correct": None if answer is None else labels[-1][1],
        "attempts": len(state.attempts),
        "repeats": state.repeats,
        "calls": state.calls,
        "tokens": state.tokens,
    }

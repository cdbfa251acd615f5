"""From the files of all batches to the tables of a run: answers, signals, and the references, which stand alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stitch_ray.batch_files import batch_file, counts_of
from stitch_ray.data.quarantine import Quarantined
from stitch_ray.data.splits import split_among
from stitch_ray.records import ANSWER_SCHEMA
from stitch_ray.reliability.answers.preflight import Ready
from stitch_ray.reliability.answers.questions import QUESTION_SCHEMA, Questions
from stitch_ray.reliability.answers.sampler import AnswerJob, failures
from stitch_ray.reliability.tables import ANSWERS, SIGNALS
from stitch_ray.runs import atomic_path

REFERENCES = "references.parquet"
_REFERENCES_SCHEMA = pa.schema([("example_id", pa.string()), ("references", pa.list_(pa.string()))])


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has found: its tables by answer id, and what was counted on the way.

    `questions` holds those that were answered; `failed` the others, with the reason. `counted`: stage (samples, labels,
    signals) -> what -> how often.
    """

    answers: pa.Table
    signals: pa.Table | None
    questions: pa.Table
    failed: tuple[Quarantined, ...]
    counted: Mapping[str, Mapping[str, int]]


def put_together(ready: Ready, path: Path, job: AnswerJob, questions: Questions) -> Outcome:
    """Write `answers.parquet`, `references.parquet` and, where there are signals, `signals.parquet`.

    Raises RuntimeError, with the first reason, if more than half of the questions have no answer.
    """
    parts, asked, failed = [], [], []
    counted: dict[str, Counter[str]] = {"samples": Counter(), "labels": Counter(), "signals": Counter()}
    for batch in range(len(questions.sizes)):
        of_batch = pq.read_table(questions.file(batch), schema=QUESTION_SCHEMA)
        samples = batch_file(job.samples, batch)
        reasons = failures(samples)
        counted["samples"].update(counts_of(samples))
        answers = pq.read_table(samples)
        answers = answers.filter(pc.is_null(answers["error"]))
        for stage, folder in (("labels", job.labels), ("signals", job.signals)):
            if folder is not None:
                file = batch_file(folder, batch)
                counted[stage].update(counts_of(file))
                answers = _beside(answers, pq.read_table(file), file)
        parts.append(_with_questions(answers, of_batch))
        asked.append(of_batch)
        failed += _failed(of_batch, reasons)
    if 2 * len(failed) > len(questions):
        raise RuntimeError(
            f"{len(failed)} of {len(questions)} questions got no answer from {ready.name}; "
            f"the first: {failed[0].reason}"
        )
    labels = counted["labels"]
    if 2 * labels["judge_failed"] > labels["judge_asked"]:
        raise RuntimeError(
            f"labels.judge: no reply for {labels['judge_failed']} of {labels['judge_asked']} answers; "
            "run the same command again when the judge can be reached"
        )
    table = pa.concat_tables(parts, promote_options="permissive")
    table = table.take(pc.sort_indices(table, sort_keys=[("answer_id", "ascending")]))
    lost = pa.array([row.example_id for row in failed], pa.string())
    everyone = pa.concat_tables(asked)
    answered = everyone.filter(pc.invert(pc.is_in(everyone["example_id"], lost)))
    answers = _answer_table(table, ready)
    signals = _signal_table(table, ready)
    references = answered.select(_REFERENCES_SCHEMA.names)
    references = references.take(pc.sort_indices(references, sort_keys=[("example_id", "ascending")]))
    _write(path / REFERENCES, references.cast(_REFERENCES_SCHEMA))
    if signals is not None:
        _write(path / SIGNALS, signals)
    else:
        (path / SIGNALS).unlink(missing_ok=True)  # of an earlier run in this folder, which wanted some
    _write(path / ANSWERS, answers)
    return Outcome(
        answers, signals, answered, tuple(failed), {key: dict(sorted(c.items())) for key, c in counted.items()}
    )


def splits_of(group_ids: list[str], ready: Ready) -> list[str]:
    """The split of every group id."""
    split = ready.config.split
    return [split_among(group, split.shares, split.salt) for group in group_ids]


def _beside(answers: pa.Table, made: pa.Table, file: Path) -> pa.Table:
    """`answers` with the columns that a stage has made of them, row for row."""
    if made.num_rows != answers.num_rows:
        raise RuntimeError(f"{file} does not belong to the answers beside it; remove it and run the same command again")
    for name in made.column_names:
        answers = answers.append_column(made.schema.field(name), made[name])
    return answers


def _with_questions(answers: pa.Table, questions: pa.Table) -> pa.Table:
    """`answers` with their ids and what belongs to their questions, but for the references."""
    rows = pc.index_in(answers["example_id"], questions["example_id"])
    for name in ("group_id", "task", "question", "context"):
        answers = answers.append_column(name, questions[name].take(rows))
    number = pc.cast(answers["number"], pa.string())
    last = pc.binary_join_element_wise(answers["kind"], number, "-")
    return answers.append_column("answer_id", pc.binary_join_element_wise(answers["example_id"], last, "/"))


def _answer_table(table: pa.Table, ready: Ready) -> pa.Table:
    rows = table.num_rows
    split = pa.array(splits_of(table["group_id"].to_pylist(), ready), pa.string())
    label = table["label"] if "label" in table.column_names else pa.nulls(rows, pa.float32())
    correct = pc.greater_equal(pc.cast(label, pa.float32()), pa.scalar(ready.config.labels.threshold, pa.float32()))
    made = {"split": split, "label": label, "correct": correct}
    columns = [made[name] if name in made else table[name] for name in ANSWER_SCHEMA.names]
    return pa.table(columns, names=ANSWER_SCHEMA.names).cast(ANSWER_SCHEMA)


def _signal_table(table: pa.Table, ready: Ready) -> pa.Table | None:
    names = list(ready.config.signals.names)
    return table.select(["answer_id", *names]) if names else None


def _failed(questions: pa.Table, reasons: Mapping[str, str]) -> list[Quarantined]:
    rows = questions.filter(pc.is_in(questions["example_id"], pa.array(list(reasons), pa.string()))).to_pylist()
    return [
        Quarantined.of(row["source"], row["line"], reasons[row["example_id"]], row["question"], row["example_id"])
        for row in rows
    ]


def _write(path: Path, table: pa.Table) -> None:
    with atomic_path(path) as temporary:
        pq.write_table(table.replace_schema_metadata(None).combine_chunks(), temporary)

"""Which questions are asked together: decided once, before any is asked, by the data alone.

A chunk is the unit of work, of retry and of resume: one file when it is done.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.batch_files import batch_file
from stitch_ray.config.predict import PredictConfig
from stitch_ray.data.corpus import Corpus
from stitch_ray.data.quarantine import Quarantined
from stitch_ray.data.splits import split_among
from stitch_ray.ensemble.asking import Asked as Planned
from stitch_ray.ensemble.asking import unasked
from stitch_ray.ensemble.types import Question
from stitch_ray.records import MESSAGES_TYPE, Turn
from stitch_ray.reliability.answers.plan import rows_a_batch
from stitch_ray.reliability.answers.questions import Prompter, plan_questions, read_questions
from stitch_ray.runs import atomic_path, fresh_folder, write_json

CHUNK_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("group_id", pa.string()),
        ("split", pa.string()),
        ("asked", pa.string()),
        ("task", pa.string()),
        ("history", MESSAGES_TYPE),
        ("question", pa.string()),
        ("context", pa.string()),
        ("references", pa.list_(pa.string())),
        ("source", pa.string()),
        ("line", pa.int64()),
    ]
)
_MARKER = "chunks.json"
_LEAST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Chunks:
    """The questions of a run: files by chunk, and what became of the other rows."""

    folder: Path
    sizes: tuple[int, ...]
    dropped: dict[str, int]
    quarantined: tuple[Quarantined, ...]

    def __len__(self) -> int:
        return sum(self.sizes)

    def file(self, chunk: int) -> Path:
        return batch_file(self.folder, chunk)


@dataclass(frozen=True, slots=True)
class Asked:
    """One row of a chunk: the question, and what is known about it that no model is told."""

    question: Question
    group_id: str
    split: str
    asked: str
    references: tuple[str, ...]
    source: str
    line: int


def plan_chunks(folder: Path, corpus: Corpus, config: PredictConfig, prompter: Prompter | None) -> Chunks:
    """Write the questions of `corpus` by chunk below `folder`, or open what is there already. Needs a Ray session.

    Questions that ask the same are one; those of splits that are not wanted are left out. `prompter` renders the
    primary's prompts, so that a row it cannot be asked is found before; None: a server does. Raises UserError if two
    different records carry the same id.
    """
    if not (folder / _MARKER).exists():
        _write(fresh_folder(folder), corpus, config, prompter)
    marker = json.loads((folder / _MARKER).read_text("utf-8"))
    quarantined = tuple(Quarantined(**row) for row in marker["quarantined"])
    return Chunks(folder, tuple(marker["sizes"]), marker["dropped"], quarantined)


def read_chunk(file: Path) -> list[Asked]:
    """The questions of one chunk, in their order."""
    return [
        Asked(
            question=Question(
                example_id=row["example_id"],
                question=row["question"],
                context=row["context"],
                task=row["task"],
                history=tuple(Turn(turn["role"], turn["content"]) for turn in row["history"]),
            ),
            group_id=row["group_id"],
            split=row["split"],
            asked=row["asked"],
            references=tuple(row["references"]),
            source=row["source"],
            line=row["line"],
        )
        for row in pq.read_table(file).to_pylist()
    ]


def _write(folder: Path, corpus: Corpus, config: PredictConfig, prompter: Prompter | None) -> None:
    planned = plan_questions(folder / "planned", folder / "plan.parquet", corpus, prompter)
    bad: list[Quarantined] = list(planned.quarantined)
    left_out = 0

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal left_out
        for batch in range(len(planned.sizes)):
            for one in read_questions(planned.file(batch)):
                split = split_among(one.group_id, config.split.shares, config.split.salt)
                if config.splits and split not in config.splits:
                    left_out += 1
                    continue
                try:
                    yield _row(one, unasked(one), split)
                except ValueError as error:
                    bad.append(Quarantined.of(one.source, one.line, str(error), one.question, one.example_id))

    size = rows_a_batch(len(planned), _LEAST_ROWS)
    sizes: list[int] = []
    stream = rows()
    while chunk := list(islice(stream, size)):
        with atomic_path(batch_file(folder, len(sizes))) as temporary:
            pq.write_table(pa.Table.from_pylist(chunk, CHUNK_SCHEMA), temporary)
        sizes.append(len(chunk))
    dropped = dict(planned.dropped)
    if config.splits:
        dropped[f"of other splits than {', '.join(config.splits)}"] = left_out
    write_json(folder / _MARKER, {"sizes": sizes, "dropped": dropped, "quarantined": [row.as_dict() for row in bad]})


def _row(planned: Planned, question: Question, split: str) -> dict[str, Any]:
    return {
        "example_id": planned.example_id,
        "group_id": planned.group_id,
        "split": split,
        "asked": planned.asked,
        "task": planned.task,
        "history": [{"role": turn.role, "content": turn.content} for turn in question.history],
        "question": question.question,
        "context": question.context,
        "references": list(planned.references),
        "source": planned.source,
        "line": planned.line,
    }

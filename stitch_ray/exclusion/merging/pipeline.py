"""From labelled answers to DATASET+: `dataset_plus.parquet`, and what validator, scorer and EXAR model learn from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.data.splits import split_of
from stitch_ray.exclusion.datasets import Distinct, balanced, exar_records, merge, validator_records
from stitch_ray.exclusion.labels import CORRECT
from stitch_ray.exclusion.merging.preflight import Ready
from stitch_ray.runs import Progress, RunFolder, Summary, atomic_path, write_text

DATASET_PLUS, VALIDATOR, EXAR, ANSWERS = "dataset_plus.parquet", "validator.jsonl", "exar.jsonl", "answers.jsonl"
SCHEMA = pa.schema(
    [
        ("answer_id", pa.string()),
        ("group_id", pa.string()),
        ("split", pa.string()),
        ("question", pa.string()),
        ("context", pa.string()),
        ("gold", pa.list_(pa.string())),
        ("prediction", pa.string()),
        ("label", pa.string()),
        ("human", pa.string()),
        ("num", pa.int32()),
        ("temperatures", pa.list_(pa.float64())),
        ("rouge_f", pa.float64()),
        ("bert_f", pa.float64()),
    ]
)
"""One row a distinct answer to a question. `num`: how often it was given; `split`: train or test."""


@dataclass(frozen=True, slots=True)
class Made:
    """`everything`: the distinct answers; `train`: those of the train split, balanced. `dropped`: reason -> rows."""

    everything: tuple[Distinct, ...]
    splits: Mapping[str, str]
    train: tuple[Distinct, ...]
    learned: tuple[Distinct, ...]
    dropped: Mapping[str, int]

    def counts(self) -> dict[str, int]:
        """Of the finished dataset."""
        labels = [row.answer.label for row in self.everything]
        return {
            "distinct answers": len(labels),
            "of them CORRECT": labels.count(CORRECT),
            "questions": len(self.splits),
            "questions held out": list(self.splits.values()).count("test"),
            "answers to learn from": len(self.train),
            "of them CORRECT to learn from": sum(row.answer.label == CORRECT for row in self.train),
        }


def make(ready: Ready) -> Made:
    """The dataset, in memory."""
    config = ready.config
    usable = [row for row in ready.answers if row.group_id not in ready.seen]
    everything = merge(usable, config.key)
    splits = {
        row.answer.group_id: split_of(row.answer.group_id, 0.0, config.split.test, config.split.salt)
        for row in everything
    }
    learned = [row for row in everything if splits[row.answer.group_id] == "train"]
    train = balanced(learned, config.balance, config.seed)
    kept = sum(row.num for row in everything)
    dropped = {
        "answers to questions that a model learned from": len(ready.answers) - len(usable),
        "equal answers to another question (key: answer)": len(usable) - kept,
    }
    return Made(tuple(everything), splits, tuple(train), tuple(learned), {why: n for why, n in dropped.items() if n})


def check_cluster(ready: Ready, path: Path) -> None:
    """Nothing here needs a cluster."""


def run(ready: Ready, folder: RunFolder, progress: Progress = lambda step: None) -> Summary:
    """Write the dataset and the three files that stages learn from, which hold questions of the train split only."""
    made = make(ready)
    path = folder.path
    rows = [_row(row, made.splits[row.answer.group_id]) for row in made.everything]
    with atomic_path(path / DATASET_PLUS) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary)
    _write_lines(path / VALIDATOR, validator_records(made.train, gold=ready.config.gold))
    _write_lines(path / EXAR, exar_records(made.learned))
    _write_lines(path / ANSWERS, [_answer(row) for row in made.everything])
    folder.manifest.update(
        rows_in=len(ready.answers),
        rows_out=sum(row.num for row in made.everything),
        rows_quarantined=0,
        rows_dropped=dict(made.dropped),
        records_written=len(made.everything),
        inputs=dict.fromkeys(ready.config.answers, ready.work["inputs"]),
        counts=made.counts(),
    )
    folder.finish()
    text = "\n".join(f"{name:<30} {count:>8}" for name, count in made.counts().items())
    line = f"exar merge: {len(ready.answers)} answers, {len(made.everything)} distinct -> {path / DATASET_PLUS}"
    return Summary(path, folder.manifest, line, text)


def _row(row: Distinct, split: str) -> dict[str, Any]:
    answer = row.answer
    names = ("group_id", "question", "context", "prediction", "label", "human", "rouge_f", "bert_f")
    return {
        **{name: getattr(answer, name) for name in names},
        "gold": list(answer.gold),
        "answer_id": row.answer_id,
        "split": split,
        "num": row.num,
        "temperatures": list(row.temperatures),
    }


def _answer(row: Distinct) -> dict[str, Any]:
    """As `train-scorer` and `calibrate` read answers."""
    context = {"context": row.answer.context} if row.answer.context else {}
    return {
        "answer_id": row.answer_id,
        "question": row.answer.question,
        **context,
        "answer": row.answer.prediction,
        "correct": row.answer.label == CORRECT,
    }


def _write_lines(path: Path, records: Iterable[Mapping[str, Any]] | Sequence[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))

"""Labelled answers as one table, from run folders of `sample-answers` or from files that people bring."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stitch_ray.config.reliability import SIGNAL_NAMES, AnswerSplitConfig
from stitch_ray.data import readers
from stitch_ray.data.corpus import inputs_hash
from stitch_ray.data.json_stream import is_utf8_text
from stitch_ray.data.quarantine import BadRow, Quarantined
from stitch_ray.data.splits import split_among
from stitch_ray.errors import UserError
from stitch_ray.records import ANSWER_SCHEMA, content_hash, question_group
from stitch_ray.reliability.answering import common
from stitch_ray.runs import read_manifest

ANSWERS, SIGNALS = "answers.parquet", "signals.parquet"
"""Files of a `sample-answers` run folder. `signals.parquet` has `answer_id` and a column a signal."""

_CORRECT_FROM = 0.5
_EXTRA = (*SIGNAL_NAMES, "confidence")


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers by answer id. `signals`: name -> (rows,) float64, NaN where it was not computed.

    `answers_from` is the fingerprint of the model and prompt that gave the answers, `answering` the settings that all of
    them have in common; None: files do not say.
    """

    table: pa.Table
    signals: Mapping[str, NDArray[np.float64]]
    split: AnswerSplitConfig
    answers_from: str | None
    rows_in: int
    quarantined: tuple[Quarantined, ...]
    answering: Mapping[str, Any] | None = None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> NDArray[Any]:
        """A column as NumPy; `label` as float64 with NaN where an answer is not labelled."""
        if name == "label":
            return self.table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)  # null becomes NaN
        return np.array(self.table[name].to_pylist(), dtype=object)

    def take(self, rows: NDArray[Any]) -> Answers:
        """The rows at these positions, or where a mask is true."""
        where = np.flatnonzero(rows) if rows.dtype == bool else rows
        signals = {name: values[where] for name, values in self.signals.items()}
        table = self.table.take(pa.array(where, pa.int64()))
        return replace(self, table=table, signals=signals)


def sources_of(paths: Sequence[str]) -> list[str]:
    """Files and run folders that `paths` name. Raises UserError for a missing one."""
    return [source for path in paths for source in ([path] if _is_run(path) else readers.expand([path]))]


def answers_hash(paths: Sequence[str]) -> str:
    """Hash of the answers that `paths` name, for the work of a run."""
    files = []
    for source in sources_of(paths):
        if _is_run(source):
            files += [str(file) for name in (ANSWERS, SIGNALS) if (file := Path(source) / name).exists()]
        else:
            files.append(source)
    return inputs_hash(files)


def read_answers(paths: Sequence[str], split: AnswerSplitConfig | None = None) -> Answers:
    """The answers of all `paths`. `split` is that of files; run folders bring their own.

    Raises UserError for a path that is missing or no such data, run folders of different models or splits, an answer
    that is there twice with different contents, and if there is no usable answer. Unusable rows are quarantined.
    """
    parts, bad, rows_in = [], [], 0
    splits: dict[str, AnswerSplitConfig] = {}
    models: dict[str, str] = {}
    settings: list[Mapping[str, Any] | None] = []
    for source in sources_of(paths):
        if _is_run(source):
            part, manifest = _read_run(Path(source))
            splits[source] = AnswerSplitConfig(**manifest["split"])
            models[source] = str(manifest["answers_from"])
            settings.append(manifest.get("answering"))
            rows_in += len(part)
        else:
            part, rejected = _read_file(source, split or AnswerSplitConfig())  # type: ignore[call-arg]
            settings.append(None)
            splits[source] = split or AnswerSplitConfig()  # type: ignore[call-arg]
            bad += rejected
            rows_in += len(part) + len(rejected)
        parts += part
    _same(splits, "was split in another way; sample both with the same split section")
    _same(models, "holds answers of another model or prompt; a scorer is trained for one")
    if split is not None and any(own != split for own in splits.values()):
        raise UserError("split has no effect on run folders of sample-answers, which bring their own; remove it")
    if not parts:
        first = f"; the first: {bad[0].source}:{bad[0].line}: {bad[0].reason}" if bad else ""
        raise UserError(f"answers: no usable row in {', '.join(paths)}{first}")
    rows = _unique(parts)
    signals = {name: np.array([row.get(name, math.nan) for row in rows], np.float64) for name in _EXTRA}
    return Answers(
        table=pa.Table.from_pylist(
            [{name: row.get(name) for name in ANSWER_SCHEMA.names} for row in rows], ANSWER_SCHEMA
        ),
        signals={name: values for name, values in signals.items() if not np.isnan(values).all()},
        split=next(iter(splits.values())),
        answers_from=next(iter(models.values()), None),
        rows_in=rows_in,
        quarantined=tuple(bad),
        answering=common(settings),
    )


def served(answers: Answers, kind: str | None) -> NDArray[np.bool_]:
    """Which answers are of the kind that is scored in use, (rows,). Default: greedy where there are any, else all.

    Raises UserError if there is none of `kind`, or no default can be told.
    """
    kinds = answers.column("kind")
    known = sorted(set(kinds))
    if kind is None and "greedy" not in known:
        if len(known) > 1:
            raise UserError(f"serve_kind: the answers are of the kinds {', '.join(known)}; say which is given in use")
        kind = known[0]
    kind = kind or "greedy"
    if kind not in known:
        raise UserError(f"serve_kind: no answer is of kind {kind!r}; there are {', '.join(known)}")
    found: NDArray[np.bool_] = kinds == kind
    return found


def one_a_question(answers: Answers) -> NDArray[np.bool_]:
    """One answer of every question, chosen by hash and thus without regard to its label, (rows,).

    Answers to one question are not independent draws, and a guarantee counts draws.
    """
    chosen: dict[str, tuple[str, int]] = {}
    pairs = zip(answers.column("group_id"), answers.column("answer_id"), strict=True)
    for row, (group, answer_id) in enumerate(pairs):
        chosen[group] = min(chosen.get(group, ("g", -1)), (content_hash(answer_id), row))
    mask = np.zeros(len(answers), np.bool_)
    mask[[row for _, row in chosen.values()]] = True
    return mask


def _is_run(path: str) -> bool:
    return (Path(path) / ANSWERS).is_file()


def _read_run(folder: Path) -> tuple[list[dict[str, Any]], Mapping[str, Any]]:
    """Its rows and its manifest."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["job"] != "sample-answers" or manifest.get("status") != "done":
        raise UserError(f"answers: {folder} is no finished run of sample-answers; run the same command again")
    rows = {row["answer_id"]: row for row in pq.read_table(folder / ANSWERS).to_pylist()}
    if (folder / SIGNALS).exists():
        for row in pq.read_table(folder / SIGNALS).to_pylist():
            own = {name: math.nan if value is None else value for name, value in row.items() if name != "answer_id"}
            rows[row["answer_id"]].update(own)
    return list(rows.values()), manifest


def _read_file(source: str, split: AnswerSplitConfig) -> tuple[list[dict[str, Any]], list[Quarantined]]:
    good, bad = [], []
    for row in readers.iter_rows(source):
        try:
            if row.record is None:
                raise BadRow(row.error or "row could not be read")
            good.append(_row(row.record, split))
        except BadRow as error:
            bad.append(Quarantined.of(row.source, row.line, str(error), row.raw))
    return good, bad


def _row(record: Mapping[str, Any], split: AnswerSplitConfig) -> dict[str, Any]:
    question, answer = _text(record, "question"), _text(record, "answer")
    if not question.strip():
        raise BadRow("empty question")
    context = _text(record, "context") if record.get("context") is not None else None
    label, correct = record.get("label"), record.get("correct")
    if correct is not None and not isinstance(correct, bool):
        raise BadRow(f"correct is {correct!r}, expected true or false")
    if label is not None:
        label = _number(label, "label")
        if not 0 <= label <= 1:
            raise BadRow(f"label {label:g} is not between 0 and 1")
    elif correct is not None:
        label = float(correct)
    group = question_group(question, context)
    kind = str(record.get("kind") or "answer")
    example_id = str(record.get("example_id") or record.get("id") or group)
    row = {
        "answer_id": str(record.get("answer_id") or f"{example_id}/{kind}-{content_hash(answer)}"),
        "example_id": example_id,
        "group_id": group,
        "split": split_among(group, split.shares, split.salt),
        "task": None if record.get("task") is None else str(record["task"]),
        "question": question,
        "context": context,
        "kind": kind,
        "answer": answer,
        "label": label,
        "correct": label >= _CORRECT_FROM if correct is None and label is not None else correct,
    }
    return {**row, **{name: _number(record[name], name) for name in _EXTRA if record.get(name) is not None}}


def _text(record: Mapping[str, Any], field: str) -> str:
    value = record.get(field)
    if not isinstance(value, str):
        raise BadRow(f"missing field {field!r}" if value is None else f"field {field!r} is no text")
    if not is_utf8_text(value):
        raise BadRow(f"field {field!r} holds a lone surrogate, which no file in UTF-8 can hold")
    return value


def _number(value: Any, field: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRow(f"{field} is {value!r}, expected a finite number")
    return float(value)


def _unique(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows by answer id; of exact repeats one. Raises UserError for one id with two contents."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        other = found.setdefault(row["answer_id"], row)
        if any(other.get(key) != row.get(key) for key in ("question", "context", "answer", "label")):
            raise UserError(f"answers: answer_id {row['answer_id']!r} names two different answers; make the ids unique")
    return [found[name] for name in sorted(found)]


def _same(values: Mapping[str, Any], problem: str) -> None:
    first = next(iter(values), None)
    for source, value in values.items():
        if value != values[first]:  # type: ignore[index]
            raise UserError(f"answers: {source} {problem} ({first} differs)")

"""Answers beside their gold answers, from whatever file holds them: predictions, DATASET+, runs of `sample-answers`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stitch_ray.data import readers
from stitch_ray.data.quarantine import BadRow, Quarantined
from stitch_ray.data.workbook import sheet_rows
from stitch_ray.errors import UserError
from stitch_ray.exclusion.labels import Label, read_label
from stitch_ray.records import question_group
from stitch_ray.reliability.tables import ANSWERS
from stitch_ray.runs import read_manifest

ROLES: Mapping[str, tuple[str, ...]] = {
    "question": ("question", "instruction", "prompt"),
    "gold": ("gold", "references", "reference", "response", "answer_text"),
    "prediction": ("prediction", "generated_response", "generated", "answer"),
    "context": ("context",),
    "example_id": ("example_id", "question_id", "id"),
    "temperature": ("temperature",),
    "bert_p": ("bert_p", "precision"),
    "bert_r": ("bert_r", "recall"),
    "bert_f": ("bert_f", "f1"),
    "rouge_p": ("rouge_p", "rg_l_p"),
    "rouge_r": ("rouge_r", "rg_l_r"),
    "rouge_f": ("rouge_f", "rg_l_f1"),
    "label": ("label", "validation"),
    "human": ("human",),
}
"""What a column may mean -> the names it is known by, in any case, the first found first."""

_BERT = ("bert_p", "bert_r", "bert_f")
_PLAIN = {role: ROLES[role][1] for role in _BERT}

_NEEDED = ("question", "gold", "prediction")
_REFERENCES = "references.parquet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One answer. `bert_*`, `rouge` (precision, recall, F), `label` and `human`: what the file says; None: nothing."""

    source: str
    line: int
    example_id: str
    question: str
    context: str | None
    gold: tuple[str, ...]
    prediction: str
    temperature: float | None = None
    bert_p: float | None = None
    bert_r: float | None = None
    bert_f: float | None = None
    rouge: tuple[float, float, float] | None = None
    label: Label | None = None
    human: Label | None = None

    @property
    def group_id(self) -> str:
        """Equal for all answers to one question."""
        return question_group(self.question, self.context)


@dataclass(frozen=True, slots=True)
class Read:
    """All rows of some files, in their order, and those that cannot be used."""

    rows: tuple[Row, ...]
    quarantined: tuple[Quarantined, ...]

    @property
    def rows_in(self) -> int:
        return len(self.rows) + len(self.quarantined)


def sources_of(paths: Sequence[str]) -> list[str]:
    """Files and run folders that `paths` name. Raises UserError for a missing one."""
    return [source for path in paths for source in ([path] if _is_run(path) else readers.expand([path]))]


def read_rows(paths: Sequence[str], columns: Mapping[str, str] = {}, sheet: str | None = None) -> Read:
    """The answers in `paths`: files (.xlsx, .jsonl, .parquet, ...) and finished runs of `sample-answers`.

    `columns`: role -> name of its column, for files whose names are not among `ROLES`. The sheets of a workbook are read
    one after another, or only `sheet`; one that is named by a number tells the temperature of its answers.
    Raises UserError for a missing file or column, and if no row can be used. Rows without question or gold answer, and
    those with a label that is neither CORRECT nor WRONG, are quarantined; an empty prediction is an answer.
    """
    unknown = sorted(columns.keys() - ROLES.keys())
    if unknown:
        raise UserError(f"column {unknown[0]}: no such role; known: {', '.join(ROLES)}")
    rows: list[Row] = []
    bad: list[Quarantined] = []
    for source in sources_of(paths):
        for place, line, record, temperature in _records(source, sheet, bad):
            found = _resolve(place, record, columns)
            try:
                rows.append(_row(source, line, record, found, temperature))
            except BadRow as error:
                bad.append(Quarantined.of(place, line, str(error), str(record)))
    if not rows:
        first = f"; the first: {bad[0].source}:{bad[0].line}: {bad[0].reason}" if bad else ""
        raise UserError(f"no usable row in {', '.join(paths)}{first}")
    return Read(tuple(rows), tuple(bad))


def _is_run(path: str) -> bool:
    return (Path(path) / ANSWERS).is_file()


_Record = tuple[str, int, Mapping[str, Any], float | None]


def _records(source: str, sheet: str | None, bad: list[Quarantined]) -> Iterator[_Record]:
    """(place, line, record, temperature that the place tells)."""
    if _is_run(source):
        yield from _run_records(Path(source))
    elif os.path.isfile(source) and source.lower().endswith(".xlsx"):
        for row in sheet_rows(source, sheet):
            yield f"{source}[{row.sheet}]", row.number, row.record, _number(row.sheet)
    elif sheet is not None:
        raise UserError(f"{source}: only workbooks have sheets, such as {sheet!r}")
    else:
        for found in readers.iter_rows(source):
            if found.record is None:
                bad.append(Quarantined.of(source, found.line, found.error or "row could not be read", found.raw))
            else:
                yield source, found.line, found.record, None


def _run_records(folder: Path) -> Iterator[_Record]:
    manifest = read_manifest(folder)
    if manifest is None or manifest["job"] != "sample-answers" or manifest.get("status") != "done":
        raise UserError(f"{folder} is no finished run of sample-answers; run the same command again")
    gold = {row["example_id"]: row["references"] for row in pq.read_table(folder / _REFERENCES).to_pylist()}
    sampled = float(manifest["work"]["samples"]["temperature"])
    for line, row in enumerate(pq.read_table(folder / ANSWERS).to_pylist(), start=1):
        record = {key: row[key] for key in ("example_id", "question", "context")}
        temperature = {"greedy": 0.0, "sample": sampled}.get(row["kind"])
        yield str(folder), line, {**record, "gold": gold[row["example_id"]], "prediction": row["answer"]}, temperature


def _resolve(place: str, record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Role -> column, for the roles that this record has."""
    by_case = {str(name).casefold(): name for name in record}
    found = {}
    for role, names in ROLES.items():
        if role in columns:
            if columns[role] not in record:
                raise UserError(f"{place}: has no column {columns[role]!r} ({role}); it has {_names(record)}")
            found[role] = columns[role]
        elif (name := next((by_case[name] for name in names if name in by_case), None)) is not None:
            found[role] = name
    plain = {role for role in _BERT if role not in columns and found.get(role, "").casefold() == _PLAIN[role]}
    if len(plain) < len(_BERT):  # one of them alone may be anything, such as the F1 of words
        for role in plain:
            del found[role]
    for role in _NEEDED:
        if role not in found:
            raise UserError(
                f"{place}: has no column for the {role} (known names: {', '.join(ROLES[role])}); name it with "
                f"--column {role}=NAME; it has {_names(record)}"
            )
    return found


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(map(str, record)) or "none"


def _row(
    source: str, line: int, record: Mapping[str, Any], columns: Mapping[str, str], temperature: float | None
) -> Row:
    def value(role: str) -> Any:
        return record.get(columns[role]) if role in columns else None

    question, context = _text(value("question"), "question"), value("context")
    golden = value("gold")
    gold = tuple(_text(one, "gold") for one in (golden if isinstance(golden, list) else [golden]))
    if not question.strip():
        raise BadRow("empty question")
    if not gold or not all(text.strip() for text in gold):
        raise BadRow("empty gold answer")
    own_temperature = _score(value("temperature"), "temperature")
    rouge = tuple(_score(value(role), role) for role in ("rouge_p", "rouge_r", "rouge_f"))
    context = _text(context, "context") or None
    return Row(
        source=source,
        line=line,
        example_id=str(value("example_id") or question_group(question, context)),
        question=question,
        context=context,
        gold=gold,
        prediction=_text(value("prediction"), "prediction"),
        temperature=temperature if own_temperature is None else own_temperature,
        bert_p=_score(value("bert_p"), "bert_p"),
        bert_r=_score(value("bert_r"), "bert_r"),
        bert_f=_score(value("bert_f"), "bert_f"),
        rouge=None if None in rouge else rouge,  # type: ignore[arg-type]
        label=_label(value("label"), "label"),
        human=_label(value("human"), "human"),
    )


def _text(value: Any, role: str) -> str:
    """An empty cell is an empty text; a number is the text that it is written as."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"{role} is of type {type(value).__name__}, expected text")
    return str(value)


def _label(value: Any, role: str) -> Label | None:
    text = _text(value, role)
    if not text.strip():
        return None
    found = read_label(text)
    if found is None:
        raise BadRow(f"{role} is {text[:40]!r}, expected CORRECT or WRONG")
    return found


def _score(value: Any, role: str) -> float | None:
    if value is None or value == "":
        return None
    found = _number(value)
    if found is None:
        raise BadRow(f"{role} is {str(value)[:40]!r}, expected a finite number")
    return found


def _number(value: Any) -> float | None:
    try:
        found = float(value)
    except (TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None

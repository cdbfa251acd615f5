"""What the reports of `sample-answers`, `train-scorer` and `calibrate` share: facts of a run, scores side by side."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import yaml
from numpy.typing import NDArray

from stitch_ray.data.quarantine import Quarantined
from stitch_ray.report.html import goal, number, percent
from stitch_ray.report.reliability_figures import Dot

Floats = NDArray[np.float64]

_MOST_REASONS = 20
_MOST_QUARANTINED = 20
_MOST_CHARACTERS = 4000
_SHORT = 600

_COLUMNS = {
    "auroc": "AUROC",
    "aurc": "AURC",
    "e_aurc": "E-AURC",
    "augrc": "AUGRC",
    "auacc": "AUACC",
    "prr": "PRR",
    "prr_50": "PRR at 50%",
    "brier": "Brier",
    "ece": "ECE",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
}
_RISK = "coverage_at_risk_"


class RunFacts(TypedDict, total=False):
    """Facts of any run. All may be missing."""

    run: str
    """Name of the run; default: of the folder the report is in."""
    manifest: Mapping[str, Any]
    """`RunFolder.manifest`: status, created, seed, hashes, versions, machine, rows_in, rows_out, rows_quarantined,
    rows_dropped."""
    config: Mapping[str, Any]
    """`config.model_dump(mode="json")`."""
    notes: Sequence[str]
    """What a reader must not miss: sentences, shown in a box at the top beside those the report finds itself."""
    quarantined: Sequence[Quarantined]
    """All rows that could not be used."""


class IntervalFacts(TypedDict):
    """A figure with its 95 % interval; NaN or None: not known."""

    value: float | None
    low: float | None
    high: float | None


class ScoreFacts(TypedDict):
    """One score in an evaluation."""

    name: str
    metrics: Mapping[str, IntervalFacts]
    scored: int
    unscored: int


class EvaluationFacts(TypedDict, total=False):
    """`Evaluation.as_dict()`."""

    rows: Sequence[ScoreFacts]
    notes: Sequence[str]


class SplitFacts(TypedDict, total=False):
    """Counts of one split. `correct`: share of the labelled answers, 0 to 1; None where there is no label."""

    answers: int
    questions: int
    correct: float | None


class ExampleFacts(TypedDict, total=False):
    """One answer to show. Needed: question, answer. `label` in [0, 1], `confidence` in [0, 1]."""

    question: str
    context: str | None
    answer: str
    references: Sequence[str]
    label: float | None
    correct: bool | None
    confidence: float | None
    task: str | None
    answer_id: str


def frame(path: Path, facts: RunFacts, notes: Sequence[str] = ()) -> dict[str, Any]:
    """What every page of these jobs needs for its template. notes: what the report itself found."""
    manifest = facts.get("manifest", {})
    quarantined = list(facts.get("quarantined", ()))
    config = facts.get("config")
    return {
        "run": facts.get("run") or path.resolve().parent.name,
        "manifest": manifest,
        "notes": list(dict.fromkeys([*facts.get("notes", ()), *notes])),
        "quarantined": quarantined[:_MOST_QUARANTINED],
        "num_quarantined": len(quarantined),
        "quarantine_known": "quarantined" in facts,
        "reasons": Counter(re.sub(r"\d+(?:[.,]\d+)*", "N", row.reason) for row in quarantined).most_common(
            _MOST_REASONS
        ),
        "config_text": None if config is None else yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True),
        "machine": ", ".join(f"{key} {value}" for key, value in manifest.get("machine", {}).items()),
    }


def split_rows(splits: Mapping[str, SplitFacts] | None) -> list[dict[str, Any]] | None:
    """One row a split in the given order, or None."""
    if not splits:
        return None
    return [
        {"name": name, "answers": None, "questions": None, "correct": None, **counts} for name, counts in splits.items()
    ]


def score_tables(evaluation: EvaluationFacts | None, first: str | None = None) -> list[dict[str, Any]]:
    """The scores as tables for `reliability.html.jinja`: how they rank, at which risk they answer what, and how far
    those that are probabilities can be believed. Columns nobody has a number for are left out.

    Each has `title`, `what`, `columns` and `rows` of (name, scored, unscored, is it `first`, cells (value, interval)).
    """
    rows = (evaluation or {}).get("rows", ())
    risks = sorted({key for row in rows for key in row["metrics"] if key.startswith(_RISK)}, key=_risk)
    order = {
        "ranking": ["auroc", "aurc", "e_aurc", "augrc", "auacc", "prr", "prr_50"],
        "coverage": risks,
        "probability": ["brier", "ece", "accuracy", "balanced_accuracy"],
    }
    found = []
    for kind, keys in order.items():
        columns = [key for key in keys if any(_known(_metric(row, key).get("value")) for row in rows)]
        of_kind = [row for row in rows if any(_known(_metric(row, key).get("value")) for key in columns)]
        if kind == "ranking" and columns:
            of_kind = list(rows)  # a score that could not be measured is said, not hidden
        if columns:
            found.append(
                {
                    "kind": kind,
                    "columns": [metric_name(key) for key in columns],
                    "rows": [
                        {
                            "name": readable(row["name"]),
                            "scored": row.get("scored"),
                            "unscored": row.get("unscored", 0),
                            "first": row["name"] == first,
                            "cells": [_cell(_metric(row, key), key) for key in columns],
                        }
                        for row in of_kind
                    ],
                }
            )
    return found


def evaluation_notes(evaluation: EvaluationFacts | None) -> list[str]:
    """Its notes as sentences."""
    names = [row["name"] for row in (evaluation or {}).get("rows", ())]
    notes = []
    for note in (evaluation or {}).get("notes", ()):
        about = next((name for name in names if note.startswith(f"{name}: ")), None)
        text = note[:1].upper() + note[1:] if about is None else readable(about) + note[len(about) :]
        notes.append(text if text.endswith(".") else f"{text}.")
    return notes


def readable(name: str) -> str:
    """`semantic_entropy` as words."""
    return "P(True)" if name == "p_true" else name.replace("_", " ")


def metric_name(key: str) -> str:
    """AUROC for `auroc`."""
    return f"at risk {goal(_risk(key))}" if key.startswith(_RISK) else _COLUMNS.get(key, readable(key))


def row_of(evaluation: EvaluationFacts | None, name: str | None) -> ScoreFacts | None:
    """The row of that name, if there is one."""
    return next((row for row in (evaluation or {}).get("rows", ()) if row["name"] == name), None)


def figure_of(row: ScoreFacts | None, metric: str) -> tuple[float, float, float]:
    """(value, low, high) of a metric, NaN where not known."""
    return (math.nan,) * 3 if row is None else interval(_metric(row, metric))


def interval(cell: Mapping[str, Any]) -> tuple[float, float, float]:
    """(value, low, high), NaN where not known."""
    value, low, high = (math.nan if cell.get(key) is None else float(cell[key]) for key in ("value", "low", "high"))
    return value, low, high


def forest_rows(evaluation: EvaluationFacts | None, metric: str = "auroc") -> list[Dot]:
    """(name, value, low, high) of every score that has the metric."""
    rows = [(row["name"], *figure_of(row, metric)) for row in (evaluation or {}).get("rows", ())]
    return [row for row in rows if math.isfinite(row[1])]


def excerpt(text: str) -> dict[str, Any]:
    """A text for showing: the first part, and the whole within reason where that is more."""
    short = text if len(text) <= 1.2 * _SHORT else text[:_SHORT].rstrip() + " …"
    return {
        "short": short,
        "whole": None if short is text else text[:_MOST_CHARACTERS],
        "characters": len(text),
        "cut": len(text) > _MOST_CHARACTERS,
    }


def example(facts: ExampleFacts) -> dict[str, Any]:
    """An example with all its keys and texts fit for showing."""
    return {
        **dict.fromkeys(("label", "correct", "confidence", "task", "answer_id")),
        **facts,
        "question": excerpt(facts["question"]),
        "answer": excerpt(facts["answer"]),
        "context": excerpt(context) if (context := facts.get("context")) else None,
        "references": [excerpt(text)["short"] for text in facts.get("references", ())[:5]],
    }


def in_words(value: float, low: float = math.nan, high: float = math.nan, *, share: bool = False) -> str:
    """0.71 (0.66 to 0.76), or 71% (66% to 76%)."""
    text = percent if share else (lambda part: number(part, 3))
    return f"{text(value)} ({text(low)} to {text(high)})" if math.isfinite(low) and math.isfinite(high) else text(value)


def _metric(row: ScoreFacts, key: str) -> Mapping[str, float | None]:
    return row["metrics"].get(key) or {}  # type: ignore[return-value]


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _risk(key: str) -> float:
    return float(key.removeprefix(_RISK))


def _cell(cell: Mapping[str, float | None], key: str) -> tuple[str, str]:
    text = percent if key.startswith(_RISK) else (lambda value: number(value, 3))
    value, low, high = (cell.get(name) for name in ("value", "low", "high"))
    known = _known(low) and _known(high)
    return text(value), f"{text(low)} to {text(high)}" if known else ""

"""The published answers of EXAR's models, with the labels of a rule and of people: what two benchmarks learn from."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openpyxl

TEMPERATURES = (0.1, 0.6, 0.8)
PUBLISHED = {
    "squad": {"accuracy": 0.7659, "majority": 0.7777, "mcc": 0.3152},
    "dolly": {"accuracy": 0.5746, "majority": 0.5470, "mcc": 0.2973},
}
"""Of the published meta-validators, on the rows they were trained on."""

Row = dict[str, Any]


def folder(data: Path | None) -> Path:
    """`data`, or the folder `exar` in STITCH_RAY_DATA or ../shared/data."""
    return data or Path(os.environ.get("STITCH_RAY_DATA", Path(__file__).parents[2] / "shared" / "data")) / "exar"


def squad(data: Path) -> list[Row]:
    """Three answers to each of 1,184 questions."""
    return [
        {**_answer(row, "question", "answer_text", f"squad/{temperature}/{number}"), **_judged(row, temperature)}
        for temperature in TEMPERATURES
        for number, row in enumerate(_sheet(data / "squad" / f"squad_preds_metrics_t{temperature}_deberta.xlsx"))
    ]


def dolly(data: Path) -> list[Row]:
    """One answer to each of the thousand questions of stage zero, and three to each of 100."""
    stage_zero = [
        {
            **_answer(row, "Question", "response", f"dolly/{number}"),
            "label": row["validation"],
            "human": None,
            "temperature": None,
            "bert_f": None,
        }
        for number, row in enumerate(_sheet(data / "dolly" / "dolly_openqa.xlsx"))
    ]
    judged = [
        {**_answer(row, "instruction", "response", f"dolly/{temperature}/{number}"), **_judged(row, temperature)}
        for temperature in TEMPERATURES
        for number, row in enumerate(_sheet(data / "dolly" / f"dolly_preds_metrics_t{temperature}_deberta.xlsx"))
    ]
    return [*stage_zero, *judged]


def apart(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """(Answers to questions of which people judged no answer, answers that people judged)."""
    judged = {question_key(row) for row in rows if row["human"]}
    return [row for row in rows if question_key(row) not in judged], [row for row in rows if row["human"]]


def question_key(row: Row) -> str:
    """Equal for the same question, however it is spaced and cased."""
    return " ".join(row["question"].split()).casefold()


def _answer(row: Row, question: str, gold: str, answer_id: str) -> Row:
    return {
        "answer_id": answer_id,
        "question": str(row[question]),
        "gold": str(row[gold]),
        "answer": str(row["Generated_Response"] or ""),
    }


def _judged(row: Row, temperature: float) -> Row:
    return {
        "label": row["VALIDATION"],
        "human": row["HUMAN"] or None,
        "temperature": temperature,
        "bert_f": row["f1"],
    }


def _sheet(file: Path) -> Iterator[Row]:
    rows = openpyxl.load_workbook(file, read_only=True).worksheets[0].iter_rows(values_only=True)
    head = next(rows)
    for row in rows:
        yield dict(zip(head, row, strict=True))

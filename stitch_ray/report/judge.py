"""`report.html` of `exar judge`: how well a validator tells right answers from wrong ones, and where it errs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stitch_ray.report import reliability
from stitch_ray.report.figures import Floats
from stitch_ray.report.html import number, percent, render
from stitch_ray.report.reliability import RunFacts
from stitch_ray.report.validator_figures import validator_figures
from stitch_ray.runs import write_text

_TITLES = {"human": "Against people", "label": "Against the rule"}
_MOST_MISTAKES = 6


class JudgeFacts(RunFacts, total=False):
    """Facts of an `exar judge` run. `metrics`: as in metrics.json; `rows`: as in verdicts.parquet."""

    metrics: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]


def write_report(path: Path, facts: JudgeFacts) -> None:
    """Write the report of a run to the file `path`."""
    metrics, rows = facts["metrics"], facts["rows"]
    truths = [key for key in _TITLES if key in metrics]
    main = metrics[truths[0]]
    page = render(
        "judge.html.jinja",
        **reliability.frame(path, facts, _notes(metrics, truths)),
        headline=f"AUROC {number(main['auroc'], 3)} {_TITLES[truths[0]].lower()}"
        if main["auroc"]
        else "One verdict only",
        tiles=[
            ("answers judged", number(sum(row["probability"] is not None for row in rows))),
            ("accuracy", percent(main["accuracy"])),
            ("of the commoner verdict", percent(main["majority"])),
            ("unparsable replies", number(main["replies"]["unparsable"])),
        ],
        truths=[
            {
                "key": key,
                "title": _TITLES[key],
                "found": metrics[key],
                "figures": _figures(rows, key),
                "scores": reliability.score_tables(metrics[key]["scores"]),
            }
            for key in truths
        ],
        mistakes=_mistakes(rows, truths[0]),
    )
    write_text(path, page)


def _notes(metrics: Mapping[str, Any], truths: Sequence[str]) -> list[str]:
    return [
        f"{_TITLES[key]} it is right about {metrics[key]['accuracy']:.1%}; always saying the commoner verdict would be right "
        f"about {metrics[key]['majority']:.1%}."
        for key in truths
        if metrics[key]["accuracy"] <= metrics[key]["majority"]
    ]


def _judged(rows: Sequence[Mapping[str, Any]], truth: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row[truth] is not None and row["probability"] is not None]


def _figures(rows: Sequence[Mapping[str, Any]], truth: str) -> list[tuple[str, str, str]]:
    """(title, caption, figure); none where all answers are right, or all wrong."""
    judged = _judged(rows, truth)
    probability: Floats = np.array([row["probability"] for row in judged], np.float64)
    right: Floats = np.array([row[truth] == "CORRECT" for row in judged], np.float64)
    return validator_figures(probability, right, "answers")


def _mistakes(rows: Sequence[Mapping[str, Any]], truth: str) -> list[dict[str, Any]]:
    """Wrong answers with the highest, right ones with the lowest P(CORRECT); the surest mistakes first."""
    judged = sorted(_judged(rows, truth), key=lambda row: -abs(row["probability"] - (row[truth] == "CORRECT")))
    return [
        {
            "truth": str(row[truth]).lower(),
            "probability": row["probability"],
            "reply": row["reply"] or "nothing",
            "question": reliability.excerpt(row["question"]),
            "answer": reliability.excerpt(row["answer"]),
        }
        for row in judged[:_MOST_MISTAKES]
        if abs(row["probability"] - (row[truth] == "CORRECT")) > 0.5
    ]

"""`report.html` of `exar evaluate`: what refining is worth beside other uses of as many calls, and the validator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from stitch_ray.report import reliability
from stitch_ray.report.figures import INK, KEPT, Floats, svg
from stitch_ray.report.html import number, percent, render
from stitch_ray.report.reliability import RunFacts
from stitch_ray.report.validator_figures import validator_figures
from stitch_ray.runs import write_text

_COLOURS = ("#2a8f6b", "#8a5bb5")
_REASONS = {
    "accepted": "the validator accepted an answer",
    "unjudged": "the last attempt was given unjudged",
    "exhausted": "no attempt was accepted: abstained",
    "cycle": "an answer came again: abstained",
    "failed": "the model could not answer again: abstained",
}
_CHECKED = {
    "judge_failed": "could not be judged",
    "repeated": "turned down before",
    "empty": "empty",
    "unjudged": "not judged",
}


class ExarFacts(RunFacts, total=False):
    """Facts of an `exar evaluate` run. `metrics`: as in metrics.json; `curves`: name -> (calls a question, right)."""

    metrics: Mapping[str, Any]
    curves: Mapping[str, Sequence[tuple[float, float]]]
    examples: Sequence[Mapping[str, Any]]
    judged: tuple[Floats, NDArray[np.bool_]]
    """P(CORRECT) of the first attempts, and whether they are right."""


def write_report(path: Path, facts: ExarFacts) -> None:
    """Write the report of a run to the file `path`."""
    metrics = facts["metrics"]
    named = {row["name"]: row for row in metrics["systems"]}
    page = render(
        "exar.html.jinja",
        **reliability.frame(path, facts, metrics["notes"]),
        headline=f"{percent(named['refined']['accuracy'])} right after refining, "
        f"{percent(named['first answer']['accuracy'])} at first",
        tiles=_tiles(metrics, named["refined"]),
        systems=[_system(row) for row in metrics["systems"]],
        budget=metrics["same_budget"],
        voted=any(name.startswith("majority") for name in named),
        changes=metrics["changes"],
        why=[(_REASONS.get(name, name), count) for name, count in metrics["reasons"].items()],
        questions=metrics["questions"],
        at_k=list(enumerate(metrics["acc_at_k"], start=1)),
        validator=metrics["validator"],
        within=metrics["within_questions"],
        scores=reliability.score_tables(metrics["scores"]) if metrics["scores"] else [],
        figures=_figures(facts),
        examples=[_example(one) for one in facts["examples"]],
    )
    write_text(path, page)


def _tiles(metrics: Mapping[str, Any], refined: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("questions", number(metrics["questions"])),
        ("answered", percent(refined["coverage"])),
        ("right, of those answered", percent(refined["selective"])),
        ("calls a question", number(refined["calls"], 2)),
        ("tokens a question", number(refined["tokens"])),
        ("wrong answers made right", number(metrics["changes"]["wrong_to_right"])),
        (
            "right answers lost",
            number(metrics["changes"]["right_to_wrong"] + metrics["changes"]["right_to_abstention"]),
        ),
    ]


def _system(row: Mapping[str, Any]) -> dict[str, Any]:
    def between(low: float | None, high: float | None) -> str:
        return "" if low is None or high is None else f"{percent_signed(low)} to {percent_signed(high)}"

    own = "" if row["low"] is None else f"{percent(row['low'])} to {percent(row['high'])}"
    return {
        **row,
        "interval": own,
        "change": percent_signed(row["difference"]),
        "change_interval": between(row["difference_low"], row["difference_high"]),
    }


def percent_signed(value: float) -> str:
    """+1.2% or -0.3%."""
    return f"{value:+.1%}"


def _figures(facts: ExarFacts) -> list[tuple[str, str, str]]:
    """(title, caption, figure)."""
    found = [
        (
            "What calls buy",
            "Right answers of all questions, by calls of models a question. Refining pays where its line is above.",
            _calls(facts["curves"]),
        )
    ]
    probability, correct = facts["judged"]
    return [*found, *validator_figures(probability, correct.astype(np.float64), "first answers")]


def _calls(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        others = iter(_COLOURS)
        for name, points in curves.items():
            calls, right = zip(*points, strict=True)
            main = name.startswith("refined")
            colour = KEPT if main else next(others, INK)
            axes.plot(calls, right, "o-", color=colour, markersize=3.5, linewidth=1.9 if main else 1.1, label=name)
        axes.set_xlabel("calls a question")
        axes.set_ylabel("right answers")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.set_ylim(bottom=0)
        axes.legend(loc="best")

    return svg(draw, 3.2, "Right answers by calls")


def _example(one: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "question": reliability.excerpt(one["question"]),
        "context": reliability.excerpt(one["context"]) if one["context"] else None,
        "references": [reliability.excerpt(text)["short"] for text in one["references"][:5]],
        "decision": one["decision"],
        "correct": one["correct"],
        "attempts": [
            {
                "answer": reliability.excerpt(attempt["answer"]),
                "correct": attempt["correct"],
                "verdict": f"P(CORRECT) {attempt['probability']:.3f}"
                if attempt["probability"] is not None
                else _CHECKED[attempt["checked"]],
                "temperature": attempt["temperature"],
            }
            for attempt in one["trace"]
        ],
    }

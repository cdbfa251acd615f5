"""Reliability on this machine: answers scored a second, semantic entropy, metrics on a million answers.

    python -m benchmarks.reliability [--only scoring] [--repeats 3]

Sections: scoring, semantic, metrics. Results of sections that are not run again are kept.
"""

from __future__ import annotations

import datetime
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.harness import RESULTS, publish, table
from benchmarks.uncertainty import metrics, scoring, semantic

THREADS = 2
QUESTIONS, SAMPLES, QUESTIONS_OF_SQUAD = 60, 6, 300

Facts = dict[str, Any]


def main(
    only: Annotated[list[str] | None, typer.Option(help="sections to run; default: all")] = None,
    repeats: Annotated[int, typer.Option(help="repetitions of every side")] = 3,
    name: Annotated[str, typer.Option(help="name of the result files")] = "reliability-cpu",
) -> None:
    """Measure section by section; each is published as soon as it is done."""
    torch.set_num_threads(THREADS)
    sections: dict[str, tuple[str, Callable[[], tuple[str, Facts]]]] = {
        "scoring": ("Answers scored", lambda: _scoring(repeats)),
        "semantic": ("Semantic entropy", lambda: _semantic(repeats)),
        "metrics": ("Metrics on 1,000,000 answers", lambda: _metrics(repeats)),
    }
    unknown = set(only or ()) - set(sections)
    if unknown:
        raise typer.BadParameter(f"--only: {sorted(unknown)}; there are {', '.join(sections)}")
    for section in only or sections:
        heading, measure = sections[section]
        text, facts = measure()
        _publish(name, heading, f"{text}\n\n({datetime.date.today()})", facts, repeats)


def _scoring(repeats: int) -> tuple[str, Facts]:
    workloads = {"mixed lengths": scoring.mixed()}
    real = Path(os.environ.get("STITCH_RAY_DATA", Path(__file__).parents[2] / "shared" / "data")) / "exar" / "squad"
    if real.is_dir():
        workloads["EXAR SQuAD, three temperatures"] = scoring.sampled_answers(real, QUESTIONS_OF_SQUAD)
    with tempfile.TemporaryDirectory(prefix="stitch-ray-bench-") as scratch:
        rows = scoring.compare(Path(scratch), workloads, repeats=repeats)
    return table(rows), {"rows": rows}


def _semantic(repeats: int) -> tuple[str, Facts]:
    found = semantic.compare(QUESTIONS, SAMPLES, repeats)
    rows = [
        {
            "equivalence": kind,
            **{side: f"{seconds:.2f} s" for side, seconds in sides.items()},
            "x one question at a time": f"{sides[semantic.BY_QUESTION] / sides[semantic.TOGETHER]:.2f}",
            "x one text or pair at a time": f"{sides[semantic.BY_CALL] / sides[semantic.TOGETHER]:.2f}",
        }
        for kind, sides in found.items()
    ]
    return f"{QUESTIONS} questions, {SAMPLES} samples each.\n\n{table(rows)}", found


def _metrics(repeats: int) -> tuple[str, Facts]:
    found = metrics.compare(repeats=repeats)
    rows = [
        {"metric": name, **{side: f"{sides[side]:.3f} s" if side in sides else "" for side in ("ours", "scikit-learn")}}
        for name, sides in found.items()
    ]
    return table(rows), found


def _publish(name: str, heading: str, text: str, facts: Facts, repeats: int) -> None:
    """Write the result files with this section as the last, and those before as they were."""
    file = RESULTS / f"{name}.json"
    before = json.loads(file.read_text("utf-8")).get("sections", {}) if file.exists() else {}
    before.pop(heading, None)
    everything = {**before, heading: {"text": text, "facts": facts}}
    texts = {title: section["text"] for title, section in everything.items()}
    command = f"python -m benchmarks.reliability --repeats {repeats}"
    publish(name, "Reliability", texts, {"sections": everything}, command)


if __name__ == "__main__":
    typer.run(main)

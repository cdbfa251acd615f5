"""The served ensemble: what its gateway costs, how it scales, and what refining only unsure answers saves.

python -m benchmarks.serving                        # all sections, about ten minutes on two cores
python -m benchmarks.serving --section overhead     # measure this one again, keep the others
"""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.harness import RESULTS, publish
from benchmarks.served import batch, cascade, overhead, scaling

NAME = "serving-cpu"
TITLE = "Serving an ensemble"

Found = tuple[str, dict[str, Any]]
Section = Callable[[bool], Found]

SECTIONS: dict[str, tuple[str, Section]] = {
    "overhead": (
        "Framework overhead, no-op models",
        lambda quick: overhead.compare(1 if quick else 5, 100 if quick else 200),
    ),
    "controller": (
        "A controller with a worker, for comparison",
        lambda quick: overhead.against_controller(1 if quick else 5, 100 if quick else 300),
    ),
    "replicas": (
        "Scaling with replicas",
        lambda quick: scaling.by_hand(1 if quick else 3, 100 if quick else 300),
    ),
    "autoscaling": (
        "Autoscaling: 1 client, 32, and 1 again",
        lambda quick: scaling.by_serve(
            (3, 15, 12) if quick else (10, 40, 40), None if quick else RESULTS / "serving-autoscaling.png"
        ),
    ),
    "batch": (
        "predict against a loop over HTTP",
        lambda quick: batch.compare(32 if quick else 500),
    ),
    "cascade": (
        "Cascade against always-dialogue, simulated members",
        lambda quick: cascade.compare(200 if quick else 1000),
    ),
}


def main(
    section: Annotated[list[str] | None, typer.Option(help=f"one or more of {', '.join(SECTIONS)}")] = None,
    quick: Annotated[bool, typer.Option(help="see that it runs; nothing is written")] = False,
) -> None:
    """Measure the served ensemble on this machine. Every section is written as soon as it is measured."""
    unknown = set(section or ()) - SECTIONS.keys()
    if unknown:
        raise typer.BadParameter(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    done = _before()
    for name in section or SECTIONS:
        heading, measured = SECTIONS[name]
        print(f"{name} ...", file=sys.stderr, flush=True)
        began, before = time.perf_counter(), _stolen()
        text, facts = measured(quick)
        text = f"{text}\n\n{_told(before, _stolen())}"
        print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        if quick:
            print(f"{text}\n", flush=True)
            continue
        done.pop(name, None)
        date = datetime.date.today().isoformat()
        done[name] = {"measured": date, "heading": heading, "text": text, "facts": facts}
        texts = {one["heading"]: f"Measured {one['measured']}.\n\n{one['text']}" for one in done.values()}
        publish(NAME, TITLE, texts, {"sections": done}, "python -m benchmarks.serving")


def _stolen() -> tuple[int, int]:
    """Ticks in which a virtual machine wanted to run and was not let, and all ticks, so far."""
    ticks = [int(value) for value in Path("/proc/stat").read_text("ascii").split("\n", 1)[0].split()[1:9]]
    return ticks[7], sum(ticks) - ticks[3] - ticks[4]


def _told(before: tuple[int, int], after: tuple[int, int]) -> str:
    stolen, wanted = (now - then for then, now in zip(before, after, strict=True))
    return f"Of the time in which this machine wanted to compute, {stolen / max(wanted, 1):.0%} went to its host's other guests."


def _before() -> dict[str, dict[str, Any]]:
    """Sections that were measured in earlier runs; the newest stands last."""
    file = RESULTS / f"{NAME}.json"
    if not file.exists():
        return {}
    found: dict[str, dict[str, Any]] = json.loads(file.read_text("utf-8"))["sections"]
    return found


if __name__ == "__main__":
    typer.run(main)

"""Fine-tuning on this machine: packing, launchers, Hugging Face's Trainer, ZeRO stages, and GPUs.

    python -m benchmarks.training [--only packing] [--repeats 3] [--count 48] [--steps 12]

Sections: packing, launchers, trainer, zero, gpu. Results of sections that are not run again are kept. The data is
`alpaca_en_1k.json` in STITCH_RAY_DATA or ../shared/data, else a made corpus.
"""

from __future__ import annotations

import datetime
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.finetuning import gpu, launchers, memory, packing, trainer
from benchmarks.finetuning.workload import examples
from benchmarks.harness import RESULTS, publish

THREADS = 2

Section = Callable[[], tuple[str, dict[str, Any]]]


def main(
    only: Annotated[list[str] | None, typer.Option(help="sections to run; default: all")] = None,
    repeats: Annotated[int, typer.Option(help="repetitions of every side")] = 3,
    count: Annotated[int, typer.Option(help="examples of the packing and Trainer comparisons")] = 48,
    steps: Annotated[int, typer.Option(help="steps of the launchers' comparison")] = 12,
    name: Annotated[str, typer.Option(help="name of the result files")] = "training-cpu",
) -> None:
    """Measure training on this machine, section by section; each is published as soon as it is done."""
    torch.set_num_threads(THREADS)
    source, data = examples()
    with tempfile.TemporaryDirectory(prefix="stitch-ray-bench-") as scratch:
        folder = Path(scratch)
        sections: dict[str, tuple[str, Section]] = {
            "packing": ("Packing", lambda: packing.compare(folder, source, data, repeats=repeats, count=count)),
            "launchers": (
                "Ray Train and torchrun",
                lambda: launchers.compare(folder, source, data, repeats=repeats, steps=steps),
            ),
            "trainer": (
                "Hugging Face Trainer",
                lambda: trainer.compare(folder, source, data, repeats=repeats, count=count, threads=THREADS),
            ),
            "zero": ("ZeRO stages", lambda: memory.compare(folder, source, data, repeats=repeats)),
            "gpu": ("GPU", lambda: gpu.compare(folder, source, data, repeats=repeats)),
        }
        unknown = set(only or ()) - set(sections)
        if unknown:
            raise typer.BadParameter(f"--only: {sorted(unknown)}; there are {', '.join(sections)}")
        for section in only or sections:
            heading, measure = sections[section]
            if section == "gpu" and not torch.cuda.is_available():
                print("gpu: left out, torch finds no CUDA device here", flush=True)
                continue
            started = time.perf_counter()
            text, facts = measure()
            seconds = round(time.perf_counter() - started)
            command = f"python -m benchmarks.training --repeats {repeats} --count {count} --steps {steps}"
            _publish(name, heading, f"{text} ({datetime.date.today()}, {seconds} s.)", facts, command)


def _publish(name: str, heading: str, text: str, facts: dict[str, Any], command: str) -> None:
    """Write the result files with this section as the last, and those before as they were."""
    file = RESULTS / f"{name}.json"
    before = json.loads(file.read_text("utf-8")).get("sections", {}) if file.exists() else {}
    before.pop(heading, None)
    everything = {**before, heading: {"text": text, "facts": facts}}
    texts = {title: section["text"] for title, section in everything.items()}
    publish(name, "Fine-tuning", texts, {"sections": everything}, command)


if __name__ == "__main__":
    typer.run(main)

"""Timing sides in turn, describing the machine, writing dated tables."""

from __future__ import annotations

import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stitch_ray.runs import versions, write_text

RESULTS = Path(__file__).parent / "results"


def interleave(sides: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every side, `repeats` times in turn after one call to warm up. Prints each repetition."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for side in sides.values():
        side()
    for repeat in range(repeats):
        for name, side in sides.items():
            started = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - started)
            print(f"  {repeat + 1}/{repeats} {name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return seconds


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def matmul_rate(dtype: torch.dtype = torch.float32, seconds: float = 2.0) -> float:
    """Floating point operations a second of (1024 x 512) @ (512 x 1376), the largest product of the benchmark's model."""
    a, b = torch.randn(1024, 512, dtype=dtype), torch.randn(1376, 512, dtype=dtype)
    best = 0.0
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        started = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(a, b)
        best = max(best, 10 * 2 * a.shape[0] * a.shape[1] * b.shape[0] / (time.perf_counter() - started))
    return best


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu": cpu, "torch threads": torch.get_num_threads(), "gpus": gpus, "versions": versions()}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; the columns are the keys of the first row."""
    columns = list(rows[0])
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(str(row.get(column, '')) for column in columns)} |" for row in rows]
    return "\n".join(lines)


def publish(name: str, title: str, sections: Mapping[str, str], facts: Mapping[str, Any], command: str) -> None:
    """Print the newest table and write them all to `results/<name>.md` and `.json`."""
    date = datetime.date.today().isoformat()
    where = machine()
    head = [
        f"# {title}",
        "",
        f"{date}; {where['cpu']}, {where['torch threads']} torch threads; GPUs: {where['gpus'] or 'none'}",
    ]
    head += [
        "Versions: " + ", ".join(f"{k} {v}" for k, v in where["versions"].items()),
        f"Repeat with: `{command}`",
        "",
    ]
    body = [part for heading, text in sections.items() for part in (f"## {heading}", "", text, "")]
    text = "\n".join(head + body)
    print(list(sections.values())[-1], flush=True)
    write_text(RESULTS / f"{name}.md", text)
    write_text(RESULTS / f"{name}.json", json.dumps({"date": date, "machine": where, **facts}, indent=1) + "\n")

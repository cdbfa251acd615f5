"""The same job through Ray Train and through torchrun. As a program: the Ray side.

python -m benchmarks.finetuning.launchers JOB.json
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.finetuning import workload
from benchmarks.finetuning.workload import encoded, job, listed, log_line, make_model, prepare, read_job, steps_of
from benchmarks.harness import median, table
from stitch_ray.records import Example
from stitch_ray.training.job import CHECKPOINTS, METRICS
from stitch_ray.training.metrics import MetricsLog

WORKERS = 2
_SKIP = 3
"""First steps, in which caches are filled and memory is taken; not counted."""


def compare(
    folder: Path, source: str, data: Sequence[Example], *, repeats: int, steps: int
) -> tuple[str, dict[str, Any]]:
    """Steady tokens a second, what surrounds the steps, and whether the checkpoints are the same bytes."""
    model = folder / "llama"
    if not model.exists():
        make_model(model, data)
    prepared = prepare(folder / "launchers" / "data", encoded(data, model, max_length=1024))
    settings = {
        "max_steps": steps,
        "workers": WORKERS,
        "max_length": 1024,
        "batch": {"tokens": 1024},
        "zero": {"stage": 2},
    }
    sides = {
        "Ray Train": lambda path: [sys.executable, "-m", "benchmarks.finetuning.launchers", path],
        "torchrun": lambda path: workload.torchrun(WORKERS, "stitch_ray.training.worker", path),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    wholes: dict[str, list[float]] = {name: [] for name in sides}
    around: dict[str, list[float]] = {name: [] for name in sides}
    bytes_of: list[dict[str, bytes]] = []
    for repeat in range(repeats):
        # Each goes first as often as the other.
        for name in list(sides) if repeat % 2 == 0 else list(sides)[::-1]:
            run = folder / "launchers" / f"{name.split()[0]}-{repeat}"
            path = job(run, prepared, model, **settings)
            wholes[name].append(workload.run(sides[name](str(path)), threads=1, log=run / "log.txt"))
            records = steps_of(run)
            saving = sum(r["seconds"] for r in MetricsLog.read(run / METRICS) if r["kind"] == "checkpoint")
            rates[name].append(workload.steady_rate(records, _SKIP))
            around[name].append(wholes[name][-1] - sum(record["seconds"] for record in records) - saving)
            bytes_of.append(_state(run / CHECKPOINTS / f"step-{steps:06d}"))
            log_line(f"{repeat + 1}/{repeats} {name}: {rates[name][-1]:,.0f} tokens/s, {wholes[name][-1]:.1f} s in all")
    same = all(files == bytes_of[0] for files in bytes_of)
    lines = [
        {
            "launcher": name,
            "tokens/s, every repetition": listed(rates[name]),
            "median tokens/s": f"{median(rates[name]):,.0f}",
            "start and end, s": f"{median(around[name]):.1f}",
            "whole command, s": f"{median(wholes[name]):.1f}",
        }
        for name in sides
    ]
    share = median(rates["Ray Train"]) / median(rates["torchrun"])
    note = (
        f"{WORKERS} workers of 1 thread, ZeRO-2, float32, {steps} steps of {WORKERS} x 1,024 packed tokens of {source}, "
        f"without the first {_SKIP}; whole optimizer steps. Ray Train reaches {share:.1%} of torchrun (bar 97 %: "
        f"{'met' if share >= 0.97 else 'MISSED'}). The final checkpoints of all {len(bytes_of)} runs are "
        f"{'equal to the last bit' if same else 'DIFFERENT'}."
    )
    return f"{table(lines)}\n\n{note}", {"rates": rates, "whole": wholes, "around": around, "bitwise_equal": same}


def _state(folder: Path) -> dict[str, bytes]:
    import hashlib

    files = sorted(folder.glob("state-*.safetensors"))
    assert files, f"no checkpoint in {folder}"
    return {file.name: hashlib.sha256(file.read_bytes()).digest() for file in files}


def main() -> None:
    """Ray of its own, one job, the end."""
    from stitch_ray.ray_session import session
    from stitch_ray.training.launch import launch

    with session(num_cpus=WORKERS):
        print(launch(read_job(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()

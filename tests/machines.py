"""`make test-machines`: the tests whose numbers could depend on the machine, as on other machines, one setting at a time.

    python -m tests.machines [--settings NAME …] [--parts numeric resume demo] [--minutes N]

A setting limits which instructions the libraries may use, how many threads they have, or where weights lie in memory. One
that this processor lacks is "not run". Every cell is written as it ends to benchmarks/results/machines-<processor>.md,
with the versions; cells of settings that were not asked for keep what they were.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_FLAGS = ("flags", "Features")


@dataclass(frozen=True)
class Setting:
    """Environment of the tests. `needs`: a flag of the processor; `prefix`: in front of the command."""

    environment: dict[str, str] = field(default_factory=dict)
    needs: str | None = None
    prefix: tuple[str, ...] = ()


SETTINGS = {
    "as it is": Setting(),
    "ATEN_CPU_CAPABILITY=default": Setting({"ATEN_CPU_CAPABILITY": "default"}),
    "ATEN_CPU_CAPABILITY=avx2": Setting({"ATEN_CPU_CAPABILITY": "avx2"}, needs="avx2"),
    "ATEN_CPU_CAPABILITY=avx512": Setting({"ATEN_CPU_CAPABILITY": "avx512"}, needs="avx512f"),
    "ONEDNN_MAX_CPU_ISA=SSE41": Setting({"ONEDNN_MAX_CPU_ISA": "SSE41"}, needs="sse4_1"),
    "ONEDNN_MAX_CPU_ISA=AVX2": Setting({"ONEDNN_MAX_CPU_ISA": "AVX2"}, needs="avx2"),
    "MKL_CBWR=COMPATIBLE": Setting({"MKL_CBWR": "COMPATIBLE"}),
    "one thread on one core": Setting({"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}, prefix=("taskset", "-c", "0")),
    "two threads": Setting({"OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}),
    "unaligned weights": Setting({"PYTHONPATH": str(ROOT / "tests" / "unaligned")}),
}
# The tests that are marked `numeric`, and those that are marked `resume`: what runs twice must come out the same.
PARTS: dict[str, tuple[str, ...]] = {
    "numeric": ("tests", "-m", "numeric and not slow"),
    "resume": ("tests", "-m", "resume and not slow"),
    "demo": ("tests/integration/test_demo.py", "-m", "not slow"),
}


def lacks(setting: Setting, flags: frozenset[str]) -> str | None:
    """Why this processor cannot run it."""
    return f"not run: no {setting.needs}" if setting.needs and setting.needs not in flags else None


def cell(output: str, code: int) -> str:
    """What stands in the table, of the last lines of pytest."""
    counts = {what: int(number) for number, what in re.findall(r"(\d+) (passed|failed|errors?|skipped)", output)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, re.M)
    if not counts.get("passed") and not failed:
        return f"nothing ran (exit {code})"
    text = ", ".join(f"{number} {what}" for what, number in counts.items())
    return text + (": " + ", ".join(name.rpartition("/")[2] for name in failed) if failed else "")


def render(cells: dict[str, dict[str, str]], where: dict[str, Any]) -> str:
    rows = [
        {"setting": name, "date": found.get("date", ""), "libraries": found.get("libraries", "")}
        | {part: found.get(part, "") for part in PARTS}
        for name, found in cells.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
    return "\n".join(
        [
            "# The same on other machines",
            "",
            f"{where['cpu']}; {versions}. Printed by `make test-machines`, which says what each setting is.",
            "`libraries` is what PyTorch said of itself under the setting.",
            "",
            table(rows),
            "",
        ]
    )


def _processor() -> frozenset[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.split(":")[0].strip() in _FLAGS:
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def _environment(setting: Setting) -> dict[str, str]:
    found = {**os.environ, **setting.environment}
    if "PYTHONPATH" in setting.environment and (before := os.environ.get("PYTHONPATH")):
        found["PYTHONPATH"] = os.pathsep.join([setting.environment["PYTHONPATH"], before])
    return found


def _libraries(setting: Setting) -> str:
    code = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads(), 'threads')"
    command = [*setting.prefix, sys.executable, "-c", code]
    environment = {"OMP_NUM_THREADS": "1", **_environment(setting)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def _run(setting: Setting, part: str, processes: int) -> str:
    command = [*setting.prefix, sys.executable, "-m", "pytest", *PARTS[part], "-q", "-n", str(processes)]
    started = time.monotonic()
    found = subprocess.run(command, cwd=ROOT, env=_environment(setting), capture_output=True, text=True, check=False)
    text = cell(found.stdout, found.returncode)
    print(found.stdout[-1500:] if found.returncode else "", end="", flush=True)
    return f"{text} ({time.monotonic() - started:.0f} s)"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--processes", type=int, default=2, help="that share out the tests of a cell (default 2)")
    options = parser.parse_args(arguments)
    where, flags = machine(), _processor()
    name = "-".join(re.findall(r"[a-z0-9]+", where["cpu"].lower()))
    state = RESULTS / f"machines-{name}.json"
    cells: dict[str, dict[str, str]] = json.loads(state.read_text())["cells"] if state.exists() else {}
    cells = {one: cells.get(one, {}) for one in SETTINGS}
    failed = []
    for one in options.settings:
        setting, found = SETTINGS[one], cells[one]
        found["date"] = datetime.date.today().isoformat()
        reason = lacks(setting, flags)
        found["libraries"] = reason or _libraries(setting)
        for part in options.parts:
            found[part] = reason or _run(setting, part, options.processes)
            print(f"{one} | {part}: {found[part]}", flush=True)
            if " failed" in found[part] or " error" in found[part] or "nothing ran" in found[part]:
                failed.append(f"{one}, {part}")
            state.write_text(json.dumps({"machine": where, "cells": cells}, indent=1) + "\n", encoding="utf-8")
            state.with_suffix(".md").write_text(render(cells, where), encoding="utf-8")
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()

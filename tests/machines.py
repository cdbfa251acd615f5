"""`make test-machines`: the tests whose numbers could depend on the machine, as on other machines, one setting at a time.

    python -m tests.machines [--settings NAME …] [--processes N]

A setting limits which instructions the libraries may use, how many threads they have, or where weights lie in memory. One
that this processor lacks is "not run". The columns are the tests with these marks (pyproject.toml); one that has two is
in both. What a setting gave is written as it ends to benchmarks/results/machines-<processor>.md, with the versions;
settings that were not asked for keep what they gave before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import machine, table
from tests.tally import MARKS, Tally

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


def lacks(setting: Setting, flags: frozenset[str]) -> str | None:
    """Why this processor cannot run it."""
    return f"not run: no {setting.needs}" if setting.needs and setting.needs not in flags else None


def cell(outcomes: Mapping[str, Sequence[str]], code: int) -> str:
    """What stands in the table. outcomes: of the tests of one mark, as `tests.tally` has them; code: pytest's."""
    text = ", ".join(f"{len(ids)} {outcome}" for outcome, ids in outcomes.items()) or "nothing ran"
    wrong = [id.rpartition("/")[2] for outcome, ids in outcomes.items() if outcome != "passed" for id in ids]
    ended = code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    return text + (": " + ", ".join(wrong) if wrong else "") + ("" if ended else f" (pytest ended with {code})")


def render(cells: dict[str, dict[str, str]], where: dict[str, Any]) -> str:
    rows = [
        {"setting": name, "date": found.get("date", ""), "libraries": found.get("libraries", "")}
        | {mark: found.get(mark, "") for mark in MARKS}
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


def _files() -> list[str]:
    """With tests of these marks: the others need not even be read."""
    marked = re.compile(r"mark\.(?:" + "|".join(MARKS) + r")\b")
    paths = sorted((ROOT / "tests").glob("*/test_*.py"))
    return [str(path.relative_to(ROOT)) for path in paths if marked.search(path.read_text(encoding="utf-8"))]


def _run(setting: Setting, processes: int) -> tuple[Tally, int]:
    """The tests by mark and outcome, and how pytest ended."""
    chosen = ["-m", f"({' or '.join(MARKS)}) and not slow", "-p", "tests.tally", *_files()]
    command = [*setting.prefix, sys.executable, "-m", "pytest", "-q", "-n", str(processes), *chosen]
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        environment = _environment(setting) | {"STITCH_RAY_TALLY": file.name}
        found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        text = Path(file.name).read_text(encoding="utf-8")
    if found.returncode:
        print(found.stdout[-20_000:], found.stderr[-2_000:], sep="\n", flush=True)
    return json.loads(text or "{}"), found.returncode


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="NAME")
    parser.add_argument("--processes", type=int, default=2, help="that share out the tests (default 2)")
    options = parser.parse_args(arguments)
    where, flags = machine(), _processor()
    name = "-".join(re.findall(r"[a-z0-9]+", where["cpu"].lower()))
    state = RESULTS / f"machines-{name}.json"
    cells: dict[str, dict[str, str]] = json.loads(state.read_text())["cells"] if state.exists() else {}
    cells = {one: cells.get(one, {}) for one in SETTINGS}
    failed = []
    for one in options.settings:
        setting, started = SETTINGS[one], time.monotonic()
        reason = lacks(setting, flags)
        cells[one] = {"date": datetime.date.today().isoformat(), "libraries": reason or _libraries(setting)}
        if reason is None:
            tally, code = _run(setting, options.processes)
            cells[one] |= {mark: cell(tally.get(mark, {}), code) for mark in MARKS}
            if code:
                failed.append(one)
        print(f"{one} ({time.monotonic() - started:.0f} s): {cells[one]}", flush=True)
        state.write_text(json.dumps({"machine": where, "cells": cells}, indent=1) + "\n", encoding="utf-8")
        state.with_suffix(".md").write_text(render(cells, where), encoding="utf-8")
    if failed:
        raise SystemExit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()

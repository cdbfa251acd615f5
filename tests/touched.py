"""The slow tests of the areas whose files the last commits touched, within a limit of minutes.

`python -m tests.touched [--base COMMIT] [--minutes 40] [--list]`. Without a base: the commits of the four hours before
the newest. Files with slow tests run one after the other, those with most changed lines behind them first; what the time
does not suffice for is named as not run. Exit code 1 if a test failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
_PERIOD_S = 4 * 3600
_TIDY_UP_S = 60.0

# Beginnings of paths -> files whose slow tests are about them.
AREAS: Mapping[str, tuple[str, ...]] = {
    "stitch_ray/selection/": (
        "faults/test_select_faults.py",
        "integration/test_select.py",
        "unit/test_rating_paths.py",
    ),
    "stitch_ray/data/": ("unit/test_readers.py", "faults/test_select_faults.py"),
    "stitch_ray/engines/": (
        "integration/test_vllm_engine.py",
        "faults/test_select_faults.py",
        "integration/test_serving_models.py",
    ),
    "stitch_ray/training/": (
        "integration/test_finetune.py",
        "integration/test_zero_state.py",
        "integration/test_train_scorer_encoder.py",
        "faults/test_finetune_faults.py",
    ),
    "stitch_ray/reliability/": ("integration/test_train_scorer_encoder.py", "integration/test_predict.py"),
    "stitch_ray/exclusion/": ("integration/test_exar.py",),
    "stitch_ray/ensemble/": (
        "integration/test_predict.py",
        "integration/test_serving_models.py",
        "faults/test_serving_member_faults.py",
    ),
    "stitch_ray/submission.py": ("integration/test_submission.py",),
    "stitch_ray/runs.py": ("faults/test_select_faults.py", "faults/test_finetune_faults.py"),
    "stitch_ray/client/": ("faults/test_serving_faults.py",),
    "serve_apps/": (
        "integration/test_serving_models.py",
        "faults/test_serving_faults.py",
        "faults/test_serving_member_faults.py",
        "faults/test_serving_update_faults.py",
        "faults/test_serving_load_faults.py",
    ),
    "cluster/": ("faults/test_finetune_faults.py",),
    "jobs/demo.py": ("integration/test_demo.py",),
}


def slow_files(changed: Mapping[str, int], files: Mapping[str, str]) -> list[str]:
    """changed: path -> changed lines; files: paths below tests/ that hold slow tests -> their text. Most changed first."""
    lines: Counter[str] = Counter()
    for path, number in changed.items():
        for beginning, found in AREAS.items():
            if path.startswith(beginning):
                lines.update(dict.fromkeys(found, number))
        if path.startswith("tests/"):
            name = path.removeprefix("tests/")
            module = f"tests.{name.removesuffix('.py').replace('/', '.')}"
            # A test file itself, and those that use a changed helper.
            users = [file for file, text in files.items() if file == name or module in text]
            lines.update(dict.fromkeys(users, number))
    return [file for file, _ in lines.most_common() if file in files]


def changed_lines(base: str | None) -> dict[str, int]:
    """Of `base`..HEAD."""
    if base is None:
        newest = int(_git("log", "-1", "--format=%ct"))
        base = _git("rev-list", "-1", f"--before={newest - _PERIOD_S}", "HEAD") or _git(
            "hash-object", "-t", "tree", "/dev/null"
        )
    rows = [line.split("\t") for line in _git("diff", "--numstat", "--no-renames", base, "HEAD").splitlines()]
    return {path: sum(int(number) for number in (added, gone) if number != "-") for added, gone, path in rows}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _run(command: list[str], seconds: float) -> int | None:
    """Exit code; None if the time was not enough. Nothing that it started is left then."""
    environment = {**os.environ, "STITCH_RAY_TEST_FORK": "0"}  # Ray starts its workers itself, as in use
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # fixtures take down what they started
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_TIDY_UP_S)
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", help="commit before the first of the last ones")
    parser.add_argument(
        "--minutes", type=float, default=40, help="begin no file and let none run beyond it (default 40)"
    )
    parser.add_argument("--list", action="store_true", help="print the files and run nothing")
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.minutes
    holds = {
        path.relative_to(ROOT / "tests").as_posix(): path.read_text(encoding="utf-8")
        for path in sorted((ROOT / "tests").glob("*/test_*.py"))
    }
    chosen = slow_files(
        changed_lines(options.base), {name: text for name, text in holds.items() if "mark.slow" in text}
    )
    print("slow tests of:", ", ".join(chosen) or "nothing that was touched", flush=True)
    if options.list:
        return
    failed, unfinished = [], []
    for name in chosen:
        left = ends - time.monotonic()
        command = [sys.executable, "-m", "pytest", f"tests/{name}", "-m", "slow", "-q", "--durations=10"]
        code = _run(command, left) if left > 0 else None
        if code is None:
            unfinished.append(name)
        elif code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):  # none of them is slow after all
            failed.append(name)
    if unfinished:
        print(f"not run to their end within {options.minutes:g} minutes: {', '.join(unfinished)}")
    if failed:
        raise SystemExit(f"slow tests failed in: {', '.join(failed)}")


if __name__ == "__main__":
    main()

"""How a run of all tests is shared out over processes, and what its last lines say."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from xdist.scheduler import LoadFileScheduling

from tests.needs import MENDED_BY

# Files that start Ray, Serve, vLLM or a browser, the longest first: what is left at the end is short, so that no process
# waits long for the other. A file that is missing here is only begun later than would be best.
LONGEST_FIRST = (
    "test_select.py",
    "test_demo.py",
    "test_finetune.py",
    "test_predict.py",
    "test_train_scorer.py",
    "test_sample_answers.py",
    "test_serving_models.py",
    "test_submission.py",
    "test_vllm_engine.py",
    "test_vllm_async.py",
    "test_exar.py",
    "test_scorer_serving.py",
    "test_zero_state.py",
    "test_train_scorer_encoder.py",
    "test_serving.py",
)
# One vLLM engine a process: these two files share one.
TOGETHER = {"test_vllm_async.py": "test_vllm_engine.py"}


def order(items: list[pytest.Item]) -> None:
    """Sort by file as above, then the other files that need Ray, then the rest; within a file nothing moves."""
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}

    def key(item: pytest.Item) -> tuple[int, bool]:
        return place.get(item.path.name, len(place)), "unit" in item.path.parts

    items.sort(key=key)


class Lanes(LoadFileScheduling):
    """Files go whole, in the order of `order`, to whichever process is free."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        folder, _, name = scope.rpartition("/")
        return f"{folder}/{TOGETHER.get(name, name)}"


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, once in a run: other processes wait and then share it. No test may change it."""
    own = factory.getbasetemp()
    root = (own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own) / "made-once"
    root.mkdir(exist_ok=True)
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not folder.exists():
            partial = root / f"{name}.partial"
            make(partial)
            partial.rename(folder)
    return folder


def skipped_line(reasons: Sequence[str]) -> str:
    """What was not run, why, and what mends it, in one line; of the reasons of all skips."""
    parts = []
    for reason, number in Counter(reasons).most_common():
        why, _, command = reason.removeprefix("Skipped: ").partition(MENDED_BY)
        parts.append(f"{number} tests: {why}" + (f" ({command})" if command else ""))
    return f"not run: {'; '.join(parts)}" if parts else "nothing was skipped"


def reasons_of(reports: Sequence[Any]) -> list[str]:
    found = []
    for report in reports:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        found.append(re.sub(r"\s+", " ", text))
    return found

"""Plugin of pytest: tests by mark and outcome, as JSON in the file that STITCH_RAY_TALLY names.

{mark: {outcome: [ids of tests]}}; outcomes are passed, failed, error (in a fixture) and skipped. A test with several marks
counts for each.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path

import pytest

MARKS = ("numeric", "resume", "demo")
Tally = dict[str, dict[str, list[str]]]


class Tallied:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, tuple[str, list[str]]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome: str = report.outcome
        if outcome == "failed" and report.when != "call":
            outcome = "error"
        if outcome != "passed" or report.when == "call":
            self._outcomes[report.nodeid] = (outcome, [mark for mark in MARKS if mark in report.keywords])

    def pytest_sessionfinish(self) -> None:
        found: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for nodeid, (outcome, marks) in self._outcomes.items():
            for mark in marks:
                found[mark][outcome].append(nodeid)
        self._path.write_text(json.dumps(found), encoding="utf-8")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # processes of pytest-xdist report to the one that started them
        config.pluginmanager.register(Tallied(Path(os.environ["STITCH_RAY_TALLY"])))

"""The faults that were tried, and what became of the requests."""

from __future__ import annotations

import json
import math
from datetime import date
from typing import Any

from benchmarks.harness import RESULTS, publish, table
from tests.faults.judging import Report

_NAME = "serving-faults"
_TITLE = "Serving: faults under load"
_COMMAND = "STITCH_RAY_PUBLISH=1 python -m pytest tests/faults -k serving"
_NOTE = (
    "Eight clients in closed loops on loopback, scripted members whose right answer is known. Failed: an error, or an "
    "abstention where the models would have answered. Wrong or unchecked: an answer that is not the one that was due, or "
    "that no threshold let pass. Recovery: until p99 is at most double what it was (and 0.1 s) for two seconds without a "
    "failure; where that was long, as on a busy machine, it shows little. Control of SIGKILL: every call made once, 24 "
    "clients, up to four kills."
)


class FaultTable:
    """`rows`: by fault."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def add(
        self,
        fault: str,
        report: Report,
        *,
        failures: int | None = None,
        recovery_s: float | None = None,
        control: str = "",
        note: str = "",
    ) -> None:
        """failures: where some of what the report calls so is what was to be."""
        shown = "" if recovery_s is None else f"{recovery_s:.1f}" if math.isfinite(recovery_s) else "never"
        self.rows[fault] = {
            "fault": fault,
            "requests": len(report.asked),
            "failed": report.failures if failures is None else failures,
            "wrong or unchecked": report.wrong,
            "p99 ms": f"{1000 * report.quantile(0.99):.0f}" if report.asked else "",
            "recovery s": shown,
            "control": control,
            "note": note,
            "date": date.today().isoformat(),
        }
        print(self.rows[fault], flush=True)

    def publish(self) -> None:
        file = RESULTS / f"{_NAME}.json"
        rows = {row["fault"]: row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}
        rows.update(self.rows)
        if rows:
            ordered = [rows[fault] for fault in sorted(rows)]
            publish(_NAME, _TITLE, {"Faults": f"{table(ordered)}\n\n{_NOTE}"}, {"rows": ordered}, _COMMAND)

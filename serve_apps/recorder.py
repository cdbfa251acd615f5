"""The deployment that keeps what the gateways saw: labels, abstentions, drift, and whether the promise is still plausible."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import serve

from serve_apps import meters
from stitch_ray.ensemble.serving.book import Book, Entry, LabelledOtherwise, UnknownAnswer
from stitch_ray.ensemble.serving.drift import DriftWatch

logger = logging.getLogger("ray.serve")

ANSWERS, FEEDBACK, ABSTAINED = "answers.jsonl", "feedback.jsonl", "abstained.jsonl"
SETTLES_S = 10.0
"""A replica that took up another's files may have to wait so long for what gateways could not tell in the meantime."""


@serve.deployment
class Recorder:
    """One replica. Gateways send what they saw a few times a second; one that dies loses what it had not sent yet.

    With a folder: `feedback.jsonl` as `calibrate` reads it, `abstained.jsonl` for people to look at, and `answers.jsonl`
    (numbers only, the last `remember` to twice as many), from which a new replica goes on.
    """

    def __init__(self, folder: str | None, remember: int) -> None:
        self._folder = None if folder is None else Path(folder)
        self._remember = remember
        self._book = Book(remember)
        self._written = 0
        self._policy_version: str | None = None
        self._drift: DriftWatch | None = None
        self._writing = asyncio.Lock()
        self._meters = meters.RecorderMeters()
        self._settled_at = 0.0
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._restore(self._folder)
            if len(self._book):
                self._settled_at = time.monotonic() + SETTLES_S

    async def call(self, version: str | None, method: str, args: Sequence[Any]) -> Any:
        """`record` or `label`, as members of an ensemble are called; there are no versions of a recorder."""
        if method not in ("record", "label"):
            raise AttributeError(f"a recorder has no method {method!r}")
        return await getattr(self, method)(*args)

    async def record(self, policy: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
        """Take in answers. policy: version and path; rows: an `Entry` each, `draft_confidence`, and texts for review.

        Texts are kept for abstentions only.
        """
        if policy["version"] != self._policy_version:
            self._policy_version = policy["version"]
            self._drift = await asyncio.to_thread(_reference, policy["path"])
        entries, abstained = [], []
        for row in rows:
            entry = Entry(**row["entry"])
            self._book.add(entry)
            entries.append(entry.to_dict())
            if entry.decision == "abstain":
                abstained.append({**entry.to_dict(), **row.get("texts", {})})
            self._look_for_drift(row.get("draft_confidence"))
        if self._folder is not None:
            async with self._writing:
                await asyncio.to_thread(self._write, entries, abstained)

    async def label(self, answer_id: str, correct: bool) -> dict[str, Any]:
        """{status: recorded | unknown | not_told_yet | conflict, message?}. not_told_yet: unknown, soon after a restart."""
        try:
            row = self._book.label(answer_id, correct)
        except UnknownAnswer as error:
            settled = time.monotonic() >= self._settled_at
            return {"status": "unknown" if settled else "not_told_yet", "message": str(error)}
        except LabelledOtherwise as error:
            return {"status": "conflict", "message": str(error)}
        if row is not None:
            self._look_at_promise(row)
            # An abstention without confidence says nothing about any threshold, and calibrate could not use it.
            if self._folder is not None and row["confidence"] is not None:
                async with self._writing:
                    await asyncio.to_thread(_append, self._folder / FEEDBACK, [row])
        return {"status": "recorded"}

    def describe(self) -> dict[str, Any]:
        """What is known: number of answers, monitors by promise, the last finding about drift."""
        drift = None if self._drift is None else self._drift.last
        return {
            "answers": len(self._book),
            "monitors": [
                {"policy_version": version, "task": task, "target_risk": risk, **monitor.to_dict()}
                for (version, task, risk), monitor in self._book.monitors.items()
            ],
            "drift": None
            if drift is None
            else {"distance": drift.distance, "bound": drift.bound, "found": drift.found},
        }

    def _look_at_promise(self, row: Mapping[str, Any]) -> None:
        promise = (row["policy_version"], row["task"], row["target_risk"])
        monitor = self._book.monitors.get(promise)
        if row["decision"] != "answer" or monitor is None:
            return
        self._meters.promise(row["task"], row["target_risk"], monitor)
        if monitor.alarm_at == monitor.labels:
            logger.warning(
                "the promise of a risk of at most %g is no longer plausible: %g of %d labelled answers were wrong; "
                "calibrate again (policy %s, task %s)",
                row["target_risk"],
                monitor.total,
                monitor.labels,
                row["policy_version"],
                row["task"],
            )

    def _look_for_drift(self, confidence: float | None) -> None:
        if self._drift is None or confidence is None:
            return
        drift = self._drift.add(confidence)
        if drift is not None:
            self._meters.drift(drift)
            if drift.found:
                logger.warning(
                    "confidences of the last %d answers differ from those of calibration (distance %.3f, by chance below "
                    "%.3f): the promise was made for other questions than these",
                    drift.num,
                    drift.distance,
                    drift.bound,
                )

    def _write(self, entries: list[dict[str, Any]], abstained: list[dict[str, Any]]) -> None:
        assert self._folder is not None
        answers = self._folder / ANSWERS
        if self._written + len(entries) > self._remember and answers.exists():
            answers.replace(_older(answers))
            self._written = 0
        _append(answers, entries)
        self._written += len(entries)
        if abstained:
            _append(self._folder / ABSTAINED, abstained)

    def _restore(self, folder: Path) -> None:
        for file in (_older(folder / ANSWERS), folder / ANSWERS):
            self._written = 0
            for row in _rows(file):
                self._book.add(Entry(**row))
                self._written += 1
        for row in _rows(folder / FEEDBACK):
            self._book.restore(row)
        for name in (ANSWERS, FEEDBACK, ABSTAINED):
            _end_line(folder / name)


def _reference(policy_path: str) -> DriftWatch | None:
    from stitch_ray.reliability.risk import calibration_table

    table = calibration_table.read(policy_path)
    if table is None:
        return None
    rows = table.filter([split == "calibrate" for split in table["split"].to_pylist()])
    return DriftWatch(rows["draft_confidence"].to_numpy(zero_copy_only=False))


def _older(path: Path) -> Path:
    return path.with_name(f"{path.stem}.1{path.suffix}")


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text)


def _end_line(path: Path) -> None:
    """A replica that was killed may have left half a line; what is added to it could not be read either."""
    if path.exists() and path.stat().st_size:
        with path.open("rb+") as stream:
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                stream.write(b"\n")


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    """Those that can be read: a replica that was killed may have left half a line."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            try:
                yield json.loads(line)
            except ValueError:
                logger.warning("%s: a line that cannot be read was left out", path.name)

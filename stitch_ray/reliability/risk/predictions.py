"""Two stages: predictions with the confidence and the label of draft and refined answer, every question through both."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stitch_ray.config.calibrate import CalibrateConfig
from stitch_ray.config.reliability import AnswerSplitConfig
from stitch_ray.data import readers
from stitch_ray.data.quarantine import BadRow, Quarantined
from stitch_ray.data.splits import split_among
from stitch_ray.errors import UserError
from stitch_ray.records import content_hash, question_group
from stitch_ray.reliability.policy import Fingerprints
from stitch_ray.reliability.risk.questions import SPLITS, Material, Questions, split_facts
from stitch_ray.reliability.risk.rows import check_share, confidence_of, loss_of
from stitch_ray.runs import read_manifest

PREDICTIONS = "predictions.parquet"
"""File of a `predict` run folder."""

STAGES = ("draft", "final")
_NEED_BOTH = (
    "a cascade is calibrated on questions that have all passed both stages; write them with predict and "
    "`calibration: true`"
)


class _Row(NamedTuple):
    group: str | None
    key: str
    task: str | None
    draft: float
    draft_loss: float
    final: float
    final_loss: float


def sources(paths: Sequence[str]) -> list[str]:
    """The files that `paths` name. Raises UserError for a missing path, and for a `predict` run that is not finished or
    whose confidences a policy made."""
    found = []
    for path in paths:
        file = Path(path) / PREDICTIONS
        if not file.is_file():
            found += readers.expand([path])
            continue
        manifest = read_manifest(Path(path)) or {}
        if manifest.get("status") != "done":
            raise UserError(f"predictions: {path} is no finished run; run the same command again")
        if manifest.get("scale") is not None:
            raise UserError(
                f"predictions: the confidences in {path} are on the scale of policy {manifest.get('policy')}, and a policy "
                "is made of the scorer's own; predict with calibration: true and without a policy"
            )
        found.append(str(file))
    return found


def read(config: CalibrateConfig) -> Material:
    """Predictions as calibration data. Columns: draft_confidence, draft_correct or draft_label, the same with final_,
    and where known task, question and context. A confidence may be null: unscored.

    Split by question where rows have one, else all rows calibrate. Unusable rows are quarantined. Raises UserError if
    none is left, and for any row without its second stage: leaving those out would choose by confidence.
    """
    rows: list[_Row] = []
    bad: list[Quarantined] = []
    for source in sources(config.predictions):
        for row in readers.iter_rows(source):
            try:
                if row.record is None:
                    raise BadRow(row.error or "row could not be read")
                _check_stages(row.record, f"{source}:{row.line}")
                rows.append(_row(row.record, config.loss, row.raw))
            except BadRow as error:
                bad.append(Quarantined.of(row.source, row.line, str(error), row.raw))
    check_share("predictions", len(rows), bad, config.predictions)
    if len({row.group is None for row in rows}) > 1:
        raise UserError("predictions: some rows have a question and some have none; give it to all, or to none")
    return _material(rows, bad, config)


def _check_stages(record: Mapping[str, Any], where: str) -> None:
    labelled = [any(record.get(f"{stage}_{what}") is not None for what in ("correct", "label")) for stage in STAGES]
    for stage, other, has, other_has in zip(STAGES, STAGES[::-1], labelled, labelled[::-1], strict=True):
        if f"{stage}_confidence" not in record:
            raise UserError(f"predictions: {where} has no field {stage}_confidence; {_NEED_BOTH}")
        if other_has and not has:
            raise UserError(
                f"predictions: {where} has a label of its {other} answer and none of its {stage}; {_NEED_BOTH}"
            )


def _row(record: Mapping[str, Any], loss: str, raw: str) -> _Row:
    question, context = record.get("question"), record.get("context")
    if question is not None and not isinstance(question, str):
        raise BadRow("field 'question' is no text")
    if context is not None and not isinstance(context, str):
        raise BadRow("field 'context' is no text")
    values = []
    for stage in STAGES:
        values.append(confidence_of(record, f"{stage}_confidence"))
        values.append(loss_of(record.get(f"{stage}_correct"), record.get(f"{stage}_label"), loss, f"{stage}_"))
    task = None if record.get("task") is None else str(record["task"])
    # Of a conversation the group is that of its first question, which only the run that predicted knows.
    group = record.get("group_id") or (question_group(question, context) if question else None)
    if group is not None and not isinstance(group, str):
        raise BadRow("field 'group_id' is no text")
    return _Row(group, content_hash(raw), task, *values)


def _material(rows: Sequence[_Row], bad: Sequence[Quarantined], config: CalibrateConfig) -> Material:
    split = _split(config)
    notes = []
    dropped: Counter[str] = Counter()
    parts: dict[str, list[_Row]] = {name: [] for name in SPLITS}
    seen: set[str] = set()
    for row in sorted(rows, key=lambda row: row.key):
        side = "calibrate" if row.group is None else split_among(row.group, split.shares, split.salt)
        if side not in parts:
            dropped["of the splits train and stack"] += 1
        elif math.isnan(row.draft_loss) and side != "isotonic":
            dropped["not labelled"] += 1
        elif row.group is not None and row.group in seen:
            dropped["a further answer to the same question"] += 1
        else:
            parts[side].append(row)
            seen |= {row.group} if row.group is not None else set()
    if rows[0].group is None:
        notes.append("Predictions without a question cannot be split: all calibrate, and nothing is left to test on.")
    if not parts["calibrate"]:
        raise UserError("predictions: the calibrate split holds no labelled row; raise split.calibrate or give more")
    questions = {name: _questions(part) for name, part in parts.items()}
    return Material(
        isotonic=questions["isotonic"],
        calibrate=questions["calibrate"],
        test=questions["test"],
        fingerprints=_fingerprints(config),
        splits=split_facts({name: (len(part), part.draft_loss) for name, part in questions.items()}),
        rows_in=len(rows) + len(bad),
        rows_out=sum(map(len, parts.values())),
        dropped=dict(dropped),
        quarantined=tuple(bad),
        notes=tuple(notes),
    )


def _split(config: CalibrateConfig) -> AnswerSplitConfig:
    """That of the runs that predicted, else of the configuration. Raises UserError if they do not agree."""
    own = {
        path: AnswerSplitConfig(**values)
        for path in config.predictions
        if (values := (read_manifest(Path(path)) or {}).get("split")) is not None
    }
    first = next(iter(own.values()), None)
    if any(other != first for other in own.values()):
        raise UserError(
            f"predictions: {', '.join(own)} were split in different ways; predict with the same split section"
        )
    if first is not None and config.split is not None and config.split != first:
        raise UserError("split has no effect on run folders of predict, which bring their own; remove it")
    return first or config.split or AnswerSplitConfig()  # type: ignore[call-arg]


def _questions(rows: Sequence[_Row]) -> Questions:
    columns = [np.array([row[column] for row in rows], np.float64) for column in range(3, len(_Row._fields))]
    return Questions(np.array([row.task for row in rows], object), *columns)


def _fingerprints(config: CalibrateConfig) -> Fingerprints:
    """Of the runs that predicted; of files only the route is known. Raises UserError if the runs differ."""
    found: dict[str, Fingerprints] = {}
    for path in config.predictions:
        marks = (read_manifest(Path(path)) or {}).get("fingerprints")
        if marks is None:
            found[path] = Fingerprints(route=config.route)
            continue
        auxiliaries = marks.get("auxiliaries")
        found[path] = Fingerprints(
            marks.get("primary"),
            None if auxiliaries is None else tuple(auxiliaries),
            marks.get("scorer"),
            marks["route"],
        )
        if found[path].route.partition(":")[0] != config.route:
            raise UserError(f"route: {path} was predicted with route {found[path].route}, not {config.route}")
    if len(set(found.values())) > 1:
        raise UserError(
            f"predictions: {', '.join(found)} are of different models, scorers or routes; calibrate each apart"
        )
    return next(iter(found.values()))

"""Labelled answers as the token data of the encoder: held out by question, and weighted so that both classes count."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stitch_ray.config.train_scorer import ScorerTrainingConfig
from stitch_ray.data.splits import split_of
from stitch_ray.errors import UserError
from stitch_ray.runs import fresh_folder, write_json
from stitch_ray.training import dataset
from stitch_ray.training.dataset import LABELLED_SCHEMA, Labelled
from stitch_ray.training.job import TRAIN, VALIDATION

_MARKER = "data.json"
_RIGHT_FROM = 0.5
_SALT = "stitch_ray encoder validation"
"""Not the salt of the splits: the train split is one end of their axis, and shares of it would not be shares here."""


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A labelled answer, encoded. `second`: position at which the answer begins, for models that mark it; 0: nowhere."""

    answer_id: str
    group_id: str
    ids: Sequence[int]
    second: int
    label: float


def prepare(folder: Path, rows: Sequence[TrainingRow], training: ScorerTrainingConfig) -> dict[str, Any]:
    """Write the token data, unless it is there, and return what is known about it. Rows are put in order of their ids."""
    marker = folder / _MARKER
    if marker.exists():
        found: dict[str, Any] = json.loads(marker.read_text("utf-8"))
        return found
    share = training.validation
    held_out: dict[str, list[TrainingRow]] = {"train": [], "validation": []}
    for row in sorted(rows, key=lambda row: row.answer_id):
        if not 0 <= row.label <= 1:
            raise UserError(f"answers: the label of {row.answer_id} is {row.label}, not a number between 0 and 1")
        held_out[split_of(row.group_id, share, 0.0, _SALT)].append(row)
    train, validation = held_out["train"], held_out["validation"]
    if not train:
        raise UserError(
            f"answers: of {len(rows)} answers to train on {len(validation)} are for validation and none is left; give "
            "more answers, or a smaller training.validation"
        )
    weights, notes = _weights(train, balance=training.balance)
    if not validation:
        notes.append(
            "No question was held out for validation, so training did not stop early and the last step is used."
        )
    fresh_folder(folder)
    for name, part in ((TRAIN, train), (VALIDATION, validation)):
        table = dataset.labelled_table([_labelled(row, weights) for row in part])
        dataset.write(folder / name, [table], LABELLED_SCHEMA)
    facts = {"answers": len(train), "validation_answers": len(validation), "weights": weights, "notes": notes}
    write_json(marker, facts)
    return facts


def class_weights(labels: NDArray[np.float64]) -> dict[str, float]:
    """Weights with which right answers (label of at least 0.5) and wrong ones weigh the same in sum, and 1 on average.

    Both are 1 where only one of the two is there.
    """
    right = int((labels >= _RIGHT_FROM).sum())
    wrong = len(labels) - right
    if not right or not wrong:
        return {"right": 1.0, "wrong": 1.0}
    return {"right": len(labels) / (2 * right), "wrong": len(labels) / (2 * wrong)}


def _weights(train: Sequence[TrainingRow], *, balance: bool) -> tuple[dict[str, float], list[str]]:
    labels = np.array([row.label for row in train])
    right = int((labels >= _RIGHT_FROM).sum())
    notes = []
    if right in (0, len(labels)):
        kind, other = ("right", "wrong") if right else ("wrong", "right")
        notes.append(f"All {len(labels)} answers that the encoder learned from are {kind}: it has seen no {other} one.")
    return class_weights(labels) if balance else {"right": 1.0, "wrong": 1.0}, notes


def _labelled(row: TrainingRow, weights: Mapping[str, float]) -> Labelled:
    weight = weights["right" if row.label >= _RIGHT_FROM else "wrong"]
    return Labelled(np.asarray(row.ids, np.int32), row.second, row.label, weight, row.answer_id)

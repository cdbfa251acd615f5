"""One stage: labelled answers -> one of them a question, its confidence and its loss, by split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stitch_ray.config.calibrate import CalibrateConfig
from stitch_ray.errors import UserError
from stitch_ray.reliability.baselines import baseline_confidences
from stitch_ray.reliability.policy import Fingerprints
from stitch_ray.reliability.risk.questions import SPLITS, Floats, Material, Questions, split_facts
from stitch_ray.reliability.tables import Answers, one_a_question, served

CONFIDENCE = "confidence"


@dataclass(frozen=True, slots=True)
class Chosen:
    """One answer a question, of the kind that is given in use, of the splits that calibration uses."""

    answers: Answers
    dropped: Mapping[str, int]

    def of_split(self, name: str) -> NDArray[np.bool_]:
        found: NDArray[np.bool_] = self.answers.column("split") == name
        return found


def choose(answers: Answers, config: CalibrateConfig) -> Chosen:
    """Raises UserError if nothing is left to calibrate on, or there is no confidence and no scorer to give one."""
    if not config.scorer and CONFIDENCE not in answers.signals:
        raise UserError("answers: no row has a confidence; name a scorer, or give files with a column `confidence`")
    split = answers.column("split").astype(str)
    labelled = ~np.isnan(answers.column("label"))
    kind = served(answers, config.serve_kind)
    wanted = np.isin(split, SPLITS)
    usable = kind & wanted & (labelled | (split == "isotonic"))
    first = np.zeros(len(answers), np.bool_)
    first[np.flatnonzero(usable)[one_a_question(answers.take(usable))]] = True
    dropped = {
        "exact repeats": answers.rows_in - len(answers) - len(answers.quarantined),
        "of another kind than is given": int((~kind).sum()),
        "of the splits train and stack": int((kind & ~wanted).sum()),
        "not labelled": int((kind & wanted & ~usable).sum()),
        "a further answer to the same question": int((usable & ~first).sum()),
    }
    chosen = Chosen(answers.take(first), {reason: count for reason, count in dropped.items() if count})
    if not chosen.of_split("calibrate").any():
        raise UserError(
            "answers: the calibrate split holds no labelled answer of the kind that is given; "
            "raise split.calibrate or give more answers"
        )
    return chosen


def material(chosen: Chosen, scores: Mapping[str, Floats], config: CalibrateConfig, scorer: str | None) -> Material:
    """`scores`: name -> (answers,) of the chosen answers, among them `confidence`. `scorer`: its fingerprint."""
    answers = chosen.answers
    label, correct = answers.column("label"), answers.column("correct")
    known = ~np.isnan(label)
    loss = np.full(len(answers), np.nan)
    loss[known] = 1 - (correct[known].astype(np.float64) if config.loss == "error" else label[known])
    every = Questions(answers.column("task"), scores[CONFIDENCE], loss)
    parts = {name: every.take(chosen.of_split(name)) for name in SPLITS}
    tested = chosen.of_split("test")
    beside = {name: values[tested] for name, values in scores.items() if name != CONFIDENCE}
    return Material(
        isotonic=parts["isotonic"],
        calibrate=parts["calibrate"],
        test=parts["test"],
        fingerprints=Fingerprints(answers.answers_from, () if answers.answers_from else None, scorer),
        splits=split_facts({name: (len(part), part.draft_loss) for name, part in parts.items()}),
        rows_in=answers.rows_in,
        rows_out=len(answers),
        dropped=chosen.dropped,
        quarantined=answers.quarantined,
        test_scores={
            **{name: values for name, values in beside.items() if not np.isnan(values).all()},
            **(baseline_confidences(answers.take(tested), config.seed) if tested.any() else {}),
        },
    )

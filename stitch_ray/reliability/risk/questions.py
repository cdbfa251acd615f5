"""Calibration data in the one form that promises are made of, whether it came from answers or from predictions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stitch_ray.data.quarantine import Quarantined
from stitch_ray.reliability.policy import Fingerprints
from stitch_ray.report.reliability import SplitFacts

Floats = NDArray[np.float64]

SPLITS = ("isotonic", "calibrate", "test")
"""What calibration uses: the first for the grid of thresholds, without labels; the others as their names say."""


@dataclass(frozen=True, slots=True)
class Questions:
    """Independent questions with the answer of every stage; all (n,). Confidence NaN = unscored, loss NaN = not labelled.

    `final` and `final_loss` are None with one stage.
    """

    tasks: NDArray[np.object_]
    draft: Floats
    draft_loss: Floats
    final: Floats | None = None
    final_loss: Floats | None = None

    def __len__(self) -> int:
        return len(self.draft)

    @property
    def highest(self) -> Floats:
        """The strictest threshold at which a question still gets an answer, of whichever stage; NaN: none."""
        return self.draft if self.final is None else np.fmax(self.draft, self.final)

    def take(self, rows: NDArray[np.bool_]) -> Questions:
        return Questions(
            tasks=self.tasks[rows],
            draft=self.draft[rows],
            draft_loss=self.draft_loss[rows],
            final=None if self.final is None else self.final[rows],
            final_loss=None if self.final_loss is None else self.final_loss[rows],
        )

    def of_target(self, task: str | None, own: frozenset[str]) -> Questions:
        """The questions that a promise is about: those of its task, or for None those whose task has none of its own."""
        if task is not None:
            return self.take(self.tasks == task)
        return self.take(np.array([name not in own for name in self.tasks], np.bool_))


@dataclass(frozen=True, slots=True)
class Material:
    """All that a policy is made of. `isotonic` needs no labels. `dropped`: reason -> rows; `notes`: for the report."""

    isotonic: Questions
    calibrate: Questions
    test: Questions
    fingerprints: Fingerprints
    splits: Mapping[str, SplitFacts]
    rows_in: int
    rows_out: int
    dropped: Mapping[str, int]
    quarantined: tuple[Quarantined, ...]
    notes: tuple[str, ...] = ()
    test_scores: Mapping[str, Floats] = field(default_factory=dict)
    """Other confidences of the answers of the test split, by name, to measure this one beside."""


def split_facts(counts: Mapping[str, tuple[int, Floats]]) -> dict[str, SplitFacts]:
    """Split -> (answers, losses with NaN where not labelled) as counts for a report; one answer a question."""
    facts: dict[str, SplitFacts] = {}
    for name, (answers, losses) in counts.items():
        labelled = losses[~np.isnan(losses)]
        correct: Any = round(float(1 - labelled.mean()), 4) if len(labelled) else None
        facts[name] = {"answers": answers, "questions": answers, "correct": correct}
    return facts

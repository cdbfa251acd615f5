"""Confidences of drafts and of refined answers on one scale, so that one threshold suits both.

A scorer learns from drafts. Of a refined answer it says how it would trust a draft that looks like this, which may be far
from how often refined answers are right: then a threshold low enough for the ones lets wrong ones of the others pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logit

from stitch_ray.reliability.probability import Platt

Floats = NDArray[np.float64]
Stage = Literal["draft", "refined"]

LEAST_LABELS = 30
"""Fewer labelled questions are not fitted to."""

_EDGE = 1e-4


@dataclass(frozen=True, slots=True)
class StageScale:
    """For each stage its own logistic map of the log-odds of a score (Platt 1999). It is monotone: within a stage no two
    answers change places. Scores within 1e-4 of 0 and of 1 count as that far from them.
    """

    draft: Platt
    refined: Platt

    @classmethod
    def fit(cls, draft: ArrayLike, draft_loss: ArrayLike, final: ArrayLike, final_loss: ArrayLike) -> StageScale | None:
        """Maximum likelihood for each stage. All (n,): scores in [0, 1], losses in [0, 1]; NaN: unscored, not labelled.

        The labels must not be those that a threshold is tested on. None if a stage has less than `LEAST_LABELS` answers
        with both. Raises ValueError for numbers outside these ranges.
        """
        maps = []
        for score, loss in ((draft, draft_loss), (final, final_loss)):
            scores, losses = np.asarray(score, np.float64), np.asarray(loss, np.float64)
            known = ~np.isnan(scores) & ~np.isnan(losses)
            if (scores[known] < 0).any() or (scores[known] > 1).any():
                raise ValueError("scores to put on one scale must lie in [0, 1]")
            if known.sum() < LEAST_LABELS:
                return None
            maps.append(Platt.fit(_log_odds(scores[known]), 1 - losses[known]))
        return cls(*maps)

    def apply(self, score: ArrayLike, stage: Stage) -> Floats:
        """Confidences of the answers of one stage, in the shape of `score`. NaN stays NaN."""
        return getattr(self, stage).apply(_log_odds(np.asarray(score, np.float64)))

    def confidence(self, score: float | None, stage: Stage) -> float | None:
        """That of one answer; None stays None. The same number as `apply` gives."""
        return None if score is None or math.isnan(score) else float(self.apply(score, stage))

    def to_dict(self) -> dict[str, Any]:
        return {"draft": self.draft.to_dict(), "refined": self.refined.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StageScale:
        """Raises ValueError or KeyError for something else."""
        return cls(Platt.from_dict(values["draft"]), Platt.from_dict(values["refined"]))


def _log_odds(score: Floats) -> Floats:
    return np.asarray(logit(np.clip(score, _EDGE, 1 - _EDGE)), np.float64)

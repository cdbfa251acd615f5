"""What every scorer is measured beside: chance, length, and the uncertainty signals as they are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from stitch_ray.records import content_hash
from stitch_ray.reliability.signals.registry import SIGN
from stitch_ray.reliability.tables import Answers

RANDOM = "random"


def baseline_confidences(answers: Answers, seed: int = 0) -> dict[str, NDArray[np.float64]]:
    """Name -> (answers,), higher = surer, NaN where a signal was not computed.

    `random` depends on the answer's id and `seed` alone. `answer_length` counts words where the signal is not there.
    """
    found = {RANDOM: np.array([_chance(name, seed) for name in answers.column("answer_id")])}
    found["answer_length"] = -np.array([len(text.split()) for text in answers.column("answer")], np.float64)
    for name, sign in SIGN.items():
        if name in answers.signals:
            found[name] = sign * answers.signals[name]
    return found


def _chance(answer_id: str, seed: int) -> float:
    return int(content_hash([seed, answer_id])[:13], 16) / 16**13

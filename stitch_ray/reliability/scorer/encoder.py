"""What can be told of an encoder's folder without loading it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from stitch_ray.engines.fingerprint import model_fingerprint
from stitch_ray.errors import UserError
from stitch_ray.records import content_hash

NOTE = "stitch_ray.json"
"""Beside the weights: how they were trained."""

Loss = Literal["bce", "mse"]
Floats = NDArray[np.float64]


def as_score(logits: Floats, loss: Loss) -> Floats:
    """Logits as the scores that the loss has trained them to be."""
    return np.asarray(expit(logits), np.float64) if loss == "bce" else logits


def loss_of(folder: str | Path) -> Loss:
    """What the classifier in `folder` was trained by. Raises UserError if its note does not say."""
    file = Path(folder) / NOTE
    try:
        loss = json.loads(file.read_text(encoding="utf-8"))["loss"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder} is no classifier of train-scorer: {file.name} is missing or does not tell its loss "
            f"({type(error).__name__})"
        ) from error
    if loss not in ("bce", "mse"):
        raise UserError(f"{file}: loss is {loss!r}, expected bce or mse")
    return "bce" if loss == "bce" else "mse"


def encoder_fingerprint(folder: str | Path, loss: Loss, max_length: int | None) -> str:
    """16 hex digits that change with the weights, the tokenizer and how the model is used."""
    return content_hash([model_fingerprint(str(folder)), loss, max_length])

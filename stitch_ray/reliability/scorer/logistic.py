"""The stack as plain numbers: a logistic model over the encoder's logit and the signals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ENCODER = "encoder"
"""Name of the feature that is the encoder's logit."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class LogisticStack:
    """Log-odds of being right: intercept + sum of coef * (feature - mean) / scale, a number of each a feature.

    A feature with coefficient 0 is not looked at.
    """

    names: tuple[str, ...]
    mean: tuple[float, ...]
    scale: tuple[float, ...]
    coef: tuple[float, ...]
    intercept: float

    def __post_init__(self) -> None:
        lengths = {len(values) for values in (self.names, self.mean, self.scale, self.coef)}
        if len(lengths) != 1 or not self.names or len(set(self.names)) != len(self.names):
            raise ValueError("a stack has one mean, scale and coefficient for each of its features, and some feature")
        if not np.isfinite([*self.mean, *self.scale, *self.coef, self.intercept]).all() or min(self.scale) <= 0:
            raise ValueError("a stack's numbers must be finite, and its scales positive")

    @classmethod
    def identity(cls) -> LogisticStack:
        """Of the encoder alone: its logit as it is."""
        return cls((ENCODER,), (0.0,), (1.0,), (1.0,), 0.0)

    @property
    def needed(self) -> frozenset[str]:
        """Features without which there is no score."""
        return frozenset(name for name, coef in zip(self.names, self.coef, strict=True) if coef)

    def apply(self, features: Floats) -> Floats:
        """features: (n, names), oriented as the signals are. Returns (n,); NaN where a needed feature is not finite."""
        used = [column for column, coef in enumerate(self.coef) if coef]
        if self == LogisticStack.identity():
            log_odds = features[:, 0]
        else:
            mean, scale, coef = (np.array(values)[used] for values in (self.mean, self.scale, self.coef))
            # A sum a row, not a matrix product, whose rounding may depend on the number of rows.
            log_odds = self.intercept + ((features[:, used] - mean) / scale * coef).sum(1)
        usable = np.isfinite(features[:, used]).all(1)
        return np.where(usable & np.isfinite(log_odds), log_odds, np.nan)


def feature_matrix(names: Sequence[str], rows: int, logits: Floats | None, signals: Mapping[str, Floats]) -> Floats:
    """(rows, names): the encoder's logit under its name, signals under theirs; a column of NaN for what is not there."""
    columns = {**signals, ENCODER: logits}
    matrix = np.full((rows, len(names)), np.nan)
    for column, name in enumerate(names):
        values = columns.get(name)
        if values is not None:
            matrix[:, column] = values
    return matrix

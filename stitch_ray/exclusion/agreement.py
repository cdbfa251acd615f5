"""How two judgements of the same answers agree: confusion, accuracy, Cohen's kappa. CORRECT is the positive class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stitch_ray.exclusion.labels import CORRECT, Label


@dataclass(frozen=True, slots=True)
class Agreement:
    """Counts of answers that both judged: `tp` both CORRECT, `fp` only the first, `fn` only the second, `tn` neither."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def num(self) -> int:
        return self.tp + self.fp + self.fn + self.tn

    @property
    def differences(self) -> int:
        return self.fp + self.fn

    @property
    def accuracy(self) -> float | None:
        """Share of equal judgements; None: nothing was judged by both."""
        return (self.tp + self.tn) / self.num if self.num else None

    @property
    def kappa(self) -> float | None:
        """Agreement beyond chance (Cohen 1960); None where chance alone agrees always, or nothing was judged."""
        if not self.num:
            return None
        ours, theirs = self.tp + self.fp, self.tp + self.fn
        chance = (ours * theirs + (self.num - ours) * (self.num - theirs)) / self.num**2
        return None if chance == 1 else ((self.tp + self.tn) / self.num - chance) / (1 - chance)

    def to_dict(self) -> dict[str, Any]:
        return {"num": self.num, **asdict(self), "accuracy": self.accuracy, "kappa": self.kappa}


def agreement(first: Sequence[Label | None], second: Sequence[Label | None]) -> Agreement:
    """Over the answers that both judged (None: not judged). Raises ValueError for different lengths."""
    pairs = [
        (one == CORRECT, two == CORRECT)
        for one, two in zip(first, second, strict=True)
        if one is not None and two is not None
    ]
    return Agreement(
        tp=pairs.count((True, True)),
        fp=pairs.count((True, False)),
        fn=pairs.count((False, True)),
        tn=pairs.count((False, False)),
    )

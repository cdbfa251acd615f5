"""A finished scorer in memory: encoder, stack and isotonic step as one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from stitch_ray.reliability.scorer.file import MODEL, ScorerFile, Scores
from stitch_ray.reliability.scorer.inputs import ScoreInput
from stitch_ray.reliability.scorer.model import SequenceClassificationScorer

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ReliabilityScorer:
    """Scores answers inside one process. `encoder` is None for a scorer of signals alone."""

    file: ScorerFile
    encoder: SequenceClassificationScorer | None

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        batch_tokens: int | None = None,
        num_threads: int | None = None,
        device: str | None = None,
    ) -> ReliabilityScorer:
        """From a run folder of `train-scorer`. Raises UserError if it is unfinished, damaged or mixed up."""
        file = ScorerFile.load(folder)
        if file.loss is None:
            return cls(file, None)
        encoder = SequenceClassificationScorer(
            Path(folder) / MODEL,
            batch_tokens=batch_tokens,
            max_length=file.max_length,
            num_threads=num_threads,
            device=device,
        )
        return cls(file, encoder)

    @property
    def fingerprint(self) -> str:
        return self.file.fingerprint

    @property
    def signals(self) -> frozenset[str]:
        """What must be given with an answer."""
        return self.file.needed

    def score(self, inputs: Sequence[ScoreInput], signals: Mapping[str, Floats]) -> tuple[Scores, dict[int, str]]:
        """Scores of n answers, and row -> why it is unscored. `signals`: name -> (n,), NaN where not computed."""
        reasons: dict[int, str] = {}
        logits = None
        if self.encoder is not None:
            read = self.encoder.read(inputs)
            logits = read.logits
            reasons |= read.reasons
        scores = self.file.combine(logits, signals, len(inputs))
        for row in np.flatnonzero(np.isnan(scores.confidence)):
            lacking = [
                name for name in sorted(self.signals) if name not in signals or not np.isfinite(signals[name][row])
            ]
            reasons.setdefault(int(row), f"no finite value of {', '.join(lacking)}")
        return scores, reasons

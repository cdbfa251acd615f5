"""`scorer.json`: all of a scorer but the encoder's weights, as numbers that anybody can read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stitch_ray.data.trained_on import read_trained_on, write_trained_on
from stitch_ray.errors import UserError
from stitch_ray.records import content_hash
from stitch_ray.reliability.probability import Isotonic
from stitch_ray.reliability.scorer.encoder import Loss, as_score, encoder_fingerprint
from stitch_ray.reliability.scorer.logistic import ENCODER, LogisticStack, feature_matrix
from stitch_ray.runs import write_json

__all__ = ["MODEL", "SCORER", "ScorerFile", "Scores", "read_trained_on", "write_trained_on"]

SCORER, MODEL = "scorer.json", "model"
"""Names in a run folder of `train-scorer`."""

_FORMAT = 2

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scores:
    """Of n answers, all (n,): NaN where an answer is unscored.

    `encoder`: the encoder's score (NaN without one); `stack`: log-odds of encoder and signals; `confidence`: the
    probability of being right, in [0, 1]. Equal confidences are common: to rank answers, rank them by `stack`.
    """

    encoder: Floats
    stack: Floats
    confidence: Floats

    def as_dict(self) -> dict[str, Floats]:
        return {"encoder": self.encoder, "stack": self.stack, "confidence": self.confidence}


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerFile:
    """What `scorer.json` says. The three of the encoder are None for a scorer of signals alone.

    `answers_from`: fingerprint of the model and prompt whose answers it was trained on, `answering`: how they were drawn
    and compared (see `reliability.answering`); None: files did not say.
    `num_stack`, `num_isotonic`: answers behind the two steps.
    """

    encoder_fingerprint: str | None
    loss: Loss | None
    max_length: int | None
    stack: LogisticStack
    isotonic: Isotonic
    answers_from: str | None
    answering: Mapping[str, Any] | None = None
    num_stack: int = 0
    num_isotonic: int = 0
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if (ENCODER in self.stack.names) != (self.encoder_fingerprint is not None):
            raise ValueError("a scorer weighs its encoder if, and only if, it has one")

    @property
    def signals(self) -> tuple[str, ...]:
        """The signals it was made of. Those in `needed` are the ones it cannot do without."""
        return tuple(name for name in self.stack.names if name != ENCODER)

    @property
    def needed(self) -> frozenset[str]:
        """Signals that an answer must have to be scored: those with weight."""
        return self.stack.needed - {ENCODER}

    @property
    def intercept(self) -> float:
        return self.stack.intercept

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with everything a confidence depends on, and with `answers_from`."""
        return content_hash(self._identity())

    def weights(self) -> list[dict[str, Any]]:
        """One entry a feature: name, coef (of the standardised feature), mean, scale."""
        stack = self.stack
        rows = zip(stack.names, stack.coef, stack.mean, stack.scale, strict=True)
        return [{"name": name, "coef": coef, "mean": mean, "scale": scale} for name, coef, mean, scale in rows]

    def combine(self, logits: Floats | None, signals: Mapping[str, Floats], rows: int) -> Scores:
        """Scores of `rows` answers from the encoder's logits and the signals, all (rows,)."""
        stack = self.stack.apply(feature_matrix(self.stack.names, rows, logits, signals))
        encoder = np.full(rows, np.nan) if logits is None or self.loss is None else as_score(logits, self.loss)
        return Scores(encoder, stack, self.isotonic.apply(stack))

    def save(self, folder: Path) -> None:
        """Write `scorer.json` in `folder`."""
        fitted = {"stack": self.num_stack, "isotonic": self.num_isotonic, "notes": list(self.notes)}
        write_json(folder / SCORER, {**self._identity(), "fitted": fitted, "fingerprint": self.fingerprint})

    @classmethod
    def load(cls, path: str | Path) -> ScorerFile:
        """From a run folder of `train-scorer`, or the file in it.

        Raises UserError if it is missing or damaged, or `model/` is not the encoder it was made with.
        """
        file = Path(path) / SCORER if Path(path).is_dir() else Path(path)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"scorer: {file} cannot be read ({error}); name a finished run of train-scorer") from error
        try:
            scorer = cls._from_dict(values)
            known = values["fingerprint"]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"scorer: {file} is damaged ({type(error).__name__}: {error}); run train-scorer again"
            ) from error
        if known != scorer.fingerprint:
            raise UserError(f"scorer: {file} was changed after train-scorer wrote it; run train-scorer again")
        scorer.check_encoder(file.parent)
        return scorer

    def check_encoder(self, folder: Path) -> None:
        """Raises UserError unless `model/` in `folder` is the encoder that the numbers were made with."""
        if self.loss is None:
            return
        model = folder / MODEL
        if not model.is_dir():
            raise UserError(f"scorer: {model} is missing; copy it together with {SCORER}")
        if encoder_fingerprint(model, self.loss, self.max_length) != self.encoder_fingerprint:
            raise UserError(f"scorer: {model} is not the encoder that {SCORER} was made with; run train-scorer again")

    def _identity(self) -> dict[str, Any]:
        stack = self.stack
        return {
            "format": _FORMAT,
            "encoder": None if self.encoder_fingerprint is None else f"{MODEL}/",
            "encoder_fingerprint": self.encoder_fingerprint,
            "loss": self.loss,
            "max_length": self.max_length,
            "signals": list(self.signals),
            "standardise": {"mean": list(stack.mean), "scale": list(stack.scale)},
            "logistic": {"coef": list(stack.coef), "intercept": stack.intercept},
            "isotonic": self.isotonic.to_dict(),
            "answers_from": self.answers_from,
            "answering": None if self.answering is None else dict(self.answering),
        }

    @classmethod
    def _from_dict(cls, values: Mapping[str, Any]) -> ScorerFile:
        """The numbers of a feature stand in the order encoder, if there is one, then `signals`."""
        if values["format"] != _FORMAT:
            raise ValueError(f"format is {values['format']!r}, this version reads {_FORMAT}")
        if values["loss"] not in ("bce", "mse", None):
            raise ValueError(f"loss is {values['loss']!r}")
        has_encoder = values["encoder"] is not None
        standardise, logistic = values["standardise"], values["logistic"]
        return cls(
            encoder_fingerprint=values["encoder_fingerprint"],
            loss=values["loss"],
            max_length=values["max_length"],
            stack=LogisticStack(
                names=(*([ENCODER] if has_encoder else []), *values["signals"]),
                mean=tuple(map(float, standardise["mean"])),
                scale=tuple(map(float, standardise["scale"])),
                coef=tuple(map(float, logistic["coef"])),
                intercept=float(logistic["intercept"]),
            ),
            isotonic=Isotonic.from_dict(values["isotonic"]),
            answers_from=values["answers_from"],
            answering=values["answering"],
            num_stack=int(values["fitted"]["stack"]),
            num_isotonic=int(values["fitted"]["isotonic"]),
            notes=tuple(values["fitted"]["notes"]),
        )

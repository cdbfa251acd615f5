"""Weighing the encoder against the signals, and making the result a probability: each on a split of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from stitch_ray.errors import UserError
from stitch_ray.reliability.probability import Isotonic
from stitch_ray.reliability.scorer.encoder import Loss, encoder_fingerprint
from stitch_ray.reliability.scorer.file import MODEL, ScorerFile
from stitch_ray.reliability.scorer.logistic import ENCODER, LogisticStack, feature_matrix
from stitch_ray.reliability.tables import Answers

Floats = NDArray[np.float64]

_CONSTANT = 1e-12
"""Spread, relative to its size, below which a feature says nothing."""


@dataclass(frozen=True, slots=True)
class FittedStack:
    """The stack, the number of answers behind it, and what a reader of the report should know."""

    stack: LogisticStack
    answers: int
    notes: tuple[str, ...] = ()


def fit_stack(features: Floats, names: Sequence[str], correct: NDArray[np.bool_], *, seed: int = 0) -> FittedStack:
    """Logistic regression with an L2 penalty (C = 1) on standardised features.

    features: (n, names), as `feature_matrix` makes them; correct: (n,). Rows that lack a feature are left out, and
    counted in the notes. The encoder alone is not weighed: its logit is the log-odds already, or, with loss mse, what
    the isotonic step makes them of. Raises UserError for a feature that no row has, and for rows of one class.
    """
    names = tuple(names)
    if names == (ENCODER,):
        return FittedStack(LogisticStack.identity(), 0)
    finite = np.isfinite(features)
    for name, here in zip(names, finite.T, strict=True):
        if not here.any():
            raise UserError(f"signals: {name} is missing from every answer of the stack split; compute it or remove it")
    complete = finite.all(1)
    used, labels = features[complete], correct[complete].astype(bool)
    check_classes(labels, "stack", len(features) - len(used))
    mean, scale = used.mean(0), used.std(0)
    constant = scale <= _CONSTANT * np.maximum(1.0, np.abs(mean))
    scale[constant] = 1.0
    coef = np.zeros(len(names))
    if constant.all():
        raise UserError(f"signals: {', '.join(names)} are the same for every answer of the stack split; name others")
    fitted = LogisticRegression(C=1.0, random_state=seed, max_iter=1000, tol=1e-8)
    fitted.fit(((used - mean) / scale)[:, ~constant], labels)
    coef[~constant] = fitted.coef_[0]
    notes = [
        f"{name} is the same for every answer of the stack split, and has no weight"
        for name, same in zip(names, constant, strict=True)
        if same
    ]
    if len(used) < len(features):
        lacking = ", ".join(name for name, here in zip(names, finite.T, strict=True) if not here.all())
        notes.append(f"{len(features) - len(used)} of {len(features)} answers of the stack split lack {lacking}")
    stack = LogisticStack(
        names,
        tuple(map(float, mean)),
        tuple(map(float, scale)),
        tuple(map(float, coef)),
        float(fitted.intercept_[0]),
    )
    return FittedStack(stack, len(used), tuple(notes))


def fit_isotonic(log_odds: Floats, correct: NDArray[np.bool_], *, split: str = "isotonic") -> Isotonic:
    """The probability of being right by log-odds of the stack, both (n,). Unscored rows (NaN) are left out.

    Raises UserError if the rows are of one class.
    """
    scored = np.isfinite(log_odds)
    labels = correct[scored].astype(bool)
    check_classes(labels, split, int((~scored).sum()))
    return Isotonic.fit(log_odds[scored], labels)


def check_classes(correct: NDArray[np.bool_], split: str, left_out: int = 0) -> None:
    """Raises UserError, with the numbers, unless the answers of a split are right and wrong ones."""
    right = int(correct.sum())
    if 0 < right < len(correct):
        return
    wrong = len(correct) - right
    unscored = f", and {left_out} lack a score or a signal" if left_out else ""
    raise UserError(
        f"split {split}: {len(correct)} usable answers, {right} right and {wrong} wrong{unscored}; it takes right and "
        f"wrong ones. Raise split.{split}, or give more answers"
    )


def fit_scorer(
    folder: Path,
    answers: Answers,
    logits: Floats | None,
    *,
    signals: Sequence[str],
    loss: Loss,
    max_length: int | None,
    seed: int = 0,
) -> ScorerFile:
    """Everything behind the encoder, from labelled `answers` of the splits stack and isotonic.

    `logits`: (rows,) of the encoder in `model/` of `folder`; None: no encoder. The rest goes into the file. Raises
    UserError for signals that the answers do not have, and for a split without right and wrong answers.
    """
    for name in signals:
        if name not in answers.signals:
            raise UserError(f"signals: {name} is in none of the answers; let sample-answers compute it, or remove it")
    names = (*([ENCODER] if logits is not None else []), *signals)
    features = feature_matrix(names, len(answers), logits, answers.signals)
    correct, splits = answers.column("correct").astype(bool), answers.column("split")
    stack, isotonic = splits == "stack", splits == "isotonic"
    fitted = fit_stack(features[stack], names, correct[stack], seed=seed)
    log_odds = fitted.stack.apply(features[isotonic])
    probability = fit_isotonic(log_odds, correct[isotonic])
    encoder = folder / MODEL
    return ScorerFile(
        encoder_fingerprint=None if logits is None else encoder_fingerprint(encoder, loss, max_length),
        loss=None if logits is None else loss,
        max_length=None if logits is None else max_length,
        stack=fitted.stack,
        isotonic=probability,
        answers_from=answers.answers_from,
        answering=answers.answering,
        num_stack=fitted.answers,
        num_isotonic=int(np.isfinite(log_odds).sum()),
        notes=fitted.notes,
    )

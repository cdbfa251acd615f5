"""Scores of confidence side by side on the same answers, with intervals."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stitch_ray.reliability import metrics
from stitch_ray.reliability.bootstrap import (
    Ranking,
    percentile_interval,
    probability_metrics,
    ranking_metrics,
    resample,
)
from stitch_ray.reliability.evaluation_table import Evaluation, Interval, ScoreRow

__all__ = ["Evaluation", "Interval", "ScoreRow", "evaluate", "paired_difference"]

Floats = NDArray[np.float64]

_AT_RISK = "coverage_at_risk_"
_OF_PROBABILITIES = ("brier", "ece", "accuracy", "balanced_accuracy")
_FEW = 30


def evaluate(
    confidences: Mapping[str, ArrayLike],
    residual: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    probabilities: Collection[str] = (),
    bootstrap: int = 1000,
    risks: Sequence[float] = (0.05, 0.1, 0.2),
    ece_bins: int = 15,
    seed: int = 0,
) -> Evaluation:
    """Every score's metrics on the same answers, with bootstrap percentile intervals from the same resamples.

    confidences: name -> (answers,), higher = surer. A value that is not finite is unscored: the answer is left out of
    that score's figures and counted. residual: (answers,), in [0, 1], 0 = right. groups: the question of each answer;
    then questions are resampled, not answers. probabilities: names whose values are probabilities of being right.
    bootstrap: resamples, 0 for no intervals.

    Raises ValueError for no answers, unequal lengths, a residual or probability out of range, and unknown names.
    """
    r = metrics.checked_residual(residual)
    units = _units(groups, len(r))
    if unknown := sorted(set(probabilities) - set(confidences)):
        raise ValueError(f"probabilities names {', '.join(unknown)}, which confidences does not hold")
    scores = {name: _Score.of(name, values, r, name in probabilities) for name, values in confidences.items()}
    resampled = _resampled(scores, units, bootstrap, risks, ece_bins, seed)
    rows = []
    for name, score in scores.items():
        cells = {}
        for key, value in _values(score, risks, ece_bins).items():
            values = resampled[name].get(key)
            cells[key] = Interval(value) if values is None or math.isnan(value) else _interval(value, values)
        rows.append(ScoreRow(name, cells, len(score.rows), len(r) - len(score.rows)))
    notes = _notes(scores, r, units, groups is not None, bootstrap, resampled)
    questions = None if groups is None else int(units.max()) + 1
    return Evaluation(rows, notes, len(r), questions, float(r.mean()), bootstrap, ece_bins)


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    residual: ArrayLike,
    metric: str,
    *,
    groups: ArrayLike | None = None,
    bootstrap: int = 1000,
    ece_bins: int = 15,
    seed: int = 0,
) -> Interval:
    """`metric` of score a minus that of score b, over the answers both have scored, with the interval of the difference.

    Both scores are measured on the same resamples, so what makes a set of answers hard for both cancels: two scores can
    differ clearly though their own intervals overlap. `metric` is a key of `ScoreRow.metrics`; for those of
    probabilities a and b are probabilities. Raises ValueError as `evaluate` does, and for an unknown metric.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    r = metrics.checked_residual(residual)
    if not len(first) == len(second) == len(r):
        raise ValueError(f"a has {len(first)} values, b {len(second)} and residual {len(r)}")
    both = np.isfinite(first) & np.isfinite(second)
    if not both.any():
        raise ValueError("no answer is scored by both a and b")
    units = _units(groups, len(r))[both]
    units = np.unique(units, return_inverse=True)[1]
    risks = [float(metric.removeprefix(_AT_RISK))] if metric.startswith(_AT_RISK) else []
    probability = metric in _OF_PROBABILITIES
    scores = {name: _Score.of(name, x[both], r[both], probability) for name, x in (("a", first), ("b", second))}
    values = {name: _values(score, risks, ece_bins) for name, score in scores.items()}
    if metric not in values["a"]:
        raise ValueError(f"metric {metric!r} is unknown; there are {', '.join(values['a'])}")
    resampled = _resampled(scores, units, bootstrap, risks, ece_bins, seed)
    difference = values["a"][metric] - values["b"][metric]
    if math.isnan(difference) or metric not in resampled["a"]:
        return Interval(difference)
    return _interval(difference, resampled["a"][metric] - resampled["b"][metric])


@dataclass(frozen=True, slots=True)
class _Score:
    """The answers that one score has scored: their positions, confidences and residuals."""

    rows: NDArray[np.int64]
    confidence: Floats
    residual: Floats
    probability: bool

    @staticmethod
    def of(name: str, values: ArrayLike, residual: Floats, probability: bool) -> _Score:
        confidence = np.asarray(values, dtype=np.float64)
        if confidence.shape != residual.shape:
            raise ValueError(f"confidences[{name!r}] has shape {confidence.shape} for {len(residual)} residuals")
        rows = np.flatnonzero(np.isfinite(confidence))
        c = confidence[rows]
        if probability and ((c < 0) | (c > 1)).any():
            raise ValueError(f"confidences[{name!r}] is among the probabilities but not in [0, 1]")
        return _Score(rows, c, residual[rows], probability)


def _values(score: _Score, risks: Sequence[float], ece_bins: int) -> dict[str, float]:
    c, r, correct = score.confidence, score.residual, 1 - score.residual
    binary = bool(np.isin(r, (0, 1)).all())
    keys = ["auroc", "aurc", "e_aurc", "augrc", "auacc", "prr", "prr_50"]
    keys += _OF_PROBABILITIES if score.probability else ()
    keys += [f"{_AT_RISK}{risk:g}" for risk in risks]
    found = dict.fromkeys(keys, math.nan)
    if not len(c):
        return found
    found |= {key: getattr(metrics, key)(c, r) for key in ("aurc", "e_aurc", "augrc", "auacc", "prr")}
    found["prr_50"] = metrics.prr(c, r, max_rejection=0.5)
    found |= {f"{_AT_RISK}{risk:g}": metrics.coverage_at_risk(c, r, risk)[0] for risk in risks}
    if binary:
        found["auroc"] = metrics.auroc(c, r)
    if score.probability:
        found["brier"], found["ece"] = metrics.brier(c, correct), metrics.ece(c, correct, ece_bins)
        if binary:
            found["accuracy"] = metrics.accuracy(c, correct)
            found["balanced_accuracy"] = metrics.balanced_accuracy(c, correct)
    return found


def _resampled(
    scores: Mapping[str, _Score],
    units: NDArray[np.int64],
    bootstrap: int,
    risks: Sequence[float],
    ece_bins: int,
    seed: int,
) -> dict[str, dict[str, Floats]]:
    """Score -> metric -> its value in every resample, (bootstrap,). Empty where there can be no interval."""
    found: dict[str, dict[str, list[Floats]]] = {name: {} for name in scores}
    usable = {name: score for name, score in scores.items() if len(score.rows)}
    if not bootstrap or units.max() == 0:
        return {name: {} for name in scores}
    rankings = {n: (Ranking.of(s.confidence), Ranking.of(-s.residual)) for n, s in usable.items()}
    for counts in resample(units, bootstrap, seed):
        for name, score in usable.items():
            own = counts if len(score.rows) == len(units) else counts[:, score.rows]
            values = ranking_metrics(*rankings[name], score.residual, own, risks)
            if score.probability:
                values |= probability_metrics(score.confidence, score.residual, own, ece_bins)
            for key, value in values.items():
                found[name].setdefault(key, []).append(value)
    return {name: {key: np.concatenate(parts) for key, parts in cells.items()} for name, cells in found.items()}


def _interval(value: float, resampled: Floats) -> Interval:
    return Interval(value, *percentile_interval(resampled))


def _units(groups: ArrayLike | None, answers: int) -> NDArray[np.int64]:
    if groups is None:
        return np.arange(answers)
    ids = np.asarray(groups)
    if ids.shape != (answers,):
        raise ValueError(f"groups has shape {ids.shape} for {answers} residuals")
    return np.unique(ids, return_inverse=True)[1]


def _notes(
    scores: Mapping[str, _Score],
    residual: Floats,
    units: NDArray[np.int64],
    grouped: bool,
    bootstrap: int,
    resampled: Mapping[str, Mapping[str, Floats]],
) -> list[str]:
    notes = []
    binary = bool(np.isin(residual, (0, 1)).all())
    wrong, right = int((residual == 1).sum()), int((residual == 0).sum())
    if not binary:
        notes.append("answers are not simply right or wrong: there is no AUROC and no accuracy")
    elif not wrong or not right:
        only = "right" if right else "wrong"
        notes.append(f"all {len(residual)} answers are {only}: AUROC, PRR and balanced accuracy are not defined")
    elif min(wrong, right) < _FEW:
        fewer = f"{wrong} wrong" if wrong <= right else f"{right} right"
        notes.append(f"only {fewer} answers of {len(residual)}: all figures are rough, whatever their intervals say")
    if bootstrap and units.max() == 0:
        notes.append(f"one {'question' if grouped else 'answer'}: no intervals")
    undefined = max(
        (int(np.isnan(v).sum()) for cells in resampled.values() for v in cells.values() if not np.isnan(v).all()),
        default=0,
    )
    if undefined:
        notes.append(
            f"some metrics are not defined in up to {undefined} of {bootstrap} resamples (for want of a right or a "
            "wrong answer); their intervals are over the others"
        )
    for name, score in scores.items():
        missing = len(residual) - len(score.rows)
        if missing == len(residual):
            notes.append(f"{name}: no answer is scored")
        elif missing:
            notes.append(
                f"{name}: {missing} of {len(residual)} answers are unscored and left out of its figures, which are "
                "not over the same answers as those of other scores"
            )
        if missing and wrong and right and binary and len(set(score.residual)) == 1:
            notes.append(f"{name}: all answers it scores are {'wrong' if score.residual[0] else 'right'}, so no AUROC")
        if len(score.rows) > 1 and (score.confidence == score.confidence[0]).all():
            notes.append(f"{name}: equal for all answers, so it orders nothing")
    return notes

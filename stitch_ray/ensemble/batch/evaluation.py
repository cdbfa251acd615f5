"""The honest evaluation of a run: every system on the same labelled questions, what refining did, promises, and cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stitch_ray.ensemble.batch.measures import (
    CASCADE,
    CASCADE_FULL,
    DIALOGUE,
    MAJORITY,
    PRIMARY,
    Answers,
    Floats,
    Kept,
    System,
    majority,
    measure,
    promise_kept,
)
from stitch_ray.ensemble.batch.traces import Stages, read_trace
from stitch_ray.evaluation.refinement import (
    Refinement,
    count_options,
    random_fix_rate,
    random_reguess,
    refinement,
    same_answer,
)
from stitch_ray.reliability.calibration import quantile_grid
from stitch_ray.reliability.cascade import replay
from stitch_ray.reliability.metrics import aurc, auroc, risk_coverage_curve

_POINTS = 200
Curve = tuple[Floats, Floats]
"""(coverage, risk), strictest threshold first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Guess:
    """What chance would do on the questions that were refined and whose options are known."""

    num: int
    num_options: float
    reguess_accuracy: float
    fix_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """How well a confidence tells right from wrong answers; NaN with one class."""

    auroc: float
    aurc: float
    scored: int
    unscored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Of `num` labelled questions of `split` (None: all). `refined`: of those that went through the second stage."""

    num: int
    split: str | None
    systems: tuple[System, ...]
    refined: Refinement | None
    guess: Guess | None
    promises: tuple[Kept, ...]
    rankings: Mapping[str, Ranking]
    curves: Mapping[str, Curve]
    point: tuple[float, float] | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON values but for NaN, and without the curves."""
        return {
            "num": self.num,
            "split": self.split,
            "systems": [system.as_dict() for system in self.systems],
            "refinement": None if self.refined is None else self.refined.as_dict(),
            "random_guess": None
            if self.guess is None
            else {name: getattr(self.guess, name) for name in Guess.__slots__},
            "promises": [one.as_dict() for one in self.promises],
            "ranking": {
                name: {key: getattr(one, key) for key in Ranking.__slots__} for name, one in self.rankings.items()
            },
        }


def evaluate(
    table: pa.Table,
    references: Sequence[Sequence[str]],
    *,
    both_stages: bool,
    route: str,
    auxiliaries: Sequence[str],
    loss: str,
    seed: int,
) -> Evaluation | None:
    """Of a predictions table; None where nothing is labelled.

    On the test split if the table has labelled questions of it: scorer and policy may have learned from the others. Else
    on all. `loss`: what the promise is about, error or quality. `auxiliaries`: those that answered alone.
    """
    labelled = np.array(pc.is_valid(table["draft_label"]).to_pylist(), np.bool_)
    if not labelled.any() and table.num_rows:
        labelled = np.array(pc.is_valid(table["correct"]).to_pylist(), np.bool_)
    tested = labelled & (np.array(table["split"].to_pylist(), object) == "test")
    rows = np.flatnonzero(tested if tested.any() else labelled)
    if not len(rows):
        return None
    own = _Columns(table.take(pa.array(rows, pa.int64())), [references[row] for row in rows])
    units = np.unique(np.array(own["group_id"], object).astype(str), return_inverse=True)[1].astype(np.int64)
    systems = [measure(one, own.references, units, seed) for one in _systems(own, both_stages, auxiliaries)]
    refined = own.flags(text is not None for text in own["refined"])
    same = np.array([same_answer(str(d), f) for d, f in zip(own["draft"], own["refined"], strict=True)], np.bool_)
    right, right_after = own.flags(own["draft_correct"]), own.flags(own["final_correct"])
    return Evaluation(
        num=len(rows),
        split="test" if tested.any() else None,
        systems=tuple(systems),
        refined=refinement(right[refined], right_after[refined], same[refined] & (right == right_after)[refined])
        if refined.any()
        else None,
        guess=_guess(own, refined, right),
        promises=_promises(own, loss, seed),
        rankings=_rankings(own, refined),
        curves=_curves(own, both_stages and route != "none"),
        point=_point(own),
    )


class _Columns:
    """The rows that are measured, as Python values."""

    def __init__(self, table: pa.Table, references: Sequence[Sequence[str]]) -> None:
        self.references = references
        self.num = table.num_rows
        self.stages: list[Stages] = [read_trace(json.loads(text)) for text in table["trace"].to_pylist()]
        self._columns = {name: table[name].to_pylist() for name in table.column_names if name != "trace"}

    def __getitem__(self, name: str) -> list[Any]:
        return self._columns[name]

    def floats(self, name: str) -> Floats:
        return np.array([np.nan if value is None else value for value in self[name]], np.float64)

    @staticmethod
    def flags(values: Any) -> Any:
        return np.array([bool(value) for value in values], np.bool_)


def _systems(own: _Columns, both_stages: bool, auxiliaries: Sequence[str]) -> list[Answers]:
    calls, tokens, seconds = own.floats("calls"), own.floats("tokens"), own.floats("seconds")
    first = [np.array([getattr(one, f"draft_{what}") for one in own.stages]) for what in ("calls", "tokens", "seconds")]
    found = []
    if any(text is not None for text in own["draft"]):
        alone = Answers(
            name=PRIMARY, texts=own["draft"], correct=own["draft_correct"], calls=first[0], tokens=first[1],
            seconds=first[2],
        )  # fmt: skip
        found.append(alone)
    members = [(own["draft"], own["draft_correct"])]
    costs = [first]
    for name in auxiliaries:
        texts, correct = own[f"answer.{name}"], own[f"correct.{name}"]
        cost = [np.ones(own.num), own.floats(f"tokens.{name}"), own.floats(f"seconds.{name}")]
        found.append(
            Answers(name=f"{name} alone", texts=texts, correct=correct, calls=cost[0], tokens=cost[1], seconds=cost[2])
        )
        members.append((texts, correct))
        costs.append(cost)
    if auxiliaries:
        chosen = majority([texts for texts, _ in members])
        found.append(
            Answers(
                name=MAJORITY,
                texts=[None if place is None else members[place][0][row] for row, place in enumerate(chosen)],
                correct=[None if place is None else members[place][1][row] for row, place in enumerate(chosen)],
                calls=np.sum([cost[0] for cost in costs], axis=0),
                tokens=np.sum([cost[1] for cost in costs], axis=0),
                seconds=np.max([cost[2] for cost in costs], axis=0),  # they can answer at the same time
            )
        )
    if both_stages:
        # Where refining failed there is nothing better than the draft.
        texts = [draft if text is None else text for draft, text in zip(own["draft"], own["refined"], strict=True)]
        correct = own["final_correct"]
        found.append(Answers(name=DIALOGUE, texts=texts, correct=correct, calls=calls, tokens=tokens, seconds=seconds))
    if any(decision is not None for decision in own["decision"]):
        found += _cascades(own, both_stages, first, [calls, tokens, seconds])
    return found


def _cascades(own: _Columns, both_stages: bool, first: Sequence[Floats], whole: Sequence[Floats]) -> list[Answers]:
    """With and without abstaining. Where every question was refined, those whose draft is given did not have to be."""
    drafted = own.flags(reason == "confident" for reason in own["reason"])
    costs = [np.where(drafted & both_stages, one, every) for one, every in zip(first, whole, strict=True)]
    texts: list[str | None] = []
    correct: list[bool | None] = []
    for row in range(own.num):
        last = "draft" if drafted[row] or own["refined"][row] is None else "refined"
        texts.append(own[last][row])
        correct.append(own["draft_correct" if last == "draft" else "final_correct"][row])
    common: dict[str, Any] = {"calls": costs[0], "tokens": costs[1], "seconds": costs[2]}
    given = Answers(name=CASCADE, texts=own["answer"], correct=own["correct"], **common)
    if not any(text is not None for text in own["refined"]):
        return [given]
    return [given, Answers(name=CASCADE_FULL, texts=texts, correct=correct, **common)]


def _guess(own: _Columns, refined: Any, right: Any) -> Guess | None:
    """Of the refined questions, or of all where none was."""
    shown = [f"{question}\n{context or ''}" for question, context in zip(own["question"], own["context"], strict=True)]
    options = count_options(shown, own.references)
    rows = [row for row in range(own.num) if options[row] is not None and (refined[row] or not refined.any())]
    if not rows:
        return None
    known = np.array([options[row] for row in rows], np.float64)
    return Guess(
        num=len(rows),
        num_options=float(known.mean()),
        reguess_accuracy=random_reguess(known),
        fix_rate=random_fix_rate(known, right[rows]),
    )


def _promises(own: _Columns, loss: str, seed: int) -> tuple[Kept, ...]:
    risks = sorted({risk for risk in own["target_risk"] if risk is not None})
    found = []
    for risk in risks:
        rows = [row for row, asked in enumerate(own["target_risk"]) if asked == risk]
        given = [row for row in rows if own["answer"][row] is not None and own["correct"][row] is not None]
        losses = [
            1.0 - float(own["correct"][row]) if loss == "error" else 1.0 - float(_label(own, row)) for row in given
        ]
        found.append(promise_kept(risk, np.array(losses, np.float64), len(rows), seed))
    return tuple(found)


def _label(own: _Columns, row: int) -> float:
    return float(own["draft_label" if own["reason"][row] == "confident" else "final_label"][row])


def _rankings(own: _Columns, refined: Any) -> dict[str, Ranking]:
    stages = {"draft": ("draft_confidence", "draft_correct", np.ones(own.num, np.bool_))}
    if refined.any():
        stages["refined"] = ("final_confidence", "final_correct", refined)
    found = {}
    for name, (confidence, correct, rows) in stages.items():
        values = own.floats(confidence)
        scored = rows & np.isfinite(values) & np.array([one is not None for one in own[correct]], np.bool_)
        if scored.any():
            residual = 1.0 - own.flags(own[correct])[scored]
            found[name] = Ranking(
                auroc=auroc(values[scored], residual),
                aurc=aurc(values[scored], residual),
                scored=int(scored.sum()),
                unscored=int((rows & ~scored).sum()),
            )
    return found


def _curves(own: _Columns, both_stages: bool) -> dict[str, Curve]:
    """Risk against coverage of all questions. Of the cascade every threshold is replayed, which takes both stages."""
    draft, wrong = own.floats("draft_confidence"), 1.0 - own.floats("draft_correct")
    found = _curve("draft", draft, wrong, own.num)
    if both_stages:
        final, wrong_after = own.floats("final_confidence"), 1.0 - own.floats("final_correct")
        found |= _curve("always refined", final, wrong_after, own.num)
        highest = np.fmax(draft, final)
        if np.isfinite(highest).any():
            accepted, losses = replay(draft, wrong, final, wrong_after, quantile_grid(highest, _POINTS))
            count = accepted.sum(1)
            found = {"cascade": (count / own.num, np.where(accepted, losses, 0.0).sum(1) / count)} | found
    return found


def _curve(name: str, confidence: Floats, wrong: Floats, num: int) -> dict[str, Curve]:
    scored = np.isfinite(confidence) & np.isfinite(wrong)
    if not scored.any():
        return {}
    curve = risk_coverage_curve(confidence[scored], wrong[scored])
    return {name: (curve.coverage * scored.sum() / num, curve.risk)}


def _point(own: _Columns) -> tuple[float, float] | None:
    """(coverage, risk) of the answers that were given."""
    given = [right for right, text in zip(own["correct"], own["answer"], strict=True) if text is not None]
    known = [right for right in given if right is not None]
    return (len(given) / own.num, 1.0 - sum(known) / len(known)) if known else None

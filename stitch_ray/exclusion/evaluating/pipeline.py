"""`exar evaluate`: tables, curves and the report of finished runs. Nothing is asked of any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stitch_ray.exclusion.evaluating.preflight import Ready, Refined
from stitch_ray.exclusion.measures import (
    Answering,
    System,
    Verdicts,
    Within,
    changes,
    likeliest,
    majority,
    surest,
    systems,
    table,
    verdict_text,
    verdicts,
    voted,
    votes,
    within_questions,
)
from stitch_ray.exclusion.refinement import any_right
from stitch_ray.reliability.evaluation import evaluate
from stitch_ray.report.exar import ExarFacts, write_report
from stitch_ray.runs import Progress, RunFolder, Summary, write_json

METRICS = "metrics.json"
_FEW = 20
"""Fewer questions than these are not worth a note."""
FIRST, REFINED = "first answer", "refined"

_RULES = (("majority of {}", majority), ("likeliest of {}", likeliest))


def run(ready: Ready, folder: RunFolder, progress: Progress = lambda step: None) -> Summary:
    """Write `metrics.json` and the report."""
    config = ready.config
    compared = ways(ready)
    rows = systems(compared, bootstrap=config.bootstrap, seed=config.seed)
    judged = first_verdicts(ready.refined, config.ece_bins)
    within = _within(ready.refined)
    facts = {
        "questions": ready.refined.questions.num_rows,
        "same_budget": budget(ready),
        "systems": [asdict(row) for row in rows],
        "changes": asdict(_changes(ready.refined)),
        "acc_at_k": _at_k(ready.refined),
        "reasons": ready.refined.manifest["reasons"],
        "validator": None if judged is None else judged.to_dict(),
        "within_questions": asdict(within),
        "scores": _scores(ready) if judged is not None else None,
        "notes": [*ready.notes, *_notes(rows, judged, within)],
    }
    write_json(folder.path / METRICS, facts)
    count = ready.refined.questions.num_rows
    folder.manifest.update(rows_in=count, rows_out=count, rows_quarantined=0, inputs=_inputs(ready), **facts)
    page: ExarFacts = {
        "manifest": folder.manifest,
        "metrics": facts,
        "curves": curves(ready),
        "examples": _examples(ready.refined),
        "judged": _judged(ready.refined),
    }
    write_report(folder.path / "report.html", page)
    folder.finish()
    text = table(rows) + ("" if judged is None else f"\n{verdict_text(judged, within)}")
    named = {row.name: row for row in rows}
    line = (
        f"exar evaluate: {named[REFINED].accuracy:.1%} right after refining, {named[FIRST].accuracy:.1%} at first "
        f"({count} questions) -> {folder.path / 'report.html'}"
    )
    return Summary(folder.path, folder.manifest, line, text)


def check_cluster(ready: Ready, path: Path) -> None:
    """Nothing here needs a cluster."""


def ways(ready: Ready) -> list[Answering]:
    """All that is compared: the first answer, refining, the controls, and choices among as many independent answers as
    the refinement had calls (rounded down), and as many as there are. Where refining abstains, first answer and vote
    are there once more, abstaining as often where they are least sure: by sequence probability and by share of votes."""
    first, refined = _first(ready.refined), _whole(REFINED, ready.refined)
    share = float(refined.answered.mean())
    found = [first, refined]
    likely = _floats(_first_attempts(ready.refined)["logprob"])
    if share < 1 and not np.isnan(likely).any():  # not every engine tells it
        found.append(surest(first, likely, share))
    found += [_whole(name, control) for name, control in ready.controls.items()]
    if ready.samples is not None:
        most = min(len(one.texts) for one in ready.samples)
        for k in sorted({min(budget(ready), most), most}):
            found += [voted(name.format(k), ready.samples, k, rule) for name, rule in _RULES]
            if share < 1:
                sure = np.array([votes(one, k) for one in ready.samples])
                found.append(surest(voted(_RULES[0][0].format(k), ready.samples, k, majority), sure, share))
    return found


def budget(ready: Ready) -> int:
    """Calls of models that a refined question took on average, verdicts too, rounded down."""
    return max(1, int(pc.mean(ready.refined.questions["calls"]).as_py()))


def first_verdicts(refined: Refined, ece_bins: int) -> Verdicts | None:
    """On the first attempts, which the validator has not selected. None: it judged none of them."""
    judged = _judged(refined)
    if not len(judged[0]):
        return None
    threshold = float(refined.manifest["work"]["validator"]["threshold"])
    return verdicts(judged[0], judged[1], threshold=threshold, ece_bins=ece_bins)


def curves(ready: Ready) -> dict[str, list[tuple[float, float]]]:
    """Name -> (calls a question, share of right answers): what further calls buy."""
    found = {}
    by_question = _attempts(ready.refined)
    if ready.samples is not None:
        most = min(len(one.texts) for one in ready.samples)
        for name, rule in _RULES:
            ways = [voted("", ready.samples, k, rule) for k in range(1, most + 1)]
            found[name.format("k")] = [(float(way.calls.mean()), float(way.right.mean())) for way in ways]
    longest = max(len(own) for own in by_question)
    points = []
    for k in range(1, longest + 1):
        calls = [sum(1 + one["checked"].startswith("judge") for one in own[:k]) for own in by_question]
        rights = [_right_by(own[:k], ready.refined) for own in by_question]
        points.append((float(np.mean(calls)), float(np.mean(rights))))
    found["refined, k attempts"] = points
    return found


def _right_by(own: Sequence[dict[str, Any]], refined: Refined) -> bool:
    threshold = float(refined.manifest["work"]["validator"]["threshold"])
    accepted = [
        one
        for one in own
        if one["checked"] == "unjudged" or (one["probability"] is not None and one["probability"] >= threshold)
    ]
    return bool(accepted and accepted[0]["correct"])


def _first(refined: Refined) -> Answering:
    questions, first = refined.questions, _first_attempts(refined)
    assert first["example_id"].to_pylist() == questions["example_id"].to_pylist()
    return Answering(
        name=FIRST,
        right=_flags(questions["first_correct"]),
        answered=np.ones(questions.num_rows, bool),
        calls=np.ones(questions.num_rows),
        tokens=_floats(first["tokens"]),
    )


def _whole(name: str, refined: Refined) -> Answering:
    questions = refined.questions
    return Answering(
        name=name,
        right=_flags(questions["correct"]),
        answered=np.array([one == "answer" for one in questions["decision"].to_pylist()], bool),
        calls=_floats(questions["calls"]),
        tokens=_floats(questions["tokens"]),
    )


def _changes(refined: Refined) -> Any:
    questions, whole = refined.questions, _whole("", refined)
    first = _flags(questions["first_correct"])
    attempts, repeats = _floats(questions["attempts"]), _floats(questions["repeats"])
    return changes(first, whole.right, whole.answered, attempts, repeats)


def _attempts(refined: Refined) -> list[list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in refined.questions["example_id"].to_pylist()}
    for row in refined.attempts.to_pylist():
        found[row["example_id"]].append(row)
    return list(found.values())


def _at_k(refined: Refined) -> list[float]:
    """acc@k of the attempts that were made: what somebody who knows the answers would get."""
    right = [[bool(one["correct"]) for one in own] for own in _attempts(refined)]
    return [any_right(right, k) for k in range(1, max(map(len, right)) + 1)]


def _judged(refined: Refined) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """P(CORRECT) of the first attempts that were judged, and whether they are right."""
    first = _judged_first(refined)
    return _floats(first["probability"]), _flags(first["correct"])


def _first_attempts(refined: Refined) -> pa.Table:
    return refined.attempts.filter(pc.equal(refined.attempts["number"], 0))


def _judged_first(refined: Refined) -> pa.Table:
    first = _first_attempts(refined)
    return first.filter(pc.is_valid(first["probability"]))


def _scores(ready: Ready) -> dict[str, Any]:
    """The validator beside the sequence probability of the answer, as confidences of the first answers."""
    first = _judged_first(ready.refined)
    confidences = {"validator": _floats(first["probability"]), "sequence probability": _floats(first["logprob"])}
    wrong = 1.0 - _flags(first["correct"])
    config = ready.config
    found = evaluate(
        confidences,
        wrong,
        probabilities={"validator"},
        bootstrap=config.bootstrap,
        ece_bins=config.ece_bins,
        seed=config.seed,
    )
    return found.as_dict()


def _within(refined: Refined) -> Within:
    """Over all attempts that were judged. Attempts end with an accepted one, so these are questions of which the validator
    turned an answer down; of those whose first answer it accepted nothing is known."""
    rows = refined.attempts.filter(pc.is_valid(refined.attempts["probability"]))
    groups = np.unique(rows["example_id"].to_pylist(), return_inverse=True)[1]
    return within_questions(_floats(rows["probability"]), _flags(rows["correct"]), groups)


def _notes(rows: Sequence[System], judged: Verdicts | None, within: Within) -> list[str]:
    notes = []
    named = {row.name: row for row in rows}
    if judged is not None:
        if judged.auroc is None:
            notes.append("All first answers are right, or all are wrong: nothing can be said about the validator.")
        elif abs(judged.auroc - 0.5) < 0.05:
            notes.append(f"The validator is at chance (AUROC {judged.auroc:.2f}): what it accepts is luck.")
        elif judged.auroc >= 0.6 and within.auroc is not None and within.auroc < 0.6 and within.questions >= _FEW:
            notes.append(
                f"The validator's AUROC on first answers is {judged.auroc:.2f}, but within the {within.questions} questions of "
                f"which it turned down an answer and that got right and wrong ones it is {within.auroc:.2f}: there it cannot "
                "find the right answer, only abstain."
            )
        if judged.accuracy <= judged.majority:
            notes.append(
                f"The validator is right about {judged.accuracy:.1%} of the first answers; always saying the commoner "
                f"verdict would be right about {judged.majority:.1%}."
            )
        if not judged.tn and not judged.fn:
            notes.append("The validator accepted every first answer: nothing was refined.")
    refined = named[REFINED]
    voting = [row for name, row in named.items() if name.startswith("majority")]
    best = max((row for row in voting if row.coverage == 1), key=_accuracy, default=None)
    if best is not None and best.accuracy >= refined.accuracy:
        notes.append(f"A {best.name} independent answers is right as often as refining, or more often.")
    sure = max((row for row in named.values() if "surest" in row.name), key=_accuracy, default=None)
    if sure is not None and refined.coverage and sure.accuracy >= refined.accuracy:
        notes.append(f"As many answers as refining gives are right as often, or more often: {sure.name}.")
    return notes


def _accuracy(row: System) -> float:
    return row.accuracy


def _examples(refined: Refined) -> list[dict[str, Any]]:
    """Questions with more than one attempt, the longest first."""
    attempts = dict(zip(refined.questions["example_id"].to_pylist(), _attempts(refined), strict=True))
    rows = [row for row in refined.questions.to_pylist() if row["attempts"] > 1]
    rows.sort(key=lambda row: (not row["correct"], -row["attempts"], row["example_id"]))
    return [{**row, "trace": attempts[row["example_id"]]} for row in rows[:6]]


def _inputs(ready: Ready) -> dict[str, str]:
    folders = [ready.refined.folder, *(control.folder for control in ready.controls.values())]
    return {str(folder): ready.work["runs"] for folder in folders}


def _flags(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    return np.array([bool(value) for value in column.to_pylist()], bool)


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in column.to_pylist()], np.float64)

"""`report.html` of a `train-scorer` run: how well the score tells right from wrong answers, beside simpler ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from stitch_ray.report import reliability, reliability_figures, risk_curves, scorer_figures
from stitch_ray.report.curves import Curve
from stitch_ray.report.html import number, percent, render
from stitch_ray.report.reliability import (
    EvaluationFacts,
    ExampleFacts,
    IntervalFacts,
    RunFacts,
    SplitFacts,
    figure_of,
    in_words,
    interval,
    readable,
    row_of,
)
from stitch_ray.report.reliability_figures import Dot
from stitch_ray.runs import write_text

Floats = NDArray[np.float64]

_MOST_EXAMPLES = 8


class HeldOutFacts(TypedDict, total=False):
    """The n labelled answers of the test split, all arrays in one order."""

    residual: Floats
    """(n,) in [0, 1], 0 = right. Needed."""
    confidences: Mapping[str, Floats]
    """Name as in the evaluation -> (n,), higher = surer, NaN = unscored: curves of risk against coverage."""
    probability: Floats
    """(n,) what the finished scorer says, in [0, 1], NaN = unscored."""
    before: Floats
    """(n,) the same before the isotonic step, in [0, 1]."""
    groups: NDArray[Any]
    """(n,) question of every answer: questions, not answers, are redrawn for the band."""


class WeightFacts(TypedDict):
    """What one feature of the stack weighs: `coef` on the feature less `mean`, divided by `scale`."""

    name: str
    coef: float
    mean: float
    scale: float


class EncoderFacts(TypedDict, total=False):
    """How the encoder was trained."""

    records: Sequence[Mapping[str, Any]]
    """Of `metrics.jsonl`."""
    loss: str
    """bce or mse."""
    path: str
    parameters: int
    trained: str
    """all or head."""
    step: int
    """Whose weights were kept."""
    best_loss: float | None
    steps: int
    total_steps: int
    """Planned; more than `steps` where training stopped early."""
    seconds: float
    notes: Sequence[str]


class PublishedFacts(TypedDict, total=False):
    """Figures of others on the same answers, for the same table."""

    name: str
    accuracy: float
    balanced_accuracy: float
    note: str


class FurtherTestFacts(TypedDict, total=False):
    """Another test set. `majority`: accuracy of always giving the more frequent verdict."""

    name: str
    answers: int
    questions: int
    correct: float | None
    majority: float
    evaluation: EvaluationFacts
    test: HeldOutFacts
    published: Sequence[PublishedFacts]
    notes: Sequence[str]


class DifferenceFacts(TypedDict):
    """`first` less `second` in one metric, on the same resamples."""

    first: str
    second: str
    metric: str
    difference: IntervalFacts


class ScorerFacts(RunFacts, total=False):
    """Facts of a `train-scorer` run. All may be missing: what is missing leaves its section out."""

    scorer: str
    """Name of the finished scorer among the rows of the evaluation; default: "scorer", else the first row."""
    splits: Mapping[str, SplitFacts]
    """train, stack, isotonic, calibrate, test."""
    evaluation: EvaluationFacts
    """On the test split."""
    majority: float
    """Accuracy on the test split of always giving the more frequent verdict."""
    differences: Sequence[DifferenceFacts]
    test: HeldOutFacts
    encoder: EncoderFacts
    weights: Sequence[WeightFacts]
    intercept: float
    tests: Sequence[FurtherTestFacts]
    examples: Sequence[ExampleFacts]
    """Of the test split, all or a choice: `telling` chooses."""
    fingerprint: str
    answers_from: str


def telling(examples: Sequence[ExampleFacts], most: int = _MOST_EXAMPLES) -> list[ExampleFacts]:
    """The answers to show: up to `most` wrong ones, the most confident first, then as many right ones, the least
    confident first. Those without a label or a confidence are not among them."""
    known = [one for one in examples if one.get("correct") is not None and one.get("confidence") is not None]
    order = sorted(known, key=_confidence, reverse=True)
    wrong, right = ([one for one in order if bool(one["correct"]) is right] for right in (False, True))
    return [*wrong[:most], *right[::-1][:most]]


def write_report(path: Path, facts: ScorerFacts) -> None:
    """Write the report of a run to the file `path`."""
    evaluation = facts.get("evaluation")
    first = _first(evaluation, facts.get("scorer"))
    page = render(
        "scorer.html.jinja",
        **reliability.frame(path, facts, _notes(facts, first)),
        facts=facts,
        headline=_headline(facts, first),
        tiles=_tiles(facts, first),
        first=first,
        tables=reliability.score_tables(evaluation, first),
        differences=[
            (
                readable(one["first"]),
                readable(one["second"]),
                reliability.metric_name(one["metric"]),
                in_words(*interval(one["difference"])),
            )
            for one in facts.get("differences", ())
        ],
        verdicts=_verdicts(evaluation, facts.get("majority"), ()),
        figures=_figures(evaluation, facts.get("test"), first),
        splits=reliability.split_rows(facts.get("splits")),
        encoder=facts.get("encoder"),
        learning=_learning(facts.get("encoder")),
        weights=_weights(facts.get("weights", ())),
        further=[_further(test, first) for test in facts.get("tests", ())],
        examples=_examples(facts.get("examples", ())),
    )
    write_text(path, page)


def _first(evaluation: EvaluationFacts | None, named: str | None) -> str | None:
    names = [row["name"] for row in (evaluation or {}).get("rows", ())]
    return named or ("scorer" if "scorer" in names or not names else names[0])


def _headline(facts: ScorerFacts, first: str | None) -> str:
    row = row_of(facts.get("evaluation"), first)
    value, low, high = figure_of(row, "auroc")
    if row is None:
        return "A reliability scorer"
    if not np.isfinite(value):
        return f"AUROC could not be measured on {_many(row['scored'], 'test answer')}"
    return f"AUROC {in_words(value, low, high)} on {_many(row['scored'], 'test answer')}"


def _tiles(facts: ScorerFacts, first: str | None) -> list[tuple[str, str]]:
    row, test = row_of(facts.get("evaluation"), first), facts.get("splits", {}).get("test", {})
    total = sum(counts.get("answers", 0) for counts in facts.get("splits", {}).values())
    tiles = [
        ("labelled answers", number(total)) if total else None,
        ("test questions", number(test["questions"])) if "questions" in test else None,
        ("of the test answers are right", percent(test["correct"])) if "correct" in test else None,
    ]
    if row is not None:
        tiles += [
            (f"{what}, test", number(figure_of(row, key)[0], 3))
            for key, what in (("auroc", "AUROC"), ("prr_50", "PRR at 50%"), ("brier", "Brier score"), ("ece", "ECE"))
            if key in row["metrics"]
        ]
        tiles.append(("unscored test answers", number(row["unscored"])))
    return [tile for tile in tiles if tile is not None]


def _notes(facts: ScorerFacts, first: str | None) -> list[str]:
    evaluation = facts.get("evaluation")
    notes = [*facts.get("encoder", {}).get("notes", ()), *reliability.evaluation_notes(evaluation)]
    value, low, high = figure_of(row_of(evaluation, first), "auroc")
    if low <= 0.5 <= high:
        notes.append(
            f"The interval of the AUROC, {number(low, 3)} to {number(high, 3)}, holds 0.5: on these answers the scorer "
            "cannot be told from a coin."
        )
    better = [
        f"{readable(name)} ({number(other, 3)})"
        for name, other, _, _ in reliability.forest_rows(evaluation)
        if name not in (first, "stack") and other >= value  # the stack is the scorer before its isotonic step
    ]
    if better:
        notes.append(f"At least as high an AUROC as the scorer ({number(value, 3)}): {', '.join(better[:6])}.")
    return notes


def _figures(
    evaluation: EvaluationFacts | None, test: HeldOutFacts | None, first: str | None
) -> list[tuple[str, str, str]]:
    """(title, caption, figure) of whatever the facts allow."""
    found = []
    rows = reliability.forest_rows(evaluation)
    if rows:
        named = [(readable(name), value, low, high) for name, value, low, high in rows]
        title = "AUROC of every score"
        caption = "With 95% intervals. Dashed: chance. One interval does not compare two scores."
        figure = reliability_figures.forest(named, "AUROC", title, first=readable(first or ""))
        found.append((title, caption, figure))
    if test is not None and len(test["residual"]):
        found += _test_figures(rows, test, first)
    return found


def _test_figures(rows: Sequence[Dot], test: HeldOutFacts, first: str | None) -> list[tuple[str, str, str]]:
    found, residual = [], np.asarray(test["residual"], np.float64)
    confidences = test.get("confidences", {})
    aurocs = {name: value for name, value, _, _ in rows}
    names = sorted(confidences, key=lambda name: (name != first, -aurocs.get(name, 0.0)))
    names = [name for name in names if name != "random"][: reliability_figures.MOST_CURVES]
    if names:
        title = "Risk against coverage"
        band = risk_curves.risk_band(confidences[names[0]], residual, test.get("groups"))
        figure = reliability_figures.risk_coverage(
            {readable(name): risk_curves.risk_curve(confidences[name], residual) for name in names},
            title,
            oracle=risk_curves.oracle_curve(residual),
            chance=float(residual.mean()),
            band=band,
        )
        caption = "Answer the surest first: how many of the answers given are wrong. "
        caption += f"Shaded: 95% band of {names[0]}." if band is not None else ""
        found.append((title, caption, figure))
    probability = test.get("probability")
    if probability is not None and np.isfinite(probability).any():
        probability = np.asarray(probability, np.float64)
        found += probability_figures(probability, 1 - residual, test.get("before"))
    return found


def probability_figures(
    probability: Floats, correct: Floats, before: Floats | None = None, thresholds: Sequence[tuple[float, str]] = ()
) -> list[tuple[str, str, str]]:
    """(title, caption, figure): histograms of right and wrong, before them the reliability diagram if all confidences
    lie in [0, 1]. correct: (n,) in [0, 1]."""
    title = "Stated and observed"
    caption = "On the diagonal a stated probability is what comes true."
    caption += " Bars: exact 95% intervals." if np.isin(correct, (0, 1)).all() else ""
    if before is not None:
        caption += " Hollow: before the isotonic step."
    separate = "Confidence of right and wrong answers"
    histogram = reliability_figures.score_histograms(probability, correct >= 0.5, separate, thresholds=thresholds)
    found = [(separate, "The further apart the two, the more can be answered at little risk.", histogram)]
    scored = probability[np.isfinite(probability)]
    if ((scored >= 0) & (scored <= 1)).all():
        diagram = reliability_figures.reliability_diagram(probability, correct, title, before=before)
        found = [(title, caption, diagram), *found]
    return found


def _verdicts(
    evaluation: EvaluationFacts | None, majority: float | None, published: Sequence[PublishedFacts]
) -> list[tuple[str, str, str, str]]:
    """(name, accuracy, balanced accuracy, note) of verdicts "right" or "wrong", where there is more than one to compare."""
    rows = [] if majority is None else [("always the more frequent", number(majority, 3), number(0.5, 3), "")]
    rows += [
        (
            one["name"],
            number(one.get("accuracy"), 3),
            number(one.get("balanced_accuracy"), 3),
            one.get("note", "as published"),
        )
        for one in published
    ]
    own = []
    for row in (evaluation or {}).get("rows", ()):
        accuracy, balanced = figure_of(row, "accuracy"), figure_of(row, "balanced_accuracy")
        if np.isfinite(accuracy[0]):
            own.append((readable(row["name"]), in_words(*accuracy), in_words(*balanced), ""))
    return [*rows, *own] if rows and own else []


def _learning(encoder: EncoderFacts | None) -> str | None:
    if encoder is None or not encoder.get("records"):
        return None
    unit = {"bce": "cross-entropy (nats)", "mse": "squared error"}.get(encoder.get("loss", ""), "loss")
    return scorer_figures.learning_curve(
        _losses(encoder["records"], "step"),
        _losses(encoder["records"], "validation"),
        encoder.get("step"),
        unit,
        "Loss of the encoder",
    )


def _losses(records: Sequence[Mapping[str, Any]], kind: str) -> Curve:
    of_kind = [record for record in records if record["kind"] == kind]
    values = np.array([record["loss"] for record in of_kind], np.float64)
    return np.array([record["step"] for record in of_kind], np.float64), np.where(np.isfinite(values), values, np.nan)


def _weights(weights: Sequence[WeightFacts]) -> str | None:
    if not weights:
        return None
    names, values = [readable(one["name"]) for one in weights], [one["coef"] for one in weights]
    return scorer_figures.coefficients(names, values, "Weights of the stack")


def _further(test: FurtherTestFacts, first: str | None) -> dict[str, Any]:
    evaluation = test.get("evaluation")
    return {
        "name": test["name"],
        "answers": test.get("answers"),
        "questions": test.get("questions"),
        "correct": test.get("correct"),
        "tables": reliability.score_tables(evaluation, first),
        "verdicts": _verdicts(evaluation, test.get("majority"), test.get("published", ())),
        "figures": _figures(evaluation, test.get("test"), first),
        "notes": [*reliability.evaluation_notes(evaluation), *test.get("notes", ())],
    }


def _examples(examples: Sequence[ExampleFacts]) -> list[tuple[str, list[dict[str, Any]]]]:
    shown = telling(examples)
    wrong, right = ([one for one in shown if bool(one["correct"]) is right] for right in (False, True))
    groups = [("Wrong, and sure of it", wrong), ("Right, and unsure", right)]
    return [(title, [reliability.example(one) for one in group]) for title, group in groups if group]


def _confidence(one: ExampleFacts) -> float:
    value = one.get("confidence")
    return math.nan if value is None else value


def _many(count: int, what: str) -> str:
    return f"{number(count)} {what}{'' if count == 1 else 's'}"

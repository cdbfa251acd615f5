"""`report.html` of a `predict` run: what was answered, what each part of the ensemble is worth, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from stitch_ray.report import answer_figures, reliability, reliability_figures
from stitch_ray.report.html import goal, number, percent, render
from stitch_ray.report.reliability import RunFacts, SplitFacts, in_words
from stitch_ray.runs import write_text

Floats = NDArray[np.float64]

_REASONS = {
    "confident": "the draft was sure enough",
    "refined": "the refined answer was sure enough",
    "unsure": "not sure enough",
    "scorer_unavailable": "could not be scored",
    "route_failed": "refining failed",
    "deadline": "out of time",
    "budget": "out of calls or tokens",
}


class TurnFacts(TypedDict):
    """One turn of a dialogue. `changed`: its answer is another than the one before."""

    speaker: str
    answer: str
    comment: str
    changed: bool


class DialogueFacts(TypedDict, total=False):
    """One refined question. `refined` None: refining failed."""

    example_id: str
    question: str
    context: str | None
    task: str | None
    split: str
    references: Sequence[str]
    draft: str | None
    draft_confidence: float | None
    draft_correct: bool | None
    refined: str | None
    final_confidence: float | None
    final_correct: bool | None
    answer: str | None
    decision: str | None
    reason: str | None
    turns: Sequence[TurnFacts]


class PredictionsFacts(RunFacts, total=False):
    """Facts of a `predict` run. All may be missing: what is missing leaves its section out."""

    who: str
    """Who answered, in a few words."""
    questions: int
    decisions: Mapping[str, int]
    """answer, abstain -> questions; empty where no policy decided."""
    reasons: Mapping[str, int]
    splits: Mapping[str, SplitFacts]
    metric: str
    label_threshold: float
    tokens_per_second: float | None
    confidences: Mapping[str, Floats]
    """draft, refined -> (n,), NaN = unscored."""
    evaluation: Mapping[str, Any]
    """`Evaluation.as_dict()`."""
    curves: Mapping[str, tuple[Floats, Floats]]
    """Name -> (coverage, risk), strictest threshold first."""
    point: tuple[float, float]
    """(coverage, risk) of the answers that were given."""
    examples: Sequence[DialogueFacts]


def write_report(path: Path, facts: PredictionsFacts) -> None:
    """Write the report of a run to the file `path`."""
    evaluation = facts.get("evaluation", {})
    page = render(
        "predictions.html.jinja",
        **reliability.frame(path, facts, _notes(evaluation)),
        facts=facts,
        headline=_headline(facts),
        tiles=_tiles(facts),
        measured=_measured(evaluation),
        systems=_systems(evaluation),
        promises=[_promise(one) for one in evaluation.get("promises", ())],
        refinement=evaluation.get("refinement"),
        guess=evaluation.get("random_guess"),
        refined_sentences=_refined(evaluation),
        why=[(_REASONS.get(name, name), count) for name, count in facts.get("reasons", {}).items()],
        figures=_figures(facts),
        rankings=evaluation.get("ranking", {}),
        splits=reliability.split_rows(facts.get("splits")),
        examples=[_example(one) for one in facts.get("examples", ())],
    )
    write_text(path, page)


def _headline(facts: PredictionsFacts) -> str:
    questions = facts.get("questions")
    if questions is None:
        return "Predictions"
    given = facts.get("decisions", {}).get("answer")
    if given is None:
        return f"{number(questions)} questions through both stages" if "decisions" in facts else "Predictions"
    text = f"{number(given)} of {number(questions)} questions answered"
    kept = [one for one in facts.get("evaluation", {}).get("promises", ()) if one["risk"] is not None]
    return f"{text}: {percent(kept[0]['risk'])} of the answers wrong" if kept else text


def _tiles(facts: PredictionsFacts) -> list[tuple[str, str]]:
    decisions, manifest = facts.get("decisions", {}), facts.get("manifest", {})
    cost = manifest.get("cost", {})
    tiles: list[tuple[str, Any, int]] = [
        ("questions", facts.get("questions"), 0),
        ("answered", decisions.get("answer"), 0),
        ("abstentions", decisions.get("abstain"), 0),
        ("calls a question", cost.get("calls"), 2),
        ("tokens a question", cost.get("tokens"), 0),
        ("seconds a question", cost.get("seconds"), 2),
        ("tokens a second, all together", facts.get("tokens_per_second"), 0),
    ]
    return [(what, number(value, decimals)) for what, value, decimals in tiles if value is not None]


def _notes(evaluation: Mapping[str, Any]) -> list[str]:
    notes = []
    for kept in evaluation.get("promises", ()):
        if kept["held"] is False:
            within = kept["low"] is not None and kept["low"] <= kept["target_risk"]
            chance = " The interval holds the promised risk: so few answers can show that by chance." if within else ""
            notes.append(
                f"{percent(kept['risk'])} of the answers given are wrong, more than the promised "
                f"{goal(kept['target_risk'])}.{chance}"
            )
    refined, guess = evaluation.get("refinement"), evaluation.get("random_guess")
    if refined and refined["net"] < 0:
        notes.append(f"Refining broke more answers ({refined['broken']}) than it corrected ({refined['corrected']}).")
    if refined and guess and _less(refined["fix_rate"], guess["fix_rate"]):
        notes.append(
            f"Of the wrong drafts, refining corrected {percent(refined['fix_rate'])}; another option taken at random "
            f"would have corrected {percent(guess['fix_rate'])}."
        )
    return notes


def _less(one: float | None, other: float | None) -> bool:
    return one is not None and other is not None and one < other  # NaN compares false


def _measured(evaluation: Mapping[str, Any]) -> str | None:
    if not evaluation:
        return None
    count = number(evaluation["num"])
    if evaluation["split"] is not None:
        return f"On the {count} labelled questions of the {evaluation['split']} split, which nothing was chosen on."
    return f"On all {count} labelled questions."


def _systems(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {**system, **{name: _cell(system[name]) for name in ("accuracy", "exact_match", "token_f1")}}
        for system in evaluation.get("systems", ())
    ]


def _cell(interval: Mapping[str, float | None]) -> tuple[str, str]:
    low, high = interval["low"], interval["high"]
    known = low is not None and high is not None
    return percent(interval["value"]), f"{percent(low)} to {percent(high)}" if known else ""


def _promise(kept: Mapping[str, Any]) -> dict[str, Any]:
    value, low, high = reliability.interval({**kept, "value": kept["risk"]})
    if not kept["answered"]:
        verdict = "nothing answered"
    elif kept["held"]:
        verdict = "held"
    else:
        verdict = "exceeded, within chance" if low <= kept["target_risk"] else "exceeded"
    return {**kept, "shown_risk": in_words(value, low, high, share=True), "verdict": verdict}


def _refined(evaluation: Mapping[str, Any]) -> list[str]:
    """What refining did, sentence by sentence, under names that say what each number measures."""
    refined, guess = evaluation.get("refinement"), evaluation.get("random_guess")
    found = []
    if refined:
        found += [
            f"{number(refined['num'])} questions were refined. {percent(refined['draft_accuracy'])} of their drafts were "
            f"right, and {percent(refined['refined_accuracy'])} of their refined answers.",
            f"{number(refined['corrected'])} wrong drafts were corrected ({percent(refined['fix_rate'])} of the wrong "
            f"ones), {number(refined['broken'])} right ones broken ({percent(refined['break_rate'])} of the right ones): "
            f"net {refined['net']:+,}.",
            f"{percent(refined['unchanged_rate'])} of the answers stayed as they were, which says nothing about being "
            "right.",
            f"Oracle: if somebody who knows the right answer chose between the two, {percent(refined['oracle_union'])} "
            "would be right. Nothing that answers questions can reach it.",
        ]
    if guess:
        found.append(
            f"Chance: an option at random would be right for {percent(guess['reguess_accuracy'])} of the "
            f"{number(guess['num'])} questions whose options are known ({number(guess['num_options'], 1)} on average), "
            f"and another option than the draft's would correct {percent(guess['fix_rate'])} of the wrong ones."
        )
    return found


def _figures(facts: PredictionsFacts) -> list[tuple[str, str, str]]:
    """(title, caption, figure)."""
    found = []
    evaluation = facts.get("evaluation", {})
    rows = [
        (one["name"], *reliability.interval(one["accuracy"]))
        for one in evaluation.get("systems", ())
        if one["accuracy"]["value"] is not None
    ]
    if rows:
        title = "Right among the answers given"
        figure = reliability_figures.forest(rows, "accuracy", title, reference=None, first="cascade")
        found.append((title, "The cascade abstains on some questions; the others answer all.", figure))
    curves = {name: curve for name, curve in facts.get("curves", {}).items() if len(curve[0])}
    if curves:
        title = "Risk and coverage"
        point = facts.get("point")
        targets = [one["target_risk"] for one in evaluation.get("promises", ())]
        figure = reliability_figures.risk_coverage(
            curves,
            title,
            targets=targets,
            marks=[] if point is None else [(point[0], f"given: {percent(point[1])} wrong")],
        )
        caption = "What each threshold would have done in hindsight, which is no promise. Upright: what was decided."
        found.append((title, caption, figure))
    confidences = {name: values for name, values in facts.get("confidences", {}).items() if np.isfinite(values).any()}
    if confidences:
        title = "Confidences"
        figure = answer_figures.histogram_rows(confidences, "confidence", title, unit=True)
        found.append((title, "Of all questions, before and after refining.", figure))
    return found


def _example(facts: DialogueFacts) -> dict[str, Any]:
    became = (facts.get("draft_correct"), facts.get("final_correct"))
    names = {(False, True): "corrected", (True, False): "broken", (True, True): "stayed right"}
    verdict = names.get(became, "stayed wrong" if became == (False, False) else "")  # type: ignore[arg-type]
    empty: dict[str, Any] = dict.fromkeys(
        ("task", "split", "draft_confidence", "final_confidence", "decision", "reason")
    )
    return {
        **empty,
        **facts,
        "verdict": "refining failed" if facts.get("refined") is None else verdict,
        "good": became == (False, True),
        "question": reliability.excerpt(facts["question"]),
        "context": reliability.excerpt(context) if (context := facts.get("context")) else None,
        "references": [reliability.excerpt(text)["short"] for text in list(facts.get("references", ()))[:5]],
        "draft": reliability.excerpt(facts.get("draft") or ""),
        "refined": None if (text := facts.get("refined")) is None else reliability.excerpt(text),
        "turns": [
            {**turn, "answer": reliability.excerpt(turn["answer"]), "comment": reliability.excerpt(turn["comment"])}
            for turn in facts.get("turns", ())
        ],
    }

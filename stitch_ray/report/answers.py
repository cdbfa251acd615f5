"""`report.html` of a `sample-answers` run: what was answered, how much of it is right, and what the signals tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from stitch_ray.reliability.signals.registry import SIGN
from stitch_ray.report import answer_figures, reliability, reliability_figures
from stitch_ray.report.html import number, percent, render
from stitch_ray.report.reliability import IntervalFacts, RunFacts, SplitFacts, readable
from stitch_ray.runs import write_text

Floats = NDArray[np.float64]

_MOST_QUESTIONS = 12
_MOST_GIVEN = 24
_METRICS = {
    "exact_match": "exact match",
    "token_f1": "token F1",
    "rouge_l": "ROUGE-L",
    "bert_score": "BERTScore",
    "judge": "a judge",
    "none": "none",
}


class KindFacts(TypedDict, total=False):
    """Answers of one kind (greedy, sample, distractor)."""

    answers: int
    labelled: int
    correct: float | None
    """Share of the labelled ones, 0 to 1."""
    empty: int
    cut: int
    """Stopped by max_tokens."""
    labels: Floats
    """(answers,) in [0, 1], NaN where there is none."""
    tokens: NDArray[np.int64]
    """(answers,) or fewer: lengths, where known."""


class DistractorFacts(TypedDict, total=False):
    """Questions for which wrong answers were asked for, and what became of the replies. A missing count is 0."""

    asked: int
    repaired: int
    retried: int
    failed: int
    answers: int


class GivenFacts(TypedDict, total=False):
    """One answer to an example question. Needed: kind, answer."""

    kind: str
    answer: str
    label: float | None
    correct: bool | None
    cluster: int | None
    """Answers of one number mean the same."""
    confidence: float | None


class QuestionFacts(TypedDict, total=False):
    """One question with all its answers. Needed: question, answers."""

    question: str
    context: str | None
    references: Sequence[str]
    split: str
    task: str | None
    signals: Mapping[str, float | None]
    answers: Sequence[GivenFacts]


class AnswersFacts(RunFacts, total=False):
    """Facts of a `sample-answers` run. All may be missing: what is missing leaves its section out."""

    model: str
    """Who answered, in a few words: path or endpoint, engine, dtype."""
    questions: int
    answers: int
    tokens: int
    tokens_per_second: float | None
    failures: int
    """Questions that were given up after all retries."""
    metric: str
    """labels.metric"""
    label_threshold: float
    """Label from which an answer counts as correct."""
    kinds: Mapping[str, KindFacts]
    splits: Mapping[str, SplitFacts]
    """train, stack, isotonic, calibrate, test."""
    trained_on: Mapping[str, int]
    """Split -> questions of it that the model was trained on."""
    signals: Mapping[str, Floats]
    """Name -> (n,) of the n labelled greedy answers, NaN where unscored."""
    correct: NDArray[np.bool_]
    """(n,), the labels of these answers."""
    aurocs: Mapping[str, IntervalFacts]
    """Name -> of the signal, in the direction it should point, on these answers."""
    distractors: DistractorFacts
    examples: Sequence[QuestionFacts]


def write_report(path: Path, facts: AnswersFacts) -> None:
    """Write the report of a run to the file `path`."""
    page = render(
        "answers.html.jinja",
        **reliability.frame(path, facts, _notes(facts)),
        facts=facts,
        headline=_headline(facts),
        metric=_METRICS.get(facts.get("metric", ""), facts.get("metric")),
        tiles=_tiles(facts),
        kinds=_kinds(facts.get("kinds", {})),
        figures=_figures(facts),
        signals=_signals(facts),
        aurocs=_aurocs(facts.get("aurocs", {})),
        splits=reliability.split_rows(facts.get("splits")),
        trained_on=dict(facts.get("trained_on", {})),
        distractors=facts.get("distractors"),
        examples=[_question(one) for one in facts.get("examples", ())[:_MOST_QUESTIONS]],
    )
    write_text(path, page)


def _headline(facts: AnswersFacts) -> str:
    if "answers" not in facts:
        return "Sampled answers"
    text = f"{number(facts['answers'])} answer{'' if facts['answers'] == 1 else 's'}"
    if "questions" in facts:
        text += f" to {number(facts['questions'])} question{'' if facts['questions'] == 1 else 's'}"
    share = facts.get("kinds", {}).get("greedy", {}).get("correct")
    return text if share is None else f"{text}: {percent(share)} of the greedy ones are right"


def _tiles(facts: AnswersFacts) -> list[tuple[str, str]]:
    rows = facts.get("manifest", {})
    tiles = [
        ("questions", facts.get("questions")),
        ("answers", facts.get("answers")),
        ("tokens generated", facts.get("tokens")),
        ("tokens a second", facts.get("tokens_per_second")),
        ("questions given up", facts.get("failures")),
        ("rows quarantined", rows.get("rows_quarantined")),
    ]
    found = [(what, number(value)) for what, value in tiles if value is not None]
    if "greedy" in facts.get("kinds", {}):
        found.append(("of the greedy answers are right", percent(facts["kinds"]["greedy"].get("correct"))))
    return found


def _notes(facts: AnswersFacts) -> list[str]:
    notes = []
    share = facts.get("kinds", {}).get("greedy", {}).get("correct")
    if share is not None and not 0.1 <= share <= 0.9:
        notes.append(
            f"{percent(share)} of the greedy answers are right: with so few {'wrong' if share > 0.5 else 'right'} ones a "
            "scorer has little to learn from and a threshold little to be tested on. 40% to 80% is a good range."
        )
    for name, kind in facts.get("kinds", {}).items():
        cut, total = kind.get("cut", 0), kind.get("answers", 0)
        if total and cut > 0.05 * total:
            notes.append(f"{percent(cut / total)} of the {name} answers were cut at samples.max_tokens.")
    failures, questions = facts.get("failures") or 0, facts.get("questions") or 0
    if failures and failures > 0.01 * (questions + failures):
        notes.append(
            f"{percent(failures / (questions + failures))} of the questions were given up: see quarantine.jsonl."
        )
    for name, values in facts.get("signals", {}).items():
        missing = float(np.isnan(np.asarray(values, np.float64)).mean()) if len(values) else 0.0
        if missing > 0.05:
            notes.append(f"{readable(name)} could not be computed for {percent(missing)} of the answers.")
    for name, cell in facts.get("aurocs", {}).items():
        if cell["high"] is not None and cell["high"] < 0.5:
            notes.append(
                f"{readable(name)} points the wrong way here: AUROC {number(cell['value'], 3)}, its interval below 0.5."
            )
    return notes


def _kinds(kinds: Mapping[str, KindFacts]) -> list[dict[str, Any]]:
    rows = []
    for name, kind in kinds.items():
        labels, tokens = kind.get("labels"), kind.get("tokens")
        known = None if labels is None else np.asarray(labels, np.float64)[np.isfinite(np.asarray(labels, np.float64))]
        rows.append(
            {
                "name": name,
                **{key: kind.get(key) for key in ("answers", "labelled", "correct", "empty", "cut")},
                "label": float(known.mean()) if known is not None and len(known) else None,
                "tokens": float(np.mean(tokens)) if tokens is not None and len(tokens) else None,
            }
        )
    return rows


def _figures(facts: AnswersFacts) -> list[tuple[str, str, str]]:
    """(title, caption, figure): labels and lengths by kind."""
    found = []
    arrays = {name: np.asarray(kind["labels"], np.float64) for name, kind in _with(facts, "labels")}
    labels = {name: values for name, values in arrays.items() if np.isfinite(values).any()}
    if labels:
        title, threshold = "Labels", facts.get("label_threshold")
        caption = "How right each answer is." + ("" if threshold is None else " Right of the line it counts as right.")
        # The line stands just below the label itself, which counts.
        figure = answer_figures.histogram_rows(labels, "label", title, unit=True, line=threshold)
        found.append((title, caption, figure))
    lengths = {name: np.asarray(kind["tokens"], np.float64) for name, kind in _with(facts, "tokens")}
    if lengths:
        title = "Lengths"
        figure = answer_figures.histogram_rows(lengths, "tokens (log scale)", title, log=True)
        found.append((title, "Of the answers, by kind. Empty ones stand at 1.", figure))
    return found


def _with(facts: AnswersFacts, key: str) -> list[tuple[str, Any]]:
    return [
        (name, kind)
        for name, kind in facts.get("kinds", {}).items()
        if kind.get(key) is not None and len(kind[key])  # type: ignore[literal-required]
    ]


def _signals(facts: AnswersFacts) -> str | None:
    signals, correct = facts.get("signals"), facts.get("correct")
    if not signals or correct is None or not len(correct):
        return None
    arrays = {readable(name): np.asarray(values, np.float64) for name, values in signals.items()}
    signs = {readable(name): int(sign) for name, sign in SIGN.items()}
    return answer_figures.signal_panels(arrays, np.asarray(correct, np.bool_), signs, "Signals")


def _aurocs(aurocs: Mapping[str, IntervalFacts]) -> str | None:
    rows = [(readable(name), *reliability.interval(cell)) for name, cell in aurocs.items()]
    if not any(np.isfinite(row[1]) for row in rows):
        return None
    return reliability_figures.forest(rows, "AUROC", "AUROC of every signal")


def _question(facts: QuestionFacts) -> dict[str, Any]:
    return {
        "split": facts.get("split"),
        "task": facts.get("task"),
        "question": reliability.excerpt(facts["question"]),
        "context": reliability.excerpt(context) if (context := facts.get("context")) else None,
        "references": [reliability.excerpt(text)["short"] for text in facts.get("references", ())[:5]],
        "signals": {readable(name): value for name, value in facts.get("signals", {}).items()},
        "more": max(0, len(facts["answers"]) - _MOST_GIVEN),
        "answers": [
            {
                **dict.fromkeys(("label", "correct", "cluster", "confidence")),
                **one,
                "text": reliability.excerpt(one["answer"]),
            }
            for one in facts["answers"][:_MOST_GIVEN]
        ],
    }

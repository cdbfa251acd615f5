"""What is told of a run: counts for its manifest, figures and examples for its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from stitch_ray.config.reliability import ANSWER_SPLITS
from stitch_ray.data.quarantine import Quarantined
from stitch_ray.data.trained_on import read_trained_on
from stitch_ray.engines.fingerprint import model_folder
from stitch_ray.records import content_hash
from stitch_ray.reliability.answers.preflight import Ready
from stitch_ray.reliability.answers.results import Outcome, splits_of
from stitch_ray.reliability.answers.sampling import GREEDY, KINDS
from stitch_ray.reliability.evaluation import evaluate
from stitch_ray.reliability.signals.registry import SIGN
from stitch_ray.report.answers import AnswersFacts, GivenFacts, KindFacts, QuestionFacts
from stitch_ray.report.reliability import IntervalFacts

_EXAMPLES = 6
_RESAMPLES = 200
_MEASURED = ("stack", "isotonic", "calibrate", "test")
"""Splits that a model must not have been trained on: what is measured there would be too good."""


def manifest_facts(ready: Ready, outcome: Outcome) -> dict[str, Any]:
    """What `manifest.json` says beside the counts of rows: kinds and splits of answers, and where they come from."""
    table = outcome.answers
    kinds, splits = table["kind"].to_pylist(), table["split"].to_pylist()
    labels, correct = _floats(table["label"]), table["correct"].to_pylist()
    of_split = Counter(splits_of(outcome.questions["group_id"].to_pylist(), ready))
    return {
        "questions": outcome.questions.num_rows,
        "kinds": {kind: _counts(np.array(kinds) == kind, labels, correct) for kind in KINDS if kind in kinds},
        "splits": {
            name: {"questions": of_split[name], **_counts(np.array(splits) == name, labels, correct)}
            for name in ANSWER_SPLITS
        },
        "failures": len(outcome.failed),
        "tokens": pc.sum(table["tokens"]).as_py() or 0,
        "counted": {stage: dict(counts) for stage, counts in outcome.counted.items() if counts},
        "trained_on": trained_on(ready, outcome),
        "split": ready.config.split.model_dump(mode="json"),
        "answers_from": ready.answers_from,
        "answering": ready.answering,
        "seed": ready.config.seed,
    }


def trained_on(ready: Ready, outcome: Outcome) -> dict[str, int]:
    """Split -> how many of its questions the model was trained on, as far as its folder says; without zeros."""
    seen = frozenset[str]().union(*(read_trained_on(folder) for folder in _model_folders(ready)))
    groups = outcome.questions["group_id"].to_pylist()
    counts = Counter(split for group, split in zip(groups, splits_of(groups, ready), strict=True) if group in seen)
    return {name: counts[name] for name in ANSWER_SPLITS if counts[name]}


def _model_folders(ready: Ready) -> list[Path]:
    """Of the model that answers, and of its base if it is an adapter; none of a server."""
    from stitch_ray.engines.hf_adapters import adapter_base, is_adapter

    model = ready.config.model
    if model is None:
        return []
    paths = [model.path, *([adapter_base(model.path)] if is_adapter(model.path) else [])]
    return [folder for path in paths if (folder := model_folder(path)) is not None]


def report_facts(
    ready: Ready, manifest: Mapping[str, Any], outcome: Outcome, quarantined: Sequence[Quarantined]
) -> AnswersFacts:
    """The facts of `report.html`."""
    config, table = ready.config, outcome.answers
    who = f"{config.model.path}, {config.model.engine}, {config.model.dtype}" if config.model else _server(ready)
    facts: AnswersFacts = {
        "manifest": manifest,
        "config": config.model_dump(mode="json"),
        "notes": _notes(manifest),
        "quarantined": quarantined,
        "model": who,
        "questions": outcome.questions.num_rows,
        "answers": table.num_rows,
        "tokens": manifest["tokens"],
        "tokens_per_second": manifest["tokens_per_second"],
        "failures": len(outcome.failed),
        "kinds": {kind: _kind(kind, outcome, counts) for kind, counts in manifest["kinds"].items()},
        "splits": manifest["splits"],
        "trained_on": manifest["trained_on"],
        "examples": _examples(outcome),
    }
    if config.labels.metric != "none":
        facts["metric"], facts["label_threshold"] = config.labels.metric, config.labels.threshold
        _add_signals(facts, outcome)
    if config.distractors:
        written = manifest["kinds"].get("distractor", {}).get("answers", 0)
        facts["distractors"] = {**outcome.counted["samples"], "answers": written}  # type: ignore[typeddict-item]
    return facts


def _server(ready: Ready) -> str:
    assert ready.config.endpoint is not None
    return f"{ready.config.endpoint.model} at {ready.config.endpoint.url}"


def _notes(manifest: Mapping[str, Any]) -> list[str]:
    counted = manifest["counted"]
    notes = [f"{count} without a value for {problem}." for problem, count in counted.get("signals", {}).items()]
    labels = counted.get("labels", {})
    lost = labels.get("judge_failed", 0) + labels.get("judge_unparsable", 0)
    if lost:
        notes.append(f"The judge gave no verdict on {lost} of {labels['judge_asked']} answers; they have no label.")
    seen = {name: count for name, count in manifest["trained_on"].items() if name in _MEASURED}
    if seen:
        of_each = ", ".join(f"{n} of {manifest['splits'][name]['questions']} in {name}" for name, n in seen.items())
        notes.append(
            f"The model was trained on questions that are here to measure it ({of_each}): its answers to them look more "
            "reliable than they are, and calibrate refuses them. Sample questions that it has not seen, or fine-tune "
            "with the same salt and a split.test that covers these splits."
        )
    return notes


def _counts(mask: NDArray[np.bool_], labels: NDArray[np.float64], correct: Sequence[bool | None]) -> dict[str, Any]:
    """Answers, labelled ones, and the share of those that is correct (None without any)."""
    labelled = mask & ~np.isnan(labels)
    right = sum(bool(correct[row]) for row in np.flatnonzero(labelled))
    count = int(labelled.sum())
    return {"answers": int(mask.sum()), "labelled": count, "correct": right / count if count else None}


def _kind(kind: str, outcome: Outcome, counts: Mapping[str, Any]) -> KindFacts:
    part = outcome.answers.filter(pc.equal(outcome.answers["kind"], kind))
    return {
        "answers": counts["answers"],
        "labelled": counts["labelled"],
        "correct": counts["correct"],
        "empty": sum(not text.strip() for text in part["answer"].to_pylist()),
        "cut": part["finish_reason"].to_pylist().count("length"),
        "labels": _floats(part["label"]),
        "tokens": np.array(part["tokens"].drop_null().to_pylist(), np.int64),
    }


def _add_signals(facts: AnswersFacts, outcome: Outcome) -> None:
    """Signals of the labelled greedy answers, and how well each tells the right ones."""
    if outcome.signals is None:
        return
    wanted = pc.and_(pc.equal(outcome.answers["kind"], GREEDY), pc.is_valid(outcome.answers["correct"]))
    answers, signals = outcome.answers.filter(wanted), outcome.signals.filter(wanted)
    if not answers.num_rows:
        return
    correct = np.array(answers["correct"].to_pylist(), np.bool_)
    known = [name for name in SIGN if name in signals.column_names]
    values: dict[str, NDArray[np.float64]] = {name: _floats(signals[name]) for name in known}
    confidences: dict[str, NDArray[np.float64]] = {name: SIGN[name] * values[name] for name in known}
    groups = np.array(answers["group_id"].to_pylist())
    found = evaluate(confidences, 1.0 - correct, groups=groups, bootstrap=_RESAMPLES, risks=())
    intervals = {row.name: row.metrics["auroc"] for row in found.rows if "auroc" in row.metrics}
    facts["signals"], facts["correct"] = values, correct
    facts["aurocs"] = {
        name: IntervalFacts(value=one.value, low=one.low, high=one.high) for name, one in intervals.items()
    }


def _examples(outcome: Outcome) -> list[QuestionFacts]:
    """Some questions, chosen by the hash of their ids, with all their answers."""
    ids = sorted(outcome.questions["example_id"].to_pylist(), key=content_hash)[:_EXAMPLES]
    of_ids = pc.is_in(outcome.questions["example_id"], value_set=pa.array(ids, pa.string()))
    questions = {row["example_id"]: row for row in outcome.questions.filter(of_ids).to_pylist()}
    given: dict[str, list[dict[str, Any]]] = {name: [] for name in ids}
    chosen = pc.is_in(outcome.answers["example_id"], value_set=pa.array(ids, pa.string()))
    answers = outcome.answers.filter(chosen).to_pylist()
    signals = outcome.signals.filter(chosen).to_pylist() if outcome.signals is not None else [{}] * len(answers)
    told: dict[str, dict[str, float | None]] = {}
    for answer, of_answer in zip(answers, signals, strict=True):
        given[answer["example_id"]].append(answer)
        if answer["kind"] == GREEDY:
            told[answer["example_id"]] = {name: value for name, value in of_answer.items() if name != "answer_id"}
    return [_example(questions[name], given[name], told.get(name, {})) for name in ids]


def _example(
    question: Mapping[str, Any], given: Sequence[Mapping[str, Any]], signals: Mapping[str, float | None]
) -> QuestionFacts:
    order = sorted(given, key=lambda row: (KINDS.index(row["kind"]), row["answer_id"]))
    answers: list[GivenFacts] = [
        {"kind": row["kind"], "answer": row["answer"], "label": row["label"], "correct": row["correct"]}
        for row in order
    ]
    return {
        "question": question["question"],
        "context": question["context"],
        "references": question["references"],
        "split": order[0]["split"] if order else "",
        "task": question["task"],
        "signals": signals,
        "answers": answers,
    }


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    """Values as float64, NaN for null."""
    found: NDArray[np.float64] = column.cast(pa.float64()).to_numpy()
    return found

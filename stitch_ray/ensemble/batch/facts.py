"""What is told of a run: counts for its manifest and `metrics.json`, and the facts of its report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow.compute as pc

from stitch_ray.config.reliability import ANSWER_SPLITS
from stitch_ray.data.quarantine import Quarantined
from stitch_ray.ensemble.batch.evaluation import Evaluation, evaluate
from stitch_ray.ensemble.batch.preflight import Ready
from stitch_ray.ensemble.batch.results import Outcome
from stitch_ray.ensemble.batch.traces import read_trace
from stitch_ray.reliability.risk.facts import plain
from stitch_ray.report.predictions import DialogueFacts, PredictionsFacts

__all__ = ["manifest_facts", "plain", "report_facts"]

_EXAMPLES = 8
_COSTS = ("calls", "tokens", "seconds")


def manifest_facts(ready: Ready, outcome: Outcome) -> tuple[dict[str, Any], Evaluation | None]:
    """What `manifest.json` says beside the counts of rows, and the evaluation."""
    config, table = ready.config, outcome.table
    evaluation = evaluate(
        table,
        outcome.references,
        both_stages=config.calibration,
        route=ready.fingerprints.route.partition(":")[0],
        auxiliaries=[member.name for member in config.ensemble.auxiliaries]
        if config.ensemble is not None and config.baselines
        else [],
        loss="error" if ready.policy is None else str(ready.policy.created_from.get("loss", "error")),
        seed=config.seed,
    )
    marks = ready.fingerprints
    return {
        "questions": table.num_rows + len(outcome.failed),
        "failures": len(outcome.failed),
        "decisions": _counts(table["decision"]),
        "reasons": _counts(table["reason"]),
        "routes": _counts(table["route"]),
        "splits": {
            name: {"questions": count, "answers": count, "correct": _share(table, name)}
            for name in ANSWER_SPLITS
            if (count := pc.sum(pc.equal(table["split"], name)).as_py() or 0)
        },
        "correct": {
            "draft": _mean(table["draft_correct"]),
            "final": _mean(table["final_correct"]),
            "given": _mean(table["correct"]),
        },
        "cost": {name: _mean(table[name]) for name in _COSTS},
        "tokens": pc.sum(table["tokens"]).as_py() or 0,
        "labels": dict(outcome.labels),
        "fingerprints": {
            **asdict(marks),
            "auxiliaries": None if marks.auxiliaries is None else list(marks.auxiliaries),
        },
        "policy": ready.work["policy"],
        "scale": ready.work["scale"],
        "model_version": next(iter(table["model_version"].to_pylist()), None),
        "calibration": config.calibration,
        "split": config.split.model_dump(mode="json"),
        "seed": config.seed,
    }, evaluation


def report_facts(
    ready: Ready,
    manifest: Mapping[str, Any],
    outcome: Outcome,
    evaluation: Evaluation | None,
    quarantined: Sequence[Quarantined],
) -> PredictionsFacts:
    config, table = ready.config, outcome.table
    facts: PredictionsFacts = {
        "manifest": manifest,
        "config": config.model_dump(mode="json", exclude_none=True),
        "notes": [*ready.notes, *_notes(ready, manifest, evaluation)],
        "quarantined": quarantined,
        "who": _who(ready),
        "questions": table.num_rows,
        "decisions": manifest["decisions"],
        "reasons": manifest["reasons"],
        "splits": manifest["splits"],
        "tokens_per_second": manifest["tokens_per_second"],
        "confidences": {
            name: np.array([np.nan if value is None else value for value in table[column].to_pylist()], np.float64)
            for name, column in (("draft", "draft_confidence"), ("refined", "final_confidence"))
        },
        "examples": _examples(outcome),
    }
    if config.labels.metric != "none":
        facts["metric"], facts["label_threshold"] = config.labels.metric, config.labels.threshold
    if evaluation is not None:
        facts["evaluation"] = evaluation.as_dict()
        facts["curves"] = dict(evaluation.curves)
        if evaluation.point is not None:
            facts["point"] = evaluation.point
    return facts


def _who(ready: Ready) -> str:
    config = ready.config
    if config.target is not None:
        return f"the ensemble served at {config.target.url}"
    assert config.ensemble is not None
    names = [member.name for member in config.ensemble.members]
    refining = f", refined by {' and '.join(names[1:])}" if names[1:] else ""
    return f"{names[0]}{refining}"


def _notes(ready: Ready, manifest: Mapping[str, Any], evaluation: Evaluation | None) -> list[str]:
    notes = []
    reasons = manifest["reasons"]
    for reason, what in (
        ("scorer_unavailable", "could not be scored"),
        ("route_failed", "could not be refined"),
        ("budget", "exceeded ensemble.limits"),
        ("deadline", "came too late"),
    ):
        if reasons.get(reason):
            notes.append(f"{reasons[reason]} questions got an abstention because they {what}.")
    if evaluation is not None and evaluation.split is None:
        notes.append(
            "No labelled question is of the test split, so all are measured. Scorer and policy may have learned from some."
        )
    if evaluation is not None and ready.config.calibration and ready.policy is None:
        notes.append(
            "Confidences here are the scorer's own, and so is the curve of the cascade: calibrate puts both stages on one "
            "scale before it looks for a threshold."
        )
    lost = manifest["labels"].get("judge_failed", 0) + manifest["labels"].get("judge_unparsable", 0)
    if lost:
        notes.append(f"The judge gave no verdict on {lost} of {manifest['labels']['judge_asked']} answers.")
    return notes


def _examples(outcome: Outcome) -> list[DialogueFacts]:
    """Refined questions: some that were corrected, some that were broken, then others, in the order of their ids."""
    rows = []
    columns = ["example_id", "question", "context", "task", "split", "draft", "draft_confidence", "draft_correct",
               "refined", "final_confidence", "final_correct", "answer", "decision", "reason", "trace"]  # fmt: skip
    for row, references in zip(outcome.table.select(columns).to_pylist(), outcome.references, strict=True):
        if row["refined"] is None and row["reason"] != "route_failed":
            continue
        became = (row["draft_correct"], row["final_correct"])
        rank = 0 if became == (False, True) else 1 if became == (True, False) else 2
        rows.append((rank, {**row, "references": references}))
    by_rank = {rank: [row for own, row in rows if own == rank] for rank in range(3)}
    chosen = [*by_rank[0][: _EXAMPLES // 2], *by_rank[1][: _EXAMPLES // 4]]
    chosen += by_rank[2][: _EXAMPLES - len(chosen)]
    return [_example(row) for row in chosen]


def _example(row: Mapping[str, Any]) -> DialogueFacts:
    stages = read_trace(json.loads(row["trace"]))
    return {
        **{key: row[key] for key in DialogueFacts.__annotations__ if key in row},  # type: ignore[typeddict-item]
        "turns": [
            {
                "speaker": str(turn.get("speaker")),
                "answer": str(turn.get("text") or ""),
                "comment": str(turn.get("comment") or ""),
                "changed": bool(turn.get("changed")),
            }
            for turn in stages.turns
        ],
    }


def _counts(column: Any) -> dict[str, int]:
    return dict(sorted(Counter(value for value in column.to_pylist() if value is not None).items()))


def _mean(column: Any) -> float | None:
    value = pc.mean(pc.cast(column, "float64")).as_py()
    return None if value is None else round(float(value), 6)


def _share(table: Any, split: str) -> float | None:
    return _mean(table.filter(pc.equal(table["split"], split))["draft_correct"])

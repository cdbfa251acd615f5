"""`exar judge`: labelled answers -> verdicts of a validator -> how they agree with the rule and with people."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray import ray_session
from stitch_ray.batch_files import batch_file
from stitch_ray.exclusion.batch_work import run_batches
from stitch_ray.exclusion.datasets import Distinct
from stitch_ray.exclusion.judging.preflight import Ready
from stitch_ray.exclusion.judging.worker import ASKED_SCHEMA, JudgeJob, JudgeWorker
from stitch_ray.exclusion.labels import CORRECT, read_label
from stitch_ray.exclusion.measures import verdicts, within_questions
from stitch_ray.reliability.answers.pipeline import CALL_LOG_VARIABLE
from stitch_ray.reliability.answers.plan import rows_a_batch
from stitch_ray.reliability.evaluation import evaluate
from stitch_ray.report.judge import write_report
from stitch_ray.runs import Progress, RunFolder, Summary, atomic_path, fresh_folder, write_json

VERDICTS, METRICS = "verdicts.parquet", "metrics.json"
SCHEMA = pa.schema(
    [
        ("answer_id", pa.string()),
        ("group_id", pa.string()),
        ("question", pa.string()),
        ("context", pa.string()),
        ("answer", pa.string()),
        ("label", pa.string()),
        ("human", pa.string()),
        ("probability", pa.float64()),
        ("reply", pa.string()),
        ("problem", pa.string()),
    ]
)
"""One row a distinct answer. `reply`: what the validator says in words; `problem`: why it could not judge."""


def run(ready: Ready, folder: RunFolder, progress: Progress = lambda step: None) -> Summary:
    """Judge what is not judged yet, then write `verdicts.parquet` and `metrics.json`. Needs a Ray session.

    Raises RuntimeError if the validator could judge none of the answers.
    """
    check_cluster(ready, folder.path)
    work = folder.path / "work"
    sizes = _write_asked(work / "asked", ready.answers)
    folder.disposable = False
    job = JudgeJob(
        config=ready.config,
        prompter=ready.prompter,
        asked=work / "asked",
        results=work / "results",
        tries=fresh_folder(work / "tries"),
        call_log=os.environ.get(CALL_LOG_VARIABLE),
    )
    model = ready.config.model
    run_batches(JudgeWorker, job, model, sizes, progress, stage=f"judging with {model.name}", unit="answers")
    found = {
        row["answer_id"]: row
        for batch in range(len(sizes))
        for row in pq.read_table(batch_file(job.results, batch)).to_pylist()
    }
    rows = [{**_row(one), **found[one.answer_id]} for one in ready.answers]
    if not any(row["probability"] is not None for row in rows):
        raise RuntimeError(
            f"{ready.config.model.name} could judge none of the answers; the first: {rows[0]['problem']}"
        )
    with atomic_path(folder.path / VERDICTS) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), temporary)
    measured = {name: measure(rows, name, ready) for name in ("label", "human")}
    facts = {name: one for name, one in measured.items() if one is not None}
    write_json(folder.path / METRICS, facts)
    kept = sum(one.num for one in ready.answers)
    folder.manifest.update(
        rows_in=ready.rows,
        rows_out=kept,
        rows_quarantined=0,
        rows_dropped=_dropped(ready, kept),
        inputs=dict.fromkeys(ready.config.answers, ready.work["inputs"]),
        problems=dict(Counter(row["problem"] for row in rows if row["problem"])),
        metrics=facts,
    )
    write_report(folder.path / "report.html", {"manifest": folder.manifest, "metrics": facts, "rows": rows})
    folder.finish()
    line = f"exar judge: {len(rows)} distinct answers judged -> {folder.path / VERDICTS}"
    return Summary(folder.path, folder.manifest, line, _text(facts))


def check_cluster(ready: Ready, path: Path) -> None:
    """Refuse, with the numbers, a validator that does not fit the cluster or a folder that its nodes do not share."""
    model = ready.config.model
    needed = {"CPU": float(model.replicas * model.num_threads)}
    if model.num_gpus:
        needed["GPU"] = model.replicas * model.num_gpus
    ray_session.require(needed, f"model {model.name}", hint="Lower replicas, num_threads or num_gpus")
    ray_session.require_shared(path, [model.path])


def measure(rows: Sequence[dict[str, Any]], truth: str, ready: Ready) -> dict[str, Any] | None:
    """Verdicts against the rule's labels or people's judgements; None where there are none.

    `replies`: what was said in words. One that is neither CORRECT nor WRONG is unparsable, and never right.
    """
    judged = [row for row in rows if row[truth] is not None and row["probability"] is not None]
    if not judged:
        return None
    config = ready.config
    correct = np.array([row[truth] == CORRECT for row in judged])
    probability = np.array([row["probability"] for row in judged], np.float64)
    said = [read_label(row["reply"] or "") for row in judged]
    groups = np.unique([row["group_id"] for row in judged], return_inverse=True)[1]
    ranked = evaluate(
        {"validator": probability},
        1.0 - correct,
        groups=groups,
        probabilities={"validator"},
        bootstrap=config.bootstrap,
        ece_bins=config.ece_bins,
        seed=config.seed,
    )
    return {
        **verdicts(probability, correct, threshold=config.threshold, ece_bins=config.ece_bins).to_dict(),
        "within_questions": asdict(within_questions(probability, correct, groups)),
        "replies": {
            "unparsable": said.count(None),
            "accuracy": sum(one == row[truth] for one, row in zip(said, judged, strict=True)) / len(judged),
        },
        "scores": ranked.as_dict(),
    }


def _write_asked(folder: Path, answers: Sequence[Distinct]) -> list[int]:
    rows = [
        {
            "answer_id": one.answer_id,
            "question": one.answer.question,
            "context": one.answer.context,
            "answer": one.answer.prediction,
        }
        for one in answers
    ]
    each = rows_a_batch(len(rows), 64)
    for number, start in enumerate(range(0, len(rows), each)):
        with atomic_path(batch_file(folder, number)) as temporary:
            pq.write_table(pa.Table.from_pylist(rows[start : start + each], ASKED_SCHEMA), temporary)
    return [min(each, len(rows) - start) for start in range(0, len(rows), each)]


def _row(one: Distinct) -> dict[str, Any]:
    answer = one.answer
    names = ("group_id", "question", "context", "label", "human")
    return {**{name: getattr(answer, name) for name in names}, "answer": answer.prediction}


def _dropped(ready: Ready, kept: int) -> dict[str, int]:
    dropped = {
        "answers to questions that the model learned from": ready.seen,
        "empty answers": ready.rows - ready.seen - kept,
    }
    return {reason: count for reason, count in dropped.items() if count}


def _text(facts: dict[str, dict[str, Any]]) -> str:
    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    lines = []
    for name, one in facts.items():
        auroc = one["scores"]["rows"][0]["metrics"]["auroc"]
        interval = "" if auroc["low"] is None else f" [{auroc['low']:.3f}, {auroc['high']:.3f}]"
        meta = one["metacognition"]
        signal = "" if meta is None else f", d' {meta['d_prime']:.2f}, meta-d' {meta['meta_d_prime']:.2f}"
        lines.append(
            f"{'rule' if name == 'label' else name:<6} {one['num']:>5} answers: AUROC {shown(one['auroc'])}{interval}, accuracy "
            f"{one['accuracy']:.3f} (the commoner verdict: {one['majority']:.3f}), balanced "
            f"{shown(one['balanced_accuracy'])}, MCC {shown(one['mcc'])}, Brier {one['brier']:.3f}, ECE {one['ece']:.3f}"
            f"{signal}; AUROC within "
            f"{one['within_questions']['questions']} questions {shown(one['within_questions']['auroc'])}; in words: accuracy {one['replies']['accuracy']:.3f}, {one['replies']['unparsable']} unparsable"
        )
    return "\n".join(lines)

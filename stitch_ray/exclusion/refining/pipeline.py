"""`exar refine`: questions -> attempts, each judged, until one is accepted; on Ray Data."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stitch_ray import ray_session
from stitch_ray.batch_files import batch_file
from stitch_ray.config.exar import ExarRefineConfig
from stitch_ray.data.corpus import build_corpus
from stitch_ray.data.splits import split_of
from stitch_ray.errors import UserError
from stitch_ray.exclusion.batch_work import run_batches
from stitch_ray.exclusion.combining import concatenate
from stitch_ray.exclusion.refining.preflight import Ready
from stitch_ray.exclusion.refining.results import Outcome, put_together
from stitch_ray.exclusion.refining.worker import ANSWER, VALIDATOR, RefineJob, Refiner
from stitch_ray.reliability.answers.pipeline import CALL_LOG_VARIABLE
from stitch_ray.reliability.answers.plan import PLAN, rows_a_batch
from stitch_ray.reliability.answers.questions import QUESTION_SCHEMA, Questions, plan_questions
from stitch_ray.runs import Progress, RunFolder, Step, Summary, atomic_path, fresh_folder

_OTHER_SIDE = "question of the other side of the split"


def run(ready: Ready, folder: RunFolder, progress: Progress = lambda step: None) -> Summary:
    """Refine what is not refined yet, then write `refined.parquet` and `attempts.parquet`. Needs a Ray session.

    Raises UserError if the cluster is too small or does not share the folder, or there is no question to ask, and
    RuntimeError if more than half of the questions get no answer.
    """
    check_cluster(ready, folder.path)
    config, work = ready.config, folder.path / "work"
    progress(Step(stage="reading", done=0, total=None))
    corpus = build_corpus(work / "corpus", config.data, ready.sources)
    questions = plan_questions(work / "questions", folder.path / PLAN, corpus, ready.prompter)
    sizes = _ask_side(work / "asked", questions, config)
    progress(Step(stage="reading", done=corpus.rows_in, total=corpus.rows_in))
    if not sum(sizes):
        raise UserError(f"data.paths: no {config.questions} question to ask in {', '.join(ready.sources)}")
    folder.disposable = False
    job = _job(ready, work)
    started = time.monotonic()
    run_batches(Refiner, job, config.model, sizes, progress, stage=f"refining with {ready.name}", unit="questions")
    seconds = time.monotonic() - started
    outcome = put_together(job, folder.path, len(sizes))
    quarantined = [*corpus.quarantined, *questions.quarantined, *outcome.failed]
    folder.write_quarantine(quarantined)
    dropped = {**questions.dropped, _OTHER_SIDE: len(questions) - sum(sizes)}
    folder.manifest.update(
        rows_in=corpus.rows_in,
        rows_out=sum(sizes) - len(outcome.failed),
        rows_quarantined=len(quarantined),
        rows_dropped={reason: count for reason, count in dropped.items() if count},
        inputs=dict.fromkeys(ready.sources, ready.work["data"]["inputs"]),
        refining_seconds=round(seconds, 3),
        **facts(ready, outcome),
    )
    folder.finish()
    return Summary(folder.path, folder.manifest, _line(folder))


def check_cluster(ready: Ready, path: Path) -> None:
    """Refuse, with the numbers, a plan that does not fit the cluster or a folder that its nodes do not share."""
    model = ready.config.model
    needed = {"CPU": float(model.replicas * model.num_threads)}
    if model.num_gpus:
        needed["GPU"] = model.replicas * model.num_gpus
    what = f"model {model.name} with replicas: {model.replicas}"
    ray_session.require(needed, what, hint="Lower replicas, num_threads or num_gpus")
    encoder = ready.config.labels.encoder
    ray_session.require_shared(path, [*ready.sources, *ready.folders, *([encoder] if encoder else [])])


def facts(ready: Ready, outcome: Outcome) -> dict[str, Any]:
    """What the manifest says of the questions."""
    refined = outcome.refined
    seen = ready.learned_from()
    answered = pc.sum(pc.equal(refined["decision"], "answer")).as_py() or 0
    return {
        "answers_from": ready.answers_from,
        "questions": refined.num_rows,
        "answered": answered,
        "reasons": dict(sorted(Counter(refined["reason"].to_pylist()).items())),
        "problems": dict(sorted(outcome.problems.items())),
        "attempts": pc.sum(refined["attempts"]).as_py(),
        "repeats": pc.sum(refined["repeats"]).as_py(),
        "calls": pc.sum(refined["calls"]).as_py(),
        "tokens": pc.sum(refined["tokens"]).as_py(),
        "first_correct": pc.sum(refined["first_correct"]).as_py(),
        "correct": pc.sum(refined["correct"]).as_py(),
        "trained_on": sum(group in seen for group in refined["group_id"].to_pylist()),
    }


def _ask_side(folder: Path, questions: Questions, config: ExarRefineConfig) -> list[int]:
    """The questions of the side that is asked, in batches of their own; the size of each."""
    parts = [pq.read_table(questions.file(batch), schema=QUESTION_SCHEMA) for batch in range(len(questions.sizes))]
    everyone = pa.concat_tables(parts) if parts else QUESTION_SCHEMA.empty_table()
    if config.questions != "all":
        split = config.split
        sides = [split_of(group, 0.0, split.test, split.salt) for group in everyone["group_id"].to_pylist()]
        everyone = everyone.filter(pa.array([side == config.questions for side in sides], pa.bool_()))
    each = rows_a_batch(everyone.num_rows)
    starts = range(0, everyone.num_rows, each)
    for number, start in enumerate(starts):
        with atomic_path(batch_file(folder, number)) as temporary:
            pq.write_table(everyone.slice(start, each), temporary)
    return [min(each, everyone.num_rows - start) for start in starts]


def _job(ready: Ready, work: Path) -> RefineJob:
    adapters, config = ready.config.adapters, ready.config
    named = {ANSWER: adapters.answer, VALIDATOR: adapters.validator}
    loaded = {name: path for name, path in named.items() if path}
    if adapters.combine == "cat":
        both = work / "adapter"
        if not both.is_dir():
            concatenate([str(adapters.answer), str(adapters.validator)], adapters.weights, both)
        loaded = {ANSWER: str(both)}  # one for both roles
    return RefineJob(
        config=config,
        prompter=ready.prompter,
        judge_prompter=ready.judge_prompter,
        adapters=loaded,
        name=ready.name,
        questions=work / "asked",
        results=work / "results",
        tries=fresh_folder(work / "tries"),
        call_log=os.environ.get(CALL_LOG_VARIABLE),
    )


def _line(folder: RunFolder) -> str:
    found = folder.manifest
    right = "" if found["correct"] is None else f", {found['correct']} of them right"
    return (
        f"exar refine: {found['answered']} of {found['questions']} questions answered{right} "
        f"({found['attempts']} attempts, {found['repeats']} repeated an answer) -> {folder.path / 'refined.parquet'}"
    )

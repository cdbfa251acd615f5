"""`sample-answers`: questions -> candidate answers -> labels and uncertainty signals, on Ray Data."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stitch_ray import ray_session
from stitch_ray.data.corpus import build_corpus
from stitch_ray.errors import UserError
from stitch_ray.reliability.answers.facts import manifest_facts, report_facts
from stitch_ray.reliability.answers.plan import PLAN
from stitch_ray.reliability.answers.preflight import Ready
from stitch_ray.reliability.answers.questions import Questions, plan_questions
from stitch_ray.reliability.answers.results import put_together
from stitch_ray.reliability.answers.sampler import AnswerJob, Sampler
from stitch_ray.report.answers import write_report
from stitch_ray.runs import Progress, RunFolder, Step, Summary, fresh_folder

CALL_LOG_VARIABLE = "STITCH_RAY_CALL_LOG"
"""Names a file outside the run to which every stage of a batch appends `stage, batch, rows`: an audit of the work."""

_MOST_BLOCKS = 1000
_LEAST_ROWS = 32
_REQUESTS_A_LINE = 4  # questions of a batch for every request in flight: its end, where lines fall idle, is short
_HOPELESS = 64
"""When every one of so many questions failed, the rest is not tried."""


def run(ready: Ready, folder: RunFolder, progress: Progress = lambda step: None) -> Summary:
    """Answer what is not answered yet, then make labels, signals, tables and report. Needs a Ray session.

    Raises UserError if the cluster is too small or does not share the folder, or the data holds no question, and
    RuntimeError if more than half of the questions get no answer.
    """
    check_cluster(ready, folder.path)
    config, work = ready.config, folder.path / "work"
    progress(Step(stage="reading", done=0, total=None))
    corpus = build_corpus(work / "corpus", config.data, ready.sources)
    least = _LEAST_ROWS if config.endpoint is None else max(_LEAST_ROWS, _REQUESTS_A_LINE * config.endpoint.concurrency)
    questions = plan_questions(work / "questions", folder.path / PLAN, corpus, ready.prompter, least)
    progress(Step(stage="reading", done=corpus.rows_in, total=corpus.rows_in))
    if not len(questions):
        first = f"; the first: {questions.quarantined[0].reason}" if questions.quarantined else ""
        raise UserError(f"data.paths: no question to ask in {', '.join(ready.sources)}{first}")
    folder.disposable = False
    job = _job(ready, work)
    spent = _answer(job, questions, progress)

    outcome = put_together(ready, folder.path, job, questions)
    quarantined = [*corpus.quarantined, *questions.quarantined, *outcome.failed]
    folder.write_quarantine(quarantined)
    dropped = {reason: count for reason, count in questions.dropped.items() if count}
    folder.manifest.update(
        rows_in=corpus.rows_in,
        rows_out=len(questions) - len(outcome.failed),
        rows_quarantined=len(quarantined),
        rows_dropped=dropped,
        records_written=outcome.answers.num_rows,
        inputs=dict.fromkeys(ready.sources, ready.work["data"]["inputs"]),
        **manifest_facts(ready, outcome),
        **spent,
    )
    write_report(folder.path / "report.html", report_facts(ready, folder.manifest, outcome, quarantined))
    folder.finish()
    right = folder.manifest["kinds"].get("greedy", {}).get("correct")
    told = "" if right is None else f", {right:.1%} of the greedy ones right"
    line = (
        f"sample-answers: {outcome.answers.num_rows} answers to {folder.manifest['rows_out']} questions{told} "
        f"({corpus.rows_in} rows read, {len(quarantined)} quarantined) -> {folder.path / 'answers.parquet'}"
    )
    return Summary(folder.path, folder.manifest, line)


def check_cluster(ready: Ready, path: Path) -> None:
    """Refuse, with the numbers, a plan that does not fit the cluster or a folder that its nodes do not share."""
    model, config = ready.config.model, ready.config
    needed, what = {"CPU": 1.0}, f"endpoint {ready.name}"
    if model:
        needed = {"CPU": float(model.replicas * model.num_threads)}
        if model.num_gpus:
            needed["GPU"] = model.replicas * model.num_gpus
        what = f"model {model.name} with replicas: {model.replicas}"
    ray_session.require(needed, what, hint="Lower replicas, num_threads or num_gpus")
    folders = (model.path if model else None, config.labels.encoder, config.signals.encoder)
    ray_session.require_shared(path, [*ready.sources, *(one for one in folders if one)])


def _job(ready: Ready, work: Path) -> AnswerJob:
    config = ready.config
    return AnswerJob(
        config=config,
        prompter=ready.prompter,
        name=ready.name,
        questions=work / "questions",
        samples=work / "samples",
        labels=None if config.labels.metric == "none" else work / f"labels-{ready.labels_key}",
        signals=work / f"signals-{ready.signals_key}" if config.signals.names else None,
        attempts=fresh_folder(work / "attempts"),
        call_log=os.environ.get(CALL_LOG_VARIABLE),
    )


def _answer(job: AnswerJob, questions: Questions, progress: Progress) -> dict[str, Any]:
    """Do what is left of every batch; return what that cost. Raises RuntimeError if it is of no use to go on."""
    pending = [batch for batch in range(len(questions.sizes)) if not job.is_done(batch)]
    started = time.monotonic()
    stats = _answer_pending(job, pending, questions, progress) if pending else []
    tokens = sum(int(row["tokens"]) for row in stats)
    seconds = sum(float(row["sampling_seconds"]) for row in stats)
    actors = len({(row["node"], int(row["actor"])) for row in stats})
    return {
        # Of the actors together, and without the start of their models.
        "tokens_per_second": round(tokens / seconds * actors, 1) if tokens and seconds else None,
        "answered_now": sum(int(row["answers"]) for row in stats),
        "answering_seconds": round(time.monotonic() - started, 3),
    }


def _answer_pending(
    job: AnswerJob, pending: Sequence[int], questions: Questions, progress: Progress
) -> list[dict[str, Any]]:
    import ray.data

    model = job.config.model
    stage = f"answering with {job.name}"
    total = len(questions)
    done = total - sum(questions.sizes[batch] for batch in pending)
    progress(Step(stage=stage, done=done, total=total))
    replicas, cpus, gpus = (model.replicas, model.num_threads, model.num_gpus) if model else (1, 1, 0)
    items = [{"batch_id": batch} for batch in pending]
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), _MOST_BLOCKS)).map_batches(
        Sampler,
        batch_size=1,
        fn_constructor_args=(job,),
        compute=ray.data.ActorPoolStrategy(size=min(replicas, len(items))),
        num_cpus=cpus,
        num_gpus=gpus or None,
    )
    stats: list[dict[str, Any]] = []
    failed = seen = 0
    for row in dataset.iter_rows():
        if row["error"]:
            raise RuntimeError(row["error"])
        stats.append(row)
        done += int(row["questions"])
        seen += int(row["questions"])
        failed += int(row["failed"])
        if failed > total / 2 or failed == seen >= _HOPELESS:
            raise RuntimeError(
                f"{failed} of {seen} questions got no answer from {job.name}; the first: {row['reason']}"
            )
        progress(Step(stage=stage, done=done, total=total, tokens=sum(int(stat["tokens"]) for stat in stats)))
    return stats

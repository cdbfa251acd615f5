"""`predict`: questions -> answers with a confidence, or abstentions, on pools of actors or a served ensemble."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stitch_ray import ray_session
from stitch_ray.data.corpus import build_corpus
from stitch_ray.ensemble.batch import pools
from stitch_ray.ensemble.batch.facts import manifest_facts, plain, report_facts
from stitch_ray.ensemble.batch.preflight import Ready
from stitch_ray.ensemble.batch.questions import Chunks, plan_chunks
from stitch_ray.ensemble.batch.results import put_together
from stitch_ray.ensemble.batch.runner import PredictJob, Runner
from stitch_ray.errors import UserError
from stitch_ray.report.predictions import write_report
from stitch_ray.runs import Progress, RunFolder, Step, Summary, fresh_folder, write_json

CALL_LOG_VARIABLE = "STITCH_RAY_CALL_LOG"
"""Names a file outside the run to which every stage of a chunk appends `stage, chunk, rows`: an audit of the work."""
METRICS = "metrics.json"

_HOPELESS = 64
"""When every one of so many questions failed, the rest is not tried."""


def run(ready: Ready, folder: RunFolder, progress: Progress = lambda step: None) -> Summary:
    """Ask what is not answered yet, then make labels, tables, measures and report. Needs a Ray session.

    Raises UserError if the cluster is too small or does not share the folder, or the data holds no question, and
    RuntimeError if more than half of the questions get no prediction.
    """
    check_cluster(ready, folder.path)
    config, work = ready.config, folder.path / "work"
    progress(Step(stage="reading", done=0, total=None))
    corpus = build_corpus(work / "corpus", config.data, ready.sources)
    chunks = plan_chunks(work / "questions", corpus, config, ready.prompter)
    progress(Step(stage="reading", done=corpus.rows_in, total=corpus.rows_in))
    if not len(chunks):
        first = f"; the first: {chunks.quarantined[0].reason}" if chunks.quarantined else ""
        raise UserError(f"data.paths: no question to ask in {', '.join(ready.sources)}{first}")
    folder.disposable = False
    job = _job(ready, work)
    spent = _answer(ready, job, chunks, progress)

    outcome = put_together(ready, folder.path, job, chunks)
    quarantined = [*corpus.quarantined, *chunks.quarantined, *outcome.failed]
    folder.write_quarantine(quarantined)
    facts, evaluation = manifest_facts(ready, outcome)
    folder.manifest.update(
        rows_in=corpus.rows_in,
        rows_out=outcome.table.num_rows,
        rows_quarantined=len(quarantined),
        rows_dropped={reason: count for reason, count in chunks.dropped.items() if count},
        inputs=dict.fromkeys(ready.sources, ready.work["data"]["inputs"]),
        **facts,
        **spent,
    )
    write_json(folder.path / METRICS, plain({**facts, "evaluation": evaluation and evaluation.as_dict()}))
    report = report_facts(ready, folder.manifest, outcome, evaluation, quarantined)
    write_report(folder.path / "report.html", report)
    folder.finish()
    return Summary(folder.path, folder.manifest, _line(folder), _table(evaluation))


def check_cluster(ready: Ready, path: Path) -> None:
    """Refuse, with the numbers, a plan that does not fit the cluster or a folder that its nodes do not share."""
    config = ready.config
    folders = [config.labels.encoder]
    if config.ensemble is not None:
        pools.check_cluster(config.ensemble)
        folders += [model.path for model in config.ensemble.local_models()]
        folders += [config.scorer, config.ensemble.signals.encoder, *config.ensemble.primary.adapters.values()]
    ray_session.require_shared(path, [*ready.sources, *(one for one in folders if one)])


def _job(ready: Ready, work: Path) -> PredictJob:
    config = ready.config
    auxiliaries = config.ensemble.auxiliaries if config.ensemble is not None and config.baselines else []
    members = [] if config.ensemble is None else config.ensemble.members
    return PredictJob(
        questions=work / "questions",
        predictions=work / "predictions",
        attempts=fresh_folder(work / "attempts"),
        baselines=work / "baselines" if auxiliaries else None,
        labels=None if config.labels.metric == "none" else work / f"labels-{ready.labels_key}",
        labels_config=config.labels,
        auxiliaries=tuple(member.name for member in auxiliaries),
        concurrency=config.concurrency,
        ask_again=config.target is not None or any(member.endpoint is not None for member in members),
        call_log=os.environ.get(CALL_LOG_VARIABLE),
    )


def _answer(ready: Ready, job: PredictJob, chunks: Chunks, progress: Progress) -> dict[str, Any]:
    """Do what is left of every chunk; return what that cost. Raises RuntimeError if it is of no use to go on."""
    pending = [chunk for chunk in range(len(chunks.sizes)) if not job.is_done(chunk)]
    if not pending:
        return {"asked_now": 0, "tokens_per_second": None, "asking_seconds": 0.0}
    asking = any(job.needs_models(chunk) for chunk in pending)
    with _connected(ready, progress) if asking else _nobody() as connect:
        began = time.monotonic()
        stats = _run_chunks(ready, job, connect, pending, chunks, progress)
    seconds = time.monotonic() - began
    tokens = sum(int(row["tokens"]) for row in stats)
    return {
        "asked_now": sum(int(row["asked"]) for row in stats),
        "tokens_per_second": round(tokens / seconds, 1) if tokens and seconds else None,
        "asking_seconds": round(seconds, 3),
    }


@contextmanager
def _connected(ready: Ready, progress: Progress) -> Iterator[Callable[[], Any]]:
    """Who answers, for the life of the block."""
    from stitch_ray.ensemble.batch.respondents import Connection, ServedConnection

    config = ready.config
    if config.target is not None:
        yield ServedConnection(config.target, config.target_risk, config.concurrency)
        return
    assert config.ensemble is not None
    progress(Step(stage="loading models", done=0, total=None))
    with pools.started(ready) as found:
        yield Connection(
            ensemble=config.ensemble,
            policy=ready.policy,
            target_risk=config.target_risk,
            both_stages=config.calibration,
            seed=config.seed,
            **found,
        )


@contextmanager
def _nobody() -> Iterator[None]:
    yield None


def _run_chunks(
    ready: Ready,
    job: PredictJob,
    connect: Callable[[], Any] | None,
    pending: Sequence[int],
    chunks: Chunks,
    progress: Progress,
) -> list[dict[str, Any]]:
    import ray.data

    stage, total = f"asking {ready.name}", len(chunks)
    done = total - sum(chunks.sizes[chunk] for chunk in pending)
    progress(Step(stage=stage, done=done, total=total, unit="questions"))
    items = [{"chunk": chunk} for chunk in pending]
    # Enough chunks under way that the lines stay full while the last questions of one of them are still open.
    under_way = min(len(items), 1 + -(-job.concurrency // max(1, min(chunks.sizes))))
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Runner,
        batch_size=1,
        fn_constructor_args=(job, connect),
        compute=ray.data.ActorPoolStrategy(
            size=1, max_concurrent_calls_per_actor=under_way, max_tasks_in_flight_per_actor=under_way
        ),
        num_cpus=0,
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
                f"{failed} of {seen} questions got no prediction from {ready.name}; the first: {row['reason']}"
            )
        tokens = sum(int(one["tokens"]) for one in stats)
        progress(Step(stage=stage, done=done, total=total, tokens=tokens, unit="questions"))
    return stats


def _line(folder: RunFolder) -> str:
    manifest = folder.manifest
    decisions = manifest["decisions"]
    what = f"{manifest['rows_out']} questions"
    if decisions:
        what += f", {decisions.get('answer', 0)} answered, {decisions.get('abstain', 0)} abstentions"
    right = manifest["correct"]["given"]
    told = "" if right is None else f", {right:.1%} of the answers given right"
    return (
        f"predict: {what}{told} ({manifest['rows_in']} rows read, {manifest['rows_quarantined']} quarantined) "
        f"-> {folder.path / 'predictions.parquet'}"
    )


def _table(evaluation: Any) -> str:
    """The systems side by side, for a terminal."""
    if evaluation is None:
        return ""
    lines = [f"{'':26}{'answered':>9}{'right':>9}{'95 % interval':>17}{'calls':>8}{'tokens':>9}"]
    for system in evaluation.systems:
        right = system.accuracy
        lines.append(
            f"{system.name[:25]:26}{system.coverage:9.1%}{right.value:9.1%}{right.low:9.1%} to {right.high:5.1%}"
            f"{system.calls:8.2f}{system.tokens:9.0f}"
        )
    return "\n".join(lines)

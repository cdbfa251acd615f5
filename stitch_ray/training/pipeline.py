"""`finetune`: examples -> token data -> workers on Ray Train -> checkpoints -> a model folder and a report."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stitch_ray import ray_session
from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.report.training import write_report
from stitch_ray.runs import Progress, RunFolder, Step, Summary
from stitch_ray.training import checkpoints
from stitch_ray.training.evaluation import AnswerEvaluation
from stitch_ray.training.job import CHECKPOINTS, METRICS, Outcome, WorkerJob, run_plan
from stitch_ray.training.launch import launch
from stitch_ray.training.metrics import MetricsLog
from stitch_ray.training.plan import StepPlan
from stitch_ray.training.preflight import Ready
from stitch_ray.training.prepare import Prepared, build, learned_groups
from stitch_ray.training.watch import watching

CALL_LOG_VARIABLE = "STITCH_RAY_CALL_LOG"
"""Names a file outside the run to which every worker appends `step, slot, example ids`: an audit of the work."""


def run(ready: Ready, folder: RunFolder, progress: Progress = lambda step: None) -> Summary:
    """Prepare the data, train what is not trained yet, export the model, write the report. Needs a Ray session.

    Raises UserError for what only the user can change, FloatingPointError for a loss that is not finite, RuntimeError
    when more workers were lost than `resources.max_failures`.
    """
    config = ready.config
    check_cluster(ready, folder.path)
    prepared = build(folder.path / "work" / "data", config, config.model.path, progress)
    plan = run_plan(config, prepared.train.lengths, prepared.train.task_ids)
    folder.write_quarantine(prepared.quarantined)
    folder.manifest.update(_counts(ready, prepared))
    folder.manifest.update(total_steps=plan.total_steps, model_parameters=ready.num_parameters)
    folder.manifest["packed"] = _packed(config, plan, prepared)
    folder.save()

    evaluation = AnswerEvaluation(ready, prepared, folder.path)

    def report(live: bool = True) -> None:
        records = [*MetricsLog.read(folder.path / METRICS), *evaluation.records()]
        write_report(
            folder.path / "report.html", config, _facts(ready, folder, prepared, evaluation), records, live=live
        )

    def on_record(record: Mapping[str, Any]) -> None:
        folder.disposable = False  # the workers have not refused: from here on there is something to resume
        evaluation.on_record(record)

    outcome = Outcome.read(folder.path)
    if outcome is None:
        progress(Step(stage="training", done=0, total=plan.total_steps, unit="steps"))
        report()
        job = WorkerJob(
            config=config, folder=folder.path, data=prepared.folder, step_log=os.environ.get(CALL_LOG_VARIABLE)
        )
        with watching(
            folder.path,
            progress=progress,
            total_steps=plan.total_steps,
            write_report=report,
            on_record=on_record,
        ):
            outcome = launch(job)
        evaluation.finish()
        if outcome.status == "not_finite":
            folder.manifest["not_finite"] = {"step": outcome.step, "examples": list(outcome.examples)}
            error = outcome.not_finite("optimizer.learning_rate")
            folder.fail(error)  # before the report, which says so
            report(live=False)
            raise error
        outcome.write(folder.path)
    step = outcome.model_step(config)
    _export(ready, folder.path, step, outcome)
    _finish(folder, outcome, step)
    report(live=False)
    folder.finish()
    return Summary(folder.path, folder.manifest, _line(folder, outcome, step))


def check_cluster(ready: Ready, path: Path) -> None:
    """Refuse, with the numbers, workers that do not fit the cluster or a folder that its nodes do not share."""
    config = ready.config
    low, _ = config.worker_range
    needed = {"CPU": float(low * config.resources.num_threads)}
    if config.resources.num_gpus:
        needed["GPU"] = low * config.resources.num_gpus
    if config.eval.generate:
        needed["CPU"] += config.eval.num_cpus
        needed["GPU"] = needed.get("GPU", 0.0) + config.eval.num_gpus
    ray_session.require(
        {name: amount for name, amount in needed.items() if amount},
        f"training with workers: {low}",
        hint="Lower workers or resources.num_threads",
    )
    inputs = [source for sources in ready.sources for source in sources]
    ray_session.require_shared(path, [*inputs, config.model.path])


def _counts(ready: Ready, prepared: Prepared) -> dict[str, Any]:
    tasks = {name: asdict(counts) for name, counts in prepared.tasks.items()}
    total = {key: sum(task[key] for task in tasks.values()) for key in next(iter(tasks.values()))}
    return {
        "rows_in": total["rows_in"],
        "rows_out": total["train"] + total["validation"] + total["test"],
        "rows_quarantined": total["quarantined"],
        "rows_dropped": {"longer than max_length": total["dropped"]} if total["dropped"] else {},
        "truncated": total["truncated"],
        "tasks": tasks,
        "inputs": {
            source: ready.work["tasks"][task.name]["inputs"]
            for task, sources in zip(ready.config.tasks, ready.sources, strict=True)
            for source in sources
        },
        "seed": ready.config.seed,
    }


def _packed(config: FinetuneConfig, plan: StepPlan, prepared: Prepared) -> float | None:
    """Share of the room in the micro-batches of the first epoch that tokens take; None without packing by tokens."""
    if not config.packing or config.batch_tokens is None:
        return None
    tokens = rows = 0
    for number in range(plan.total_steps):
        if plan.epoch(number) >= 1:
            break
        for micro in plan.step(number):
            rows += 1
            tokens += int(prepared.train.lengths[list(micro)].sum())
    return round(tokens / (rows * config.batch_tokens), 4)


def _facts(ready: Ready, folder: RunFolder, prepared: Prepared, evaluation: AnswerEvaluation) -> Mapping[str, Any]:
    """What the report shows beside the records."""
    kept = checkpoints.listed(folder.path / CHECKPOINTS)
    return {
        **folder.manifest,
        "run": folder.path.resolve().name,
        "model": {"parameters": ready.num_parameters, "fingerprint": ready.fingerprint},
        "checkpoints": [{"step": step, "path": str(path.relative_to(folder.path))} for step, path in kept],
        **evaluation.facts(),
    }


def _export(ready: Ready, path: Path, step: int, outcome: Outcome) -> None:
    """Write `model/` on a node of the cluster, unless it is there already. RuntimeError for a damaged checkpoint."""
    import ray

    from stitch_ray.training.export import NOTE

    note = path / "model" / NOTE
    if note.exists() and json.loads(note.read_text("utf-8"))["trained"].get("step") == step:
        return
    checkpoint = outcome.checkpoint(path, step)
    for leftover in path.glob(".model.*"):  # of a command that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    card = {
        "step": step,
        "steps": outcome.total_steps,
        "status": outcome.status,
        "validation loss": outcome.best_loss if step == outcome.best_step else None,
        "work_hash": ready.work_hash,
    }
    card = {name: value for name, value in card.items() if value is not None}
    data = path / "work" / "data"
    ray.get(ray.remote(num_cpus=1)(export).remote(ready, checkpoint, path / "model", card, data))


def export(ready: Ready, checkpoint: Path, out: Path, card: Mapping[str, Any], data: Path | None = None) -> None:
    """Make a model folder of a checkpoint: Hugging Face format, or a PEFT adapter.

    `data`: the prepared data, whose questions are noted beside a model that is there to stay.
    """
    from stitch_ray.training.export import export_model
    from stitch_ray.training.state import read_weights

    config = ready.config
    export_model(
        config.model.path,
        config.method,
        config.adapter if config.method != "full" else None,
        read_weights(checkpoint),
        out,
        dtype=config.model.dtype,
        chat_template=ready.templates[0],
        tasks={
            task.name: {"objective": task.objective or config.objective, "template": template}
            for task, template in zip(config.tasks, ready.templates, strict=True)
        },
        card=card,
        trained_on=learned_groups(data, config) if data else (),
        trust_remote_code=config.model.trust_remote_code,
    )


def _finish(folder: RunFolder, outcome: Outcome, step: int) -> None:
    steps = [record for record in MetricsLog.read(folder.path / METRICS) if record["kind"] == "step"]
    seconds = sum(record["seconds"] for record in steps)
    tokens = sum(record["tokens"] for record in steps)
    folder.manifest.update(
        outcome=outcome.status,
        steps=outcome.step,
        model_step=step,
        best_step=outcome.best_step,
        best_loss=outcome.best_loss,
        final_loss=steps[-1]["loss"] if steps else None,
        tokens=tokens,
        tokens_per_second=round(tokens / seconds, 1) if seconds else None,
        peak_memory_mb=max((record["peak_memory_mb"] for record in steps), default=None),
    )
    if outcome.status == "stopped_early":
        folder.manifest["stopped"] = (
            f"The validation loss stopped falling: the best was {outcome.best_loss:.4f} at step {outcome.best_step}."
        )
    # For the report, which the run is not done without.
    folder.manifest.update(status="done", seconds=round(time.monotonic() - folder.started, 3))


def _line(folder: RunFolder, outcome: Outcome, step: int) -> str:
    loss = folder.manifest["final_loss"]
    best = f", best validation loss {outcome.best_loss:.4f} at step {outcome.best_step}" if outcome.best_loss else ""
    early = " (stopped early)" if outcome.status == "stopped_early" else ""
    return (
        f"finetune: {outcome.step} steps{early}, {folder.manifest['rows_out']} of {folder.manifest['rows_in']} rows, "
        f"loss {loss:.4f}{best} -> {folder.path / 'model'}"
    )

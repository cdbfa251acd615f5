"""`report.html` of a `finetune` run: how the loss went, for every task, and what a reader should notice about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.report import curves
from stitch_ray.report.curves import Curve
from stitch_ray.report.html import number, percent, render
from stitch_ray.runs import write_text

Floats = NDArray[np.float64]

_MOST_TASKS = 24
_MOST_SAMPLES = 60
_MOST_CHARACTERS = 4000
_REFRESH_S = 10


@dataclass(frozen=True)
class _Log:
    """The records by kind, and as curves over the steps."""

    records: Sequence[Mapping[str, Any]]

    def of(self, kind: str) -> list[Mapping[str, Any]]:
        return [record for record in self.records if record["kind"] == kind]

    @cached_property
    def steps(self) -> list[Mapping[str, Any]]:
        return self.of("step")

    @cached_property
    def validations(self) -> list[Mapping[str, Any]]:
        return self.of("validation")

    @cached_property
    def restarts(self) -> list[Mapping[str, Any]]:
        """Starts that went on from a checkpoint."""
        return [record for record in self.of("start") if record["step"] > 0]

    def total(self, key: str) -> float:
        return float(sum(record[key] for record in self.steps))


def write_report(
    path: Path, config: FinetuneConfig, facts: Mapping[str, Any], records: Sequence[Mapping[str, Any]], *, live: bool
) -> None:
    """Write the report of a run to the file `path`; at any moment, with whatever records there are.

    records: of `metrics.jsonl` (`stitch_ray.training.metrics`). live: the page loads itself again every ten seconds.
    facts, of which only `tasks` must be there:

    tasks          name -> rows_in, quarantined, dropped, truncated, train, validation, test (rows), tokens, loss_tokens
                   (of the training split)
    status         "running" (default), "failed" or "done"; error: why it failed
    total_steps    optimizer steps planned; stopped: why there were fewer, a sentence
    seconds        since the job was started; utilisation: share of it that workers spent in steps, 0 to 1
    run, created   name and date of the run
    model          parameters; trainable, fingerprint if known
    checkpoints    those still on disk: {step, path}
    samples        of `evaluate_answers`: {task, question, reference, answer, correct, cut, error}, and samples_step
    versions       package -> version; machine: {platform, cpus, gpus}; work_hash, config_hash
    """
    log = _Log(records)
    names = [task.name for task in config.tasks]
    status = facts.get("status", "running")
    page = render(
        "training.html.jinja",
        config=config,
        facts=facts,
        status=status,
        run=facts.get("run") or path.resolve().parent.name,
        headline=_headline(log, len(names)),
        tiles=_tiles(log, facts),
        notes=_notes(log, config, facts),
        loss_figure=_loss_figure(log),
        panels=_panels(log, names),
        weights=_weights(log, names),
        optimizer=_optimizer(log, config),
        throughput=_throughput(log),
        shown_tasks=_MOST_TASKS,
        results=_results(log, names),
        tasks=_tasks(log, config, facts["tasks"]),
        checkpoints=_checkpoints(log, facts.get("checkpoints", ())),
        starts=log.of("start"),
        samples=[_short(sample) for sample in facts.get("samples", ())[:_MOST_SAMPLES]],
        config_text=yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        machine=", ".join(f"{key} {value}" for key, value in facts.get("machine", {}).items()),
    )
    if live:
        # The frame of all reports has no place for tags in its head; everything from records is escaped, so the
        # first <title> is the frame's.
        page = page.replace("<title>", f'<meta http-equiv="refresh" content="{_REFRESH_S}">\n<title>', 1)
    write_text(path, page)


# Numbers


def _curve(records: Sequence[Mapping[str, Any]], *keys: str) -> Curve:
    """What the records have under these nested keys, over their steps; records without it are left out."""
    steps, values = [], []
    for record in records:
        value: Any = record
        for key in keys:
            value = value.get(key) if value is not None else None
        if value is not None:
            steps.append(record["step"])
            values.append(value if np.isfinite(value) else np.nan)
    return np.array(steps, np.float64), np.array(values, np.float64)


def _end(curve: Curve) -> float | None:
    """Mean of the last thirtieth, or of five values if that is more; of a short run the last third."""
    values = curve[1][np.isfinite(curve[1])]
    count = max(len(values) // 30, min(5, -(-len(values) // 3)))
    return float(values[-count:].mean()) if len(values) else None


def _lowest(curve: Curve) -> tuple[int, float] | None:
    """(step, value)."""
    steps, values = curve
    if not np.isfinite(values).any():
        return None
    best = int(np.nanargmin(values))
    return int(steps[best]), float(values[best])


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _large(value: float) -> str:
    """In at most six characters."""
    for power, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= power:
            return f"{value / power:.{2 if value < 10 * power else 1 if value < 100 * power else 0}f} {unit}"
    return number(value)


def _bytes(size: float | None) -> str:
    if size is None:
        return "–"
    power = min(int(np.log10(max(size, 1)) // 3), 4)
    return f"{size / 1000**power:,.{1 if power else 0}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


# Parts of the page


def _headline(log: _Log, num_tasks: int) -> str:
    on = f"on {num_tasks} task{'' if num_tasks == 1 else 's'}"
    if not log.steps:
        return f"No step yet {on}"
    done = log.steps[-1]["step"]
    text = f"{number(done)} step{'' if done == 1 else 's'} {on}"
    best, end = _lowest(_curve(log.validations, "loss")), _end(_curve(log.steps, "loss"))
    if best:
        return f"{text}: lowest validation loss {best[1]:.3f}"
    return text if end is None else f"{text}: training loss {end:.3f}"


def _tiles(log: _Log, facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    steps, total = log.steps, facts.get("total_steps")
    best, seconds = _lowest(_curve(log.validations, "loss")), log.total("seconds")
    memory = _curve(steps, "peak_memory_mb")[1]
    done = steps[-1]["step"] if steps else 0
    planned = "steps" if total is None else f"of {number(total)} steps"
    tiles = [
        (f"{planned}, {number(steps[-1]['epoch'], 2)} epochs" if steps else planned, number(done)),
        ("tokens trained on", _large(log.total("tokens"))),
        ("tokens a second", number(log.total("tokens") / seconds if seconds else None)),
        ("training loss, at the end", number(_end(_curve(steps, "loss")), 3)),
        ("lowest validation loss" + (f", step {number(best[0])}" if best else ""), number(best and best[1], 3)),
        ("peak memory of a worker", _bytes(memory.max() * 1e6 if len(memory) else None)),
        ("time (h:min:s)", _duration(facts["seconds"]))
        if "seconds" in facts
        else ("time in steps", _duration(seconds)),
    ]
    if "utilisation" in facts:
        tiles.append(("of the time in steps", percent(facts["utilisation"])))
    mfu = _end(_curve(steps, "mfu"))
    return tiles if mfu is None else [*tiles, ("of the GPUs' peak (MFU)", percent(mfu))]


def _loss_figure(log: _Log) -> str | None:
    if not log.steps:
        return None
    restarts = [record["step"] for record in log.restarts]
    return curves.loss_curve(_curve(log.steps, "loss"), _curve(log.validations, "loss"), restarts, "Loss")


def _panels(log: _Log, names: Sequence[str]) -> str | None:
    training = {name: _curve(log.steps, "tasks", name) for name in names[:_MOST_TASKS]}
    if len(names) == 1 or not log.steps:
        return None
    validation = {name: _curve(log.validations, "tasks", name) for name in training}
    return curves.loss_panels(training, validation, "Loss of every task")


def _weights(log: _Log, names: Sequence[str]) -> str | None:
    """None where the weights never change."""
    weights = {name: _curve(log.steps, "task_weights", name) for name in names}
    if not any(len(values) and np.ptp(values) > 1e-9 for _, values in weights.values()):
        return None
    return curves.weight_panels({name: weights[name] for name in names[:_MOST_TASKS]}, "Task weights")


def _optimizer(log: _Log, config: FinetuneConfig) -> str | None:
    if not log.steps:
        return None
    rate, norm = _curve(log.steps, "lr"), _curve(log.steps, "grad_norm")
    return curves.optimizer(rate, norm, config.optimizer.max_grad_norm, "Learning rate and gradient norm")


def _throughput(log: _Log) -> str | None:
    if not log.steps:
        return None
    speed, workers = _curve(log.steps, "tokens_per_second"), _curve(log.steps, "workers")
    return curves.throughput(speed, workers, [record["step"] for record in log.restarts], "Tokens a second")


def _results(log: _Log, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row a task: losses at the end, lowest validation loss, share of right answers."""
    answers = log.of("answers")
    rows = []
    for name in names:
        validation = _curve(log.validations, "tasks", name)
        right = _curve(answers, "tasks", name, "exact_match")[1]
        finite = validation[1][np.isfinite(validation[1])]
        rows.append(
            {
                "name": name,
                "training": _end(_curve(log.steps, "tasks", name)),
                "validation": float(finite[-1]) if len(finite) else None,
                "lowest": _lowest(validation),
                "right": float(right[-1]) if len(right) else None,
            }
        )
    return rows


def _tasks(log: _Log, config: FinetuneConfig, tasks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    loss_tokens = sum(counts["loss_tokens"] for counts in tasks.values())
    weights = log.steps[-1]["task_weights"] if log.steps else {}
    weighed = config.loss not in ("token_mean", "sample_mean")
    return [
        {
            **tasks[task.name],
            "name": task.name,
            "share": tasks[task.name]["loss_tokens"] / loss_tokens if loss_tokens else None,
            "weight": weights.get(task.name, task.weight) if weighed else None,
        }
        for task in config.tasks
        if task.name in tasks
    ]


def _checkpoints(log: _Log, kept: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    written = {record["step"]: record for record in log.of("checkpoint")}
    losses = {record["step"]: record["loss"] for record in log.validations}
    best = max((record["step"] for record in log.validations if record["best"]), default=None)
    return [
        {
            "step": one["step"],
            "path": one["path"],
            "size": _bytes(written.get(one["step"], {}).get("bytes")),
            "seconds": written.get(one["step"], {}).get("seconds"),
            "loss": losses.get(one["step"]),
            "best": one["step"] == best,
        }
        for one in sorted(kept, key=lambda one: one["step"])
    ]


def _short(sample: Mapping[str, Any]) -> dict[str, Any]:
    texts = {key: sample[key][:_MOST_CHARACTERS] for key in ("question", "reference", "answer")}
    return {"cut": False, "error": None, **sample, **texts}


# What a reader must not miss


def _notes(log: _Log, config: FinetuneConfig, facts: Mapping[str, Any]) -> list[str]:
    done, total = (log.steps[-1]["step"] if log.steps else 0), facts.get("total_steps")
    notes = []
    if facts.get("status") == "failed":
        notes.append(f"The run failed: {facts.get('error') or 'see the log'}")
    if facts.get("stopped"):
        notes.append(f"Stopped after {number(done)} of {number(total)} steps. {facts['stopped']}")
    return [
        *notes,
        *_loss_notes(log, config),
        *_validation_notes(log, config, facts["tasks"]),
        *_data_notes(config, facts["tasks"]),
        *_running_notes(log, config),
    ]


def _loss_notes(log: _Log, config: FinetuneConfig) -> list[str]:
    notes, (steps, values) = [], _curve(log.steps, "loss")
    broken = steps[~np.isfinite(values)]
    if len(broken):
        many = f"in {number(len(broken))} steps, first in" if len(broken) > 1 else "in"
        notes.append(f"The training loss was not a number {many} step {number(broken[0])}: the training diverged.")
    values = values[np.isfinite(values)]
    part = len(values) // 10
    if part >= 5:
        first, last = values[:part].mean(), values[-part:].mean()
        # Twice the standard error of the difference: below that the change may be chance.
        error = 2 * np.sqrt((values[:part].var() + values[-part:].var()) / part)
        if last > 0.98 * first or first - last < error:
            notes.append(
                f"The training loss has hardly fallen: {first:.3f} over the first tenth of the steps, {last:.3f} over "
                "the last. The learning rate may be too low or too high, or there is little left to learn."
            )
    norms, limit = _curve(log.steps, "grad_norm")[1], config.optimizer.max_grad_norm
    if limit is not None and len(norms) >= 20 and (norms > limit).mean() > 0.9:
        notes.append(
            f"The gradient was clipped to {limit:g} in {percent(float((norms > limit).mean()))} of the steps: the limit, "
            "not the learning rate, sets the size of most steps."
        )
    return notes


def _validation_notes(log: _Log, config: FinetuneConfig, tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not config.split.validation:
        return ["Nothing is held out for validation (split.validation: 0): overfitting cannot be seen here."]
    notes = []
    without = [name for name, counts in tasks.items() if not counts["validation"]]
    if without:
        notes.append(f"No validation example of {_listed(without)}: overfitting on it cannot be seen here.")
    if _risen(_curve(log.validations, "loss"), 1.01):
        steps, values = _curve(log.validations, "loss")
        lowest = _lowest((steps, values))
        assert lowest
        notes.append(
            f"Overfitting: the validation loss was lowest at step {number(lowest[0])} ({lowest[1]:.3f}) and has risen "
            f"since, to {values[np.isfinite(values)][-1]:.3f}. Prefer the checkpoint of the lowest validation loss."
        )
    risen = [name for name in tasks if _risen(_curve(log.validations, "tasks", name), 1.03)]
    if risen and len(tasks) > 1:
        notes.append(f"The validation loss of {_listed(risen)} is more than 3% above its lowest.")
    return notes


def _risen(curve: Curve, factor: float) -> bool:
    """Whether the last two values are both above the lowest by `factor`."""
    values = curve[1][np.isfinite(curve[1])]
    return len(values) >= 3 and bool((values[-2:] > factor * values.min()).all())


def _data_notes(config: FinetuneConfig, tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = []
    loss_tokens = sum(counts["loss_tokens"] for counts in tasks.values())
    for name, counts in tasks.items():
        share = counts["loss_tokens"] / max(1, loss_tokens)
        if len(tasks) > 1 and share >= (0.8 if len(tasks) == 2 else 0.5):
            effect = {
                "token_mean": "and with loss: token_mean as much of the loss.",
                "sample_mean": "though loss: sample_mean counts examples.",
            }.get(config.loss, f"though loss: {config.loss} gives every task its own weight.")
            notes.append(f"{name} has {percent(share)} of all tokens that carry loss, {effect}")
    for what, key, text in (
        ("train", "truncated", "of the examples of {} were truncated to max_length."),
        ("rows_in", "dropped", "of the rows of {} were dropped as too long."),
        ("rows_in", "quarantined", "of the rows of {} are in quarantine: see quarantine.jsonl."),
    ):
        for name, counts in tasks.items():
            of = counts["train"] + counts["validation"] if what == "train" else counts[what]
            if counts[key] > 0.05 * of:
                notes.append(f"{percent(counts[key] / max(1, of))} {text.format(name)}")
    return notes


def _running_notes(log: _Log, config: FinetuneConfig) -> list[str]:
    notes = []
    if log.restarts:
        places = _listed([f"step {number(record['step'])}" for record in log.restarts])
        notes.append(
            f"Training was interrupted and went on from a checkpoint at {places}. Each step counts once here; time "
            "spent on steps that were lost does not."
        )
    if log.steps:
        tokens = np.array([record["tokens"] for record in log.steps], np.float64)
        used = 1 - np.array([record["padding"] for record in log.steps], np.float64)
        padding = 1 - tokens.sum() / max(1.0, (tokens / np.maximum(used, 1e-9)).sum())
        if padding > 0.2 and not config.packing:
            notes.append(f"{percent(float(padding))} of the computed positions were padding: packing: true saves that.")
    return notes


def _listed(names: Sequence[str], most: int = 6) -> str:
    shown = list(names[:most]) + ([f"{len(names) - most} more"] if len(names) > most else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"

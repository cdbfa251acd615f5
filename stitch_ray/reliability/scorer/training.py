"""The scorer's encoder: a sequence classifier trained with the loop of `finetune`, on labelled answers.

Nothing here is a second loop: the answers become token data with labels, the settings those of a `finetune` job, and
`stitch_ray.training` does the rest (plan of steps, ZeRO, checkpoints, restarts, early stopping, metrics.jsonl).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.config.train_scorer import TrainScorerConfig
from stitch_ray.errors import UserError
from stitch_ray.reliability.scorer.train_data import TrainingRow, prepare
from stitch_ray.runs import Progress, Step
from stitch_ray.training.dataset import TokenDataset
from stitch_ray.training.job import METRICS, TRAIN, ClassifierHead, Outcome, WorkerJob, run_plan
from stitch_ray.training.launch import launch
from stitch_ray.training.metrics import MetricsLog
from stitch_ray.training.watch import OnRecord, watching

__all__ = ["EncoderOutcome", "TrainingRow", "check_encoder", "finetune_config", "train_encoder"]

CALL_LOG_VARIABLE = "STITCH_RAY_CALL_LOG"
"""As in `finetune`: names a file to which every worker appends `step, slot, answer ids`."""

_TOKENS_IN_A_FORWARD = {"cpu": 4096, "gpu": 16384}
"""At most, padding included, so that what a forward needs of memory does not grow with `training.batch`. As few forwards
as this allows: every one of them ends in a pass over all gradients."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderOutcome:
    """A trained encoder. `model` is its folder and holds the weights of `step`; `best_step` has the lowest validation loss.

    `status`: finished or stopped_early, after `steps` of `total_steps`. `seconds`: in steps, over all commands and
    restarts; `restarts`: how often training went on from a checkpoint. `weights`: of the loss of a right and of a wrong
    answer. `notes`: what a reader of the report should know.
    """

    model: Path
    parameters: int
    loss: str
    trained: str
    status: str
    step: int
    steps: int
    total_steps: int
    best_step: int | None
    best_loss: float | None
    answers: int
    validation_answers: int
    weights: Mapping[str, float]
    tokens: int
    seconds: float
    restarts: int
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """For a manifest: JSON values."""
        return {**asdict(self), "model": self.model.name, "notes": list(self.notes)}

    def report_facts(self, folder: Path) -> dict[str, Any]:
        """For the report: the facts, and the records of `metrics.jsonl` in the run folder."""
        return {**self.facts(), "path": self.model.name, "records": MetricsLog.read(folder / METRICS)}


def train_encoder(
    config: TrainScorerConfig,
    rows: Sequence[TrainingRow],
    folder: Path,
    *,
    progress: Progress = lambda step: None,
    write_report: Callable[[], None] = lambda: None,
    on_record: OnRecord = lambda record: None,
) -> EncoderOutcome:
    """Train `config.encoder` on `rows` in the run folder, and export it to `model/` there. Needs a Ray session.

    Goes on from the newest valid checkpoint; what is finished is not trained again. That the folder belongs to `config`
    and `rows` is for the caller to see to. A share of the questions, decided by hash, is held out for validation; with
    early stopping the checkpoint that is best on it is exported, else the last. The order of `rows` changes nothing, and
    the number of workers no more than the rounding of sums, as long as it divides the batch into the same forwards.

    Raises UserError for what only the user can change, FloatingPointError for a loss that is not finite, RuntimeError
    when more workers were lost than `resources.max_failures` or a checkpoint is damaged.
    """
    assert config.encoder is not None, "there is no encoder to train"
    encoder, training, folder = config.encoder, config.training, Path(folder).absolute()
    head = ClassifierHead(training.loss, encoder.train)
    longest = max((len(row.ids) for row in rows), default=0)
    parameters = check_encoder(config, longest)
    settings = finetune_config(config, longest)
    data = folder / "work" / "data"
    facts = prepare(data, rows, config.training)
    plan_data = TokenDataset.open(data / TRAIN)
    total_steps = run_plan(settings, plan_data.lengths, plan_data.task_ids).total_steps

    outcome = Outcome.read(folder)
    if outcome is None:
        progress(Step(stage="training", done=0, total=total_steps, unit="steps"))
        job = WorkerJob(
            config=settings,
            folder=folder,
            data=data,
            classifier=head,
            step_log=os.environ.get(CALL_LOG_VARIABLE),
        )
        with watching(
            folder, progress=progress, total_steps=total_steps, write_report=write_report, on_record=on_record
        ):
            outcome = launch(job)
        if outcome.status == "not_finite":
            raise outcome.not_finite("training.learning_rate")
        outcome.write(folder)
    step = outcome.model_step(settings)
    _export(config, head, folder, step, outcome, sorted({row.group_id for row in rows}))

    records = MetricsLog.read(folder / METRICS)
    steps = [record for record in records if record["kind"] == "step"]
    warnings = {text for record in records for text in record.get("warnings", ())}
    return EncoderOutcome(
        model=folder / "model",
        parameters=parameters,
        loss=training.loss,
        trained=encoder.train,
        status=outcome.status,
        step=step,
        steps=outcome.step,
        total_steps=outcome.total_steps,
        best_step=outcome.best_step,
        best_loss=outcome.best_loss,
        answers=facts["answers"],
        validation_answers=facts["validation_answers"],
        weights=facts["weights"],
        tokens=sum(record["tokens"] for record in steps),
        seconds=sum(record["seconds"] for record in steps),
        restarts=sum(record["kind"] == "start" and record["resumed_from"] is not None for record in records),
        notes=(*facts["notes"], *sorted(warnings)),
    )


def check_encoder(config: TrainScorerConfig, longest: int) -> int:
    """Parameters of the encoder. Raises UserError if it is no classifier, or inputs of `longest` tokens are too long."""
    from stitch_ray.training.classifier import check_classifier

    assert config.encoder is not None
    return check_classifier(config.encoder.path, longest, trust_remote_code=config.encoder.trust_remote_code)


def finetune_config(config: TrainScorerConfig, longest: int | None = None) -> FinetuneConfig:
    """The settings of the training loop. A step is `training.batch` answers, in forwards of a size that divides it.

    `longest`: tokens of the longest input; default: `encoder.max_length`.
    Raises UserError for a batch that the workers cannot share evenly.
    """
    encoder, training = config.encoder, config.training
    assert encoder is not None
    if training.batch % training.workers:
        raise UserError(
            f"training.batch: {training.batch} answers cannot be shared evenly by {training.workers} workers; "
            f"set it to {training.workers * (training.batch // training.workers + 1)}"
        )
    share = training.batch // training.workers
    most = _TOKENS_IN_A_FORWARD["gpu" if training.resources.num_gpus else "cpu"] // max(
        1, longest or encoder.max_length
    )
    examples = max(size for size in range(1, min(max(1, most), share) + 1) if share % size == 0)
    every = {"every": training.eval_every}
    stopping = training.early_stopping
    return FinetuneConfig.model_validate(
        {
            "model": {
                "path": encoder.path,
                "dtype": encoder.dtype,
                "trust_remote_code": encoder.trust_remote_code,
            },
            "tasks": [{"name": "answers", "data": "none"}],
            "loss": "token_mean",
            "packing": False,
            "max_length": encoder.max_length,
            "batch": {"examples": examples, "accumulation": share // examples},
            "epochs": training.epochs,
            "optimizer": {
                "learning_rate": training.learning_rate,
                "schedule": "linear",
                "warmup": training.warmup,
                "weight_decay": training.weight_decay,
            },
            "workers": training.workers,
            "resources": training.resources.model_dump(),
            "split": {"validation": training.validation},
            "checkpoint": every,
            "eval": every,
            "early_stopping": None if stopping is None else stopping.model_dump(),
            "seed": config.seed,
        }
    )


def _export(
    config: TrainScorerConfig,
    head: ClassifierHead,
    folder: Path,
    step: int,
    outcome: Outcome,
    groups: Sequence[str],
) -> None:
    """Write `model/` on a node of the cluster, unless it is there already. RuntimeError for a damaged checkpoint."""
    import ray

    from stitch_ray.training.export import NOTE

    note = folder / "model" / NOTE
    if note.exists() and json.loads(note.read_text("utf-8"))["trained"].get("step") == step:
        return
    checkpoint = outcome.checkpoint(folder, step)
    for leftover in folder.glob(".model.*"):  # of a command that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    card: dict[str, Any] = {"step": step, "steps": outcome.total_steps, "status": outcome.status}
    if step == outcome.best_step:
        card["validation loss"] = outcome.best_loss
    ray.get(ray.remote(num_cpus=1)(_write_model).remote(config, head, checkpoint, folder / "model", card, groups))


def _write_model(
    config: TrainScorerConfig,
    head: ClassifierHead,
    checkpoint: Path,
    out: Path,
    card: Mapping[str, Any],
    groups: Sequence[str],
) -> None:
    from stitch_ray.training.classifier import export_classifier
    from stitch_ray.training.state import read_weights

    assert config.encoder is not None
    export_classifier(
        config.encoder.path,
        head,
        read_weights(checkpoint),
        out,
        card=card,
        trained_on=groups,
        trust_remote_code=config.encoder.trust_remote_code,
    )

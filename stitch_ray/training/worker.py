"""The training loop of one worker, readable from top to bottom. It needs a process group, but neither Ray nor a driver.

Every worker computes the same plan of steps from the data and takes its share of every step's micro-batches. Losses are
normalised over the whole step, torch is seeded for every micro-batch, and the learning rate is a function of the step:
so what a step does depends neither on the number of workers nor on what ran before, and the state of a run is its
weights, the optimizer's moments, and a few numbers.
"""

from __future__ import annotations

import hashlib
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.engines.rating import plain_beyond
from stitch_ray.errors import UserError
from stitch_ray.training import attention, checkpoints, state, zero
from stitch_ray.training.adapters import add_adapter, load_base
from stitch_ray.training.classifier import load_classifier
from stitch_ray.training.dataset import TokenDataset
from stitch_ray.training.forward import ClassifierForward, Forward
from stitch_ray.training.job import (
    CHECKPOINTS,
    METRICS,
    TRAIN,
    VALIDATION,
    ClassifierHead,
    Outcome,
    WorkerJob,
    run_plan,
)
from stitch_ray.training.losses import LossTotals, multitask_loss, task_losses
from stitch_ray.training.metrics import MetricsLog, flops_per_token, peak_flops
from stitch_ray.training.plan import Step
from stitch_ray.training.schedule import learning_rate
from stitch_ray.training.validation import Validation
from stitch_ray.training.weighing import TaskWeigher

Report = Callable[[Mapping[str, Any]], None]


@dataclass(slots=True)
class Progress:
    """The part of a checkpoint that is not tensors. `stalled` counts validations without a new best."""

    step: int = 0
    tokens: int = 0
    best_step: int | None = None
    best_loss: float | None = None
    stalled: int = 0
    weigher: dict[str, Any] = field(default_factory=dict)


class Worker:
    """One of `world_size` processes that train together. All of them call every method at the same time.

    `report` is called after every checkpoint. Raises UserError for what only the user can change.
    """

    def __init__(self, job: WorkerJob, report: Report = lambda metrics: None) -> None:
        config = job.config
        self.job, self.config, self.report = job, config, report
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        gpu = bool(config.resources.num_gpus)
        self.device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
        if not gpu:
            torch.set_num_threads(config.resources.num_threads)
        torch.manual_seed(config.seed)

        self.data = TokenDataset.open(job.data / TRAIN)
        self.plan = run_plan(config, self.data.lengths, self.data.task_ids)
        model, self.notes = _build_model(job, self.device)
        self.flops_per_token = _flops_per_token(model, self.data)
        self.peak_flops = peak_flops(torch.cuda.get_device_name(self.device)) if gpu else None
        self.rounds = -(-config.micro_batches // self.world_size)
        self.engine = zero.engine(
            model, config, world_size=self.world_size, micro_batches_per_worker=self.rounds, device=self.device
        )
        self.forward: Forward | ClassifierForward
        if job.classifier:
            self.forward = ClassifierForward(model, loss=job.classifier.loss, device=self.device)
        else:
            self.forward = Forward(model, packing=config.packing, device=self.device)
        held_out = TokenDataset.open(job.data / VALIDATION)
        self.validation = Validation(held_out, config, self.forward, self.device)
        self.weigher = TaskWeigher(config, self.validation)
        self.log = MetricsLog(job.folder / METRICS) if self.rank == 0 else None
        self.progress = Progress()

    def train(self) -> Outcome:
        """From the newest valid checkpoint, if there is one, to the end."""
        self._resume()
        self.engine.train()
        while self.progress.step < self.plan.total_steps and not self._stalled():
            offending = self._train_step(self.progress.step)
            if offending:
                return self._outcome("not_finite", offending)
            self._validate_and_save()
        return self._outcome("finished" if self.progress.step == self.plan.total_steps else "stopped_early")

    def _train_step(self, number: int) -> tuple[str, ...]:
        """One optimizer step. Returns the ids of the examples whose loss or gradient is not finite: none, normally."""
        started = time.perf_counter()
        config, num_tasks = self.config, len(self.config.tasks)
        step = self.plan.step(number)
        self._audit(number, step)
        totals = _totals(step, self.data, num_tasks)
        task_weights = self.weigher.weights(self.engine, number)

        # Losses and weights of the tasks, the step's loss, how many shares of it are not finite, computed positions.
        sums = torch.zeros(2 * num_tasks + 3, dtype=torch.float64, device=self.device)
        suspects = []
        for turn in range(self.rounds):
            slot = turn * self.world_size + self.rank
            rows = step[slot] if slot < len(step) else ()
            _seed(config.seed, number, slot)
            found = self.forward(self.engine, self.data, rows)
            share = multitask_loss(
                found.losses,
                found.weights,
                found.task_ids,
                task_weights,
                config.loss,
                example_ids=found.example_ids,
                totals=totals,
            )
            zero.backward(self.engine, share)
            by_task = task_losses(found.losses.detach(), found.weights, found.task_ids, num_tasks)
            wrong = ~torch.isfinite(share.detach())
            sums += torch.cat(
                [*by_task, share.detach()[None], wrong[None], sums.new_tensor([found.positions])]
            ).double()
            suspects.append((rows, wrong))
        dist.all_reduce(sums)
        loss, not_finite, positions = sums[-3:].tolist()
        if not_finite:
            return self._ids_of([rows for rows, wrong in suspects if wrong])
        rate = learning_rate(number, self.plan.total_steps, config.optimizer)
        try:
            norm = zero.step(self.engine, rate)
        except FloatingPointError:
            return self._ids_of([rows for rows, _ in suspects])

        self.progress.step += 1
        tokens = sum(int(self.data.lengths[row]) for rows in step for row in rows)
        self.progress.tokens += tokens
        if self.log:
            seconds = time.perf_counter() - started
            record = {
                "kind": "step",
                "step": self.progress.step,
                "epoch": round(self.plan.epoch(number), 4),
                "loss": loss,
                "tasks": self._by_task(sums[:num_tasks] / sums[num_tasks : 2 * num_tasks]),
                "task_weights": self._by_task(task_weights),
                "lr": rate,
                "grad_norm": norm,
                "tokens": tokens,
                "loss_tokens": float(totals.weights.sum()),
                "tokens_per_second": tokens / seconds,
                "seconds": seconds,
                "peak_memory_mb": _peak_memory_mb(self.device),
                "workers": self.world_size,
                "padding": 1 - tokens / positions,
            }
            if self.peak_flops:
                record["mfu"] = tokens / seconds * self.flops_per_token / (self.world_size * self.peak_flops)
            self.log.append(record)
        return ()

    def _stalled(self) -> bool:
        """Whether training is to stop early."""
        stopping = self.config.early_stopping
        return stopping is not None and self.progress.stalled >= stopping.patience

    def _validate_and_save(self) -> None:
        """What is due after a step."""
        config, progress = self.config, self.progress
        last = progress.step == self.plan.total_steps
        best = False
        if len(self.validation) and (last or progress.step % config.eval.every == 0):
            found = self.validation.loss(self.engine)
            margin = config.early_stopping.min_delta if config.early_stopping else 0.0
            best = progress.best_loss is None or found.loss < progress.best_loss - margin
            progress.stalled = 0 if best else progress.stalled + 1
            if best:
                progress.best_loss, progress.best_step = found.loss, progress.step
            if self.log:
                self.log.append(
                    {
                        "kind": "validation",
                        "step": progress.step,
                        "loss": found.loss,
                        "tasks": self._by_task(found.tasks),
                        "examples": found.examples,
                        **({} if self.job.classifier else {"perplexity": _exp(found.loss)}),
                        "best": best,
                    }
                )
        if best or last or self._stalled() or progress.step % config.checkpoint.every == 0:
            self._save()

    def _save(self) -> None:
        started = time.perf_counter()
        root, progress = self.job.folder / CHECKPOINTS, self.progress
        progress.weigher = self.weigher.state_dict()
        building = root / checkpoints.building_name(progress.step)
        if self.rank == 0:
            checkpoints.begin(root, progress.step)
        dist.barrier()
        names = state.save_state(self.engine, building, self.rank, self.world_size)
        written = checkpoints.describe(building, names)
        everything: list[dict[str, Any] | None] = [None] * self.world_size
        dist.all_gather_object(everything, written)
        if self.rank == 0:
            files = {name: facts for part in everything for name, facts in (part or {}).items()}
            checkpoints.commit(root, progress.step, files, asdict(progress))
            checkpoints.prune(root, self.config.checkpoint.keep, progress.best_step)
            size = sum(facts["bytes"] for facts in files.values())
            assert self.log is not None
            self.log.append(
                {"kind": "checkpoint", "step": progress.step, "seconds": time.perf_counter() - started, "bytes": size}
            )
        dist.barrier()
        self.report({"step": progress.step, "tokens": progress.tokens, "best_loss": progress.best_loss})

    def _resume(self) -> None:
        root = self.job.folder / CHECKPOINTS
        # One worker reads and checks; the others are told.
        found: list[Any] = [None]
        warnings = list(self.notes)
        if self.rank == 0:
            latest = checkpoints.latest_valid(root, warnings.append)
            found = [(str(latest.path), latest.progress) if latest else None]
        dist.broadcast_object_list(found)
        step = None
        if found[0]:
            path, values = found[0]
            state.load_state(self.engine, Path(path))
            self.progress = Progress(**values)
            step = self.progress.step
            self.weigher.load_state_dict(self.progress.weigher)
        if self.log:
            self.log.truncate_after(self.progress.step)
            # Also for the driver to show: what a worker prints stays on its node.
            for text in warnings:
                print(f"warning: {text}", file=sys.stderr, flush=True)
            record = {"workers": self.world_size, "resumed_from": step, **({"warnings": warnings} if warnings else {})}
            self.log.append({"kind": "start", "step": self.progress.step, **record})
        if step is None:
            self.weigher.start(self.engine)

    def _audit(self, number: int, step: Step) -> None:
        if self.job.step_log:
            lines = []
            for slot in range(self.rank, len(step), self.world_size):
                lines.append(f"{number}\t{slot}\t{','.join(self.data.example_ids[row] for row in step[slot])}\n")
            with open(self.job.step_log, "a", encoding="utf-8") as log:
                log.write("".join(lines))

    def _ids_of(self, micro_batches: list[Any]) -> tuple[str, ...]:
        """Ids of the examples in these micro-batches of all workers."""
        mine = [self.data.example_ids[row] for rows in micro_batches for row in rows]
        everybody: list[list[str] | None] = [None] * self.world_size
        dist.all_gather_object(everybody, mine)
        return tuple(name for names in everybody for name in names or ())

    def _by_task(self, values: Any) -> dict[str, float]:
        """Task name -> value, without those of tasks that were not there (NaN)."""
        numbers = [float(value) for value in values]
        names = [task.name for task in self.config.tasks]
        return {name: value for name, value in zip(names, numbers, strict=True) if not math.isnan(value)}

    def _outcome(self, status: Any, examples: tuple[str, ...] = ()) -> Outcome:
        return Outcome(
            status=status,
            step=self.progress.step,
            total_steps=self.plan.total_steps,
            best_step=self.progress.best_step,
            best_loss=self.progress.best_loss,
            examples=examples,
        )


def _build_model(job: WorkerJob, device: torch.device) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The model to train, in training mode, the same on every worker, and what the log should say about it."""
    config = job.config
    notes: tuple[str, ...] = ()
    model: Any
    if job.classifier:
        assert config.method == "full", "a classifier is trained whole"
        assert not config.packing, "a classifier reads one sequence a row"
        trust = config.model.trust_remote_code
        model, notes = load_classifier(config.model.path, job.classifier, seed=config.seed, trust_remote_code=trust)
        model.to(device)
    else:
        model = load_base(config.model, config.method, device)
    if config.packing:
        longest = plain_beyond(model)
        if config.max_length > longest:
            raise UserError(
                f"packing: {config.model.path} treats sequences beyond {longest} tokens in another way, which depends on "
                f"what else is in the row; set max_length: {longest}, or packing: false"
            )
        attention.register()
        reason = attention.check_isolation(model)
        if reason:
            raise UserError(f"packing: {config.model.path} cannot be packed ({reason}); set packing: false")
        model.set_attn_implementation(attention.IMPLEMENTATION)
    if config.method != "full":
        model = add_adapter(model, config.adapter, seed=config.seed)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train(), notes


def _flops_per_token(model: Any, data: TokenDataset) -> float:
    text = model.config.get_text_config()
    embeddings = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embeddings
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lengths = data.lengths.astype(np.float64)
    return flops_per_token(
        parameters if tied else parameters - embeddings.numel(),
        num_trainable=sum(p.numel() for p in model.parameters() if p.requires_grad and (tied or p is not embeddings)),
        num_layers=text.num_hidden_layers,
        width=text.hidden_size,
        length=float((lengths**2).sum() / lengths.sum()),
    )


def _totals(step: Step, data: TokenDataset, num_tasks: int) -> LossTotals:
    """Denominators of the whole step, known before its first forward because the plan and the data are."""
    weights, examples = torch.zeros(2, num_tasks, dtype=torch.float64)
    for rows in step:
        for row in rows:
            weights[data.task_ids[row]] += data.loss_weights[row]
            examples[data.task_ids[row]] += data.loss_weights[row] > 0
    return LossTotals(weights, examples)


def _seed(seed: int, step: int, slot: int) -> None:
    """What is random in a micro-batch (dropout) depends on which one it is, not on who computes it or when."""
    digest = hashlib.sha256(f"{seed}/{step}/{slot}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _peak_memory_mb(device: torch.device) -> float:
    """Of the GPU, or of the whole process on a CPU, since the start."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def main() -> None:
    """`torchrun -m stitch_ray.training.worker JOB.json`: the same loop under another launcher."""
    import json

    values = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    job = WorkerJob(
        config=FinetuneConfig.model_validate(values["config"]),
        folder=Path(values["folder"]),
        data=Path(values["data"]),
        classifier=ClassifierHead(**values["classifier"]) if "classifier" in values else None,
    )
    dist.init_process_group("nccl" if job.config.resources.num_gpus else "gloo")
    if job.config.resources.num_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    outcome = Worker(job).train()
    if dist.get_rank() == 0:
        print(json.dumps(asdict(outcome)))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

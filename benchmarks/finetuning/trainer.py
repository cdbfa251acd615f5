"""The same model and examples in Hugging Face's Trainer. As a program: one run of it.

python -m benchmarks.finetuning.trainer RUN.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetuning import workload
from benchmarks.finetuning.workload import encoded, job, listed, log_line, make_model, prepare, steps_of
from benchmarks.harness import median, table
from stitch_ray.records import Example
from stitch_ray.training.dataset import TokenDataset
from stitch_ray.training.job import TRAIN

BATCH = 8
_SKIP = 2
_LEARNING_RATE = 2e-5


def compare(
    folder: Path, source: str, data: Sequence[Example], *, repeats: int, count: int, threads: int
) -> tuple[str, dict[str, Any]]:
    """Useful tokens a second of whole optimizer steps, one process on each side."""
    model = folder / "llama"
    if not model.exists():
        make_model(model, data)
    records = encoded(data, model, max_length=1024)[:count]
    prepared = prepare(folder / "trainer" / "data", records)
    tokens = sum(len(record.ids) for record in records)
    rates: dict[str, list[float]] = {"ours, one worker": [], "Trainer, random": [], "Trainer, group_by_length": []}
    memory: dict[str, list[float]] = {name: [] for name in rates}
    for repeat in range(repeats):
        for number, (name, of_side) in enumerate(rates.items()):
            run = folder / "trainer" / f"{repeat}-{number}"
            if name.startswith("ours"):
                settings = {
                    "max_length": 1024,
                    "batch": {"tokens": 1024, "accumulation": 2},
                    "resources": {"num_threads": threads},
                    "optimizer": {"learning_rate": _LEARNING_RATE, "schedule": "constant", "warmup": 0},
                }
                path = job(run, prepared, model, **settings)
                command = workload.torchrun(1, "stitch_ray.training.worker", str(path))
                workload.run(command, threads=threads, log=run / "log.txt")
                steps = steps_of(run)
                memory[name].append(steps[-1]["peak_memory_mb"])
            else:
                run.mkdir(parents=True)
                wanted = {"model": str(model), "data": str(prepared), "out": str(run), "threads": threads}
                path = run / "run.json"
                path.write_text(json.dumps({**wanted, "group": "group" in name}), "utf-8")
                workload.run(
                    [sys.executable, "-m", "benchmarks.finetuning.trainer", str(path)],
                    threads=threads,
                    log=run / "log.txt",
                )
                found = json.loads((run / "steps.json").read_text("utf-8"))
                steps = found["steps"]
                memory[name].append(found["peak_memory_mb"])
            assert sum(step["tokens"] for step in steps) == tokens, "a side has not seen every example once"
            of_side.append(workload.steady_rate(steps, _SKIP))
            log_line(f"{repeat + 1}/{repeats} {name}: {of_side[-1]:,.0f} tokens/s, {len(steps)} steps")
    medians = {name: median(values) for name, values in rates.items()}
    ours = medians["ours, one worker"]
    lines = [
        {
            "side": name,
            "useful tokens/s, every repetition": listed(values),
            "median": f"{medians[name]:,.0f}",
            "ours is": f"{ours / medians[name]:.2f} x",
            "peak RSS, MB": f"{median(memory[name]):,.0f}",
        }
        for name, values in rates.items()
    ]
    note = (
        f"{count} examples of {source} once, {tokens:,} tokens, float32, {threads} threads, one process, AdamW (fused), "
        f"clipping at 1. Ours: 2 packed rows of 1,024 tokens a step; Trainer: {BATCH} examples a step, the same number "
        f"of tokens on average. Whole optimizer steps, without the first {_SKIP}."
    )
    return f"{table(lines)}\n\n{note}", {"rates": rates, "peak_memory_mb": memory}


class _Examples(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, data: TokenDataset) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, row: int) -> dict[str, Any]:
        ids, weights = (torch.from_numpy(part.copy()) for part in self._data.tokens(row))
        return {"input_ids": ids.long(), "labels": torch.where(weights > 0, ids, -100).long()}


def main() -> None:
    """One epoch; seconds and tokens of every step to steps.json."""
    import resource

    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    wanted = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(wanted["threads"])
    tokens: list[int] = []  # of every batch, in the order of the steps: the loader asks in this order

    def collate(features: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        tokens.append(sum(len(feature["input_ids"]) for feature in features))
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([feature["input_ids"] for feature in features], batch_first=True)
        mask = pad([torch.ones_like(feature["input_ids"]) for feature in features], batch_first=True)
        labels = pad([feature["labels"] for feature in features], batch_first=True, padding_value=-100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    clock = Clock()
    arguments = TrainingArguments(
        output_dir=wanted["out"],
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=_LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        train_sampling_strategy="group_by_length" if wanted["group"] else "random",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model=AutoModelForCausalLM.from_pretrained(wanted["model"], dtype=torch.float32),
        args=arguments,
        train_dataset=_Examples(TokenDataset.open(Path(wanted["data"]) / TRAIN)),
        data_collator=collate,
        callbacks=[clock],
    )
    trainer.train()
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    steps = [{"tokens": n, "seconds": s} for n, s in zip(tokens, seconds, strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    (Path(wanted["out"]) / "steps.json").write_text(json.dumps({"steps": steps, "peak_memory_mb": peak}), "utf-8")


if __name__ == "__main__":
    main()

"""What all sections train on: real instruction data, a small random Llama, and jobs prepared without Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.selection import corpus
from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.data.quarantine import BadRow
from stitch_ray.engines.pretrained import load_tokenizer
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.records import Example
from stitch_ray.training import dataset
from stitch_ray.training.encode import Encoded, Overlong, encode
from stitch_ray.training.job import METRICS, TRAIN, VALIDATION, WorkerJob
from stitch_ray.training.metrics import MetricsLog
from stitch_ray.training.objectives import objective
from stitch_ray.training.tiny import train_tokenizer

VOCABULARY = 4096
_CHECKOUT = Path(__file__).parents[2]


def examples() -> tuple[str, list[Example]]:
    """Where the data is from, and all its examples: `alpaca_en_1k`, or a made corpus where that is absent."""
    folder = Path(os.environ.get("STITCH_RAY_DATA", _CHECKOUT / ".." / "shared" / "data"))
    file = folder / "instructions" / "alpaca_en_1k.json"
    found = corpus([str(file)] if file.exists() else [], 1000)
    return (file.name if file.exists() else "a made corpus"), found


def make_model(folder: Path, data: Sequence[Example], *, width: int = 512, inner: int = 1376, layers: int = 8) -> int:
    """A random Llama with heads of 64 and a tokenizer trained on the examples; its number of parameters."""
    import torch

    texts = [turn.content for example in data for turn in example.messages]
    tokenizer = train_tokenizer(texts, vocab_size=VOCABULARY, max_length=2048)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def encoded(data: Sequence[Example], model: Path, *, max_length: int) -> list[Encoded]:
    """The examples as `finetune` sees them, in an order drawn once. What does not fit is cut, as by default."""
    tokenizer = load_tokenizer(str(model))
    template = ChatTemplate.resolve("chat", tokenizer)
    found = []
    for example in data:
        for rendered in objective("sft").render(example, Random(0)):
            try:
                found.append(encode(rendered, tokenizer, template, max_length, "truncate"))
            except (BadRow, Overlong):
                continue
    Random(0).shuffle(found)
    return found


def write_dataset(path: Path, records: Sequence[Encoded]) -> dataset.TokenDataset:
    """Records of one task as the file that workers map."""
    dataset.write(path, [dataset.table([(record, 0, f"example-{i}") for i, record in enumerate(records)])])
    return dataset.TokenDataset.open(path)


def job(folder: Path, data: Path, model: Path, **settings: Any) -> Path:
    """Write JOB.json for a run in `folder` on the records in `data`; nothing is validated or saved before the end."""
    never = {"every": 10**6}
    values = {
        "model": {"path": str(model)},
        "tasks": [{"name": "chat", "data": "none"}],
        "checkpoint": never,
        "eval": never,
        **settings,
    }
    config = FinetuneConfig.model_validate(values)
    folder.mkdir(parents=True)
    path = folder / "job.json"
    path.write_text(
        json.dumps({"config": config.model_dump(mode="json"), "folder": str(folder), "data": str(data)}), "utf-8"
    )
    return path


def read_job(path: Path) -> WorkerJob:
    values = json.loads(path.read_text("utf-8"))
    return WorkerJob(
        config=FinetuneConfig.model_validate(values["config"]), folder=Path(values["folder"]), data=Path(values["data"])
    )


def prepare(folder: Path, records: Sequence[Encoded]) -> Path:
    """A folder of prepared data without a validation split."""
    folder.mkdir(parents=True)
    write_dataset(folder / TRAIN, records)
    write_dataset(folder / VALIDATION, [])
    return folder


def torchrun(workers: int, module: str, *arguments: str) -> list[str]:
    """The command that starts `module` on so many workers of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    return [*launcher, "-m", module, *arguments]


def run(command: Sequence[str], *, threads: int, log: Path) -> float:
    """Run a program to its end; its seconds. Raises RuntimeError with the end of its output if it fails."""
    environment: Mapping[str, str] = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "DS_ACCELERATOR": "cpu",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": str(_CHECKOUT),
    }
    started = time.perf_counter()
    with log.open("wb") as stream:
        done = subprocess.run(command, env=environment, stdout=stream, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text('utf-8', 'replace')[-3000:]}")
    return time.perf_counter() - started


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The step records of a run."""
    return [record for record in MetricsLog.read(folder / METRICS) if record["kind"] == "step"]


def steady_rate(steps: Sequence[Mapping[str, Any]], skip: int) -> float:
    """Tokens a second over all steps but the first `skip`."""
    used = steps[skip:]
    return float(sum(step["tokens"] for step in used) / sum(step["seconds"] for step in used))


def log_line(text: str) -> None:
    """Show one repetition as soon as it is done."""
    print(f"  {text}", file=sys.stderr, flush=True)


def listed(values: Sequence[float], digits: int = 0) -> str:
    """Every repetition, for a cell of a table."""
    return " ".join(f"{value:,.{digits}f}" for value in values)


def verdict(ratio: float, bar: float) -> str:
    """A bar and whether it is met, for a sentence."""
    return f"{ratio:.2f} x (bar {bar:g}: {'met' if ratio >= bar else 'MISSED'})"

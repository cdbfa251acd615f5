"""Training on a GPU: models shaped like one of 1B and one of 7B parameters, packed and padded. Needs no Ray.

As a program, one run in a process of its own, so that the next one finds the memory free:
python -m benchmarks.finetuning.gpu SHAPE WAY PACKING DATA OUT STEPS
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.finetuning.workload import encoded, listed, log_line, make_model, prepare
from benchmarks.harness import median, table
from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.records import Example
from stitch_ray.training.dataset import TokenDataset
from stitch_ray.training.job import TRAIN, run_plan

SHAPES: dict[str, dict[str, int]] = {  # TinyLlama 1.1B and Llama 2 7B
    "1B": {"width": 2048, "inner": 5632, "layers": 22, "heads": 32, "kv_heads": 4, "vocabulary": 32000},
    "7B": {"width": 4096, "inner": 11008, "layers": 32, "heads": 32, "kv_heads": 32, "vocabulary": 32000},
    "tiny": {"width": 64, "inner": 128, "layers": 2, "heads": 2, "kv_heads": 2, "vocabulary": 4096},
}
WAYS = ("ZeRO-1", "ZeRO-1, checkpointing", "bfloat16 AdamW")
"""Tried in this order until one fits. ZeRO-1 is what `finetune` runs: bfloat16 weights, float32 masters, moments and
gradients, 18 bytes a parameter. The last keeps everything in bfloat16 (8 bytes): it measures forward and backward
where the masters do not fit, and is no way to train."""

MAX_LENGTH = 2048
_ROW_TOKENS = {"1B": 16384, "7B": 8192, "tiny": 2048}
_SKIP = 2


def compare(
    folder: Path, source: str, data: Sequence[Example], *, repeats: int, shapes: Sequence[str] = ("1B", "7B")
) -> tuple[str, dict[str, Any]]:
    """Tokens a second and MFU of whole optimizer steps, packed and padded."""
    tokenizer = folder / "tokenizer"
    make_model(tokenizer, data, width=64, inner=128, layers=1)
    prepared = prepare(folder / "gpu", encoded(data, tokenizer, max_length=MAX_LENGTH))
    lines, facts = [], {}
    for shape in shapes:
        for packing in ("packed", "padded"):
            found = _first_that_fits(shape, packing, prepared, folder, _SKIP + 4 * repeats)
            if not found:
                lines.append({"shape": shape, "batches": packing, "how": "does not fit"})
                continue
            facts[f"{shape} {packing}"] = found
            log_line(f"{shape} {packing}: {found['rate']:,.0f} tokens/s, MFU {found['mfu']:.1%} ({found['way']})")
            lines.append(
                {
                    "shape": shape,
                    "batches": packing,
                    "how": found["way"],
                    "filled": f"{found['filled']:.3f}",
                    "useful tokens/s": f"{found['rate']:,.0f}",
                    "every step": listed(found["rates"]),
                    "MFU": f"{found['mfu']:.1%}",
                    "peak memory, GB": f"{found['peak_gb']:.1f}",
                }
            )
    columns = max((list(line) for line in lines), key=len)
    note = (
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}, random weights, bfloat16, {source} "
        f"(tokenizer of 4,096 tokens, model vocabulary of 32,000), a micro-batch a step of "
        f"{_ROW_TOKENS['1B']:,} (1B) and {_ROW_TOKENS['7B']:,} (7B) positions. MFU as in metrics.jsonl: PaLM's count over "
        "useful tokens only, recomputed activations not counted. Bar for the packed 7B: 38 %."
    )
    return f"{table([{column: line.get(column, '') for column in columns} for line in lines])}\n\n{note}", facts


def _first_that_fits(shape: str, packing: str, data: Path, folder: Path, steps: int) -> dict[str, Any] | None:
    for way in WAYS:
        out = folder / "gpu-run.json"
        arguments = [shape, way, packing, str(data), str(out), str(steps)]
        environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.finetuning.gpu", *arguments],
            env=environment,
            stderr=subprocess.PIPE,
            check=False,
            text=True,
        )
        if done.returncode == 0:
            return {"way": way, **json.loads(out.read_text("utf-8"))}
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
        log_line(f"{shape} {packing}, {way}: {reason[:200]}")
    return None


def main() -> None:
    """Steps of one model in one way."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from stitch_ray.training import attention, zero
    from stitch_ray.training.forward import Forward
    from stitch_ray.training.losses import multitask_loss
    from stitch_ray.training.metrics import peak_flops
    from stitch_ray.training.worker import _flops_per_token, _totals

    shape, way, packing, folder, out, count = sys.argv[1:]
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    sizes = SHAPES[shape]
    config = FinetuneConfig.model_validate(
        {
            "model": {"path": "none", "dtype": "bfloat16", "gradient_checkpointing": "checkpointing" in way},
            "tasks": [{"name": "chat", "data": "none"}],
            "packing": packing == "packed",
            "max_length": MAX_LENGTH,
            "batch": {"tokens": _ROW_TOKENS[shape]},
            "max_steps": int(count),
            "zero": {"stage": 1},
        }
    )
    torch.manual_seed(0)
    if packing == "packed":
        attention.register()
    layout = LlamaConfig(
        vocab_size=sizes["vocabulary"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["inner"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        max_position_embeddings=MAX_LENGTH,
        attn_implementation=attention.IMPLEMENTATION if packing == "packed" else "sdpa",
        dtype=torch.bfloat16,
    )
    with device:
        model: Any = LlamaForCausalLM(layout).to(torch.bfloat16).train()
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    data = TokenDataset.open(Path(folder) / TRAIN)
    plan = run_plan(config, data.lengths, data.task_ids)
    per_token = _flops_per_token(model, data)
    step_of = _engine(model, config, device) if way.startswith("ZeRO") else _plain(model, zero.adamw, config)
    forward = Forward(model, packing=config.packing, device=device)
    rates, positions, useful = [], 0, 0
    for number in range(plan.total_steps):
        started = time.perf_counter()
        rows = plan.step(number)[0]
        totals = _totals(plan.step(number), data, 1)

        def loss(run: Any, rows: Any = rows, totals: Any = totals) -> torch.Tensor:
            found = forward(run, data, rows)
            return multitask_loss(
                found.losses, found.weights, found.task_ids, example_ids=found.example_ids, totals=totals
            )

        step_of(loss)
        if gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        tokens = int(data.lengths[list(rows)].sum())
        if number >= _SKIP:
            rates.append(tokens / seconds)
            useful += tokens
            positions += tokens if config.packing else len(rows) * int(data.lengths[list(rows)].max())
    rate = median(rates)
    peak = peak_flops(torch.cuda.get_device_name(device)) if gpu else None
    found = {
        "rates": rates,
        "rate": rate,
        "mfu": rate * per_token / peak if peak else float("nan"),
        "filled": useful / positions,
        "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if gpu else float("nan"),
    }
    Path(out).write_text(json.dumps(found), "utf-8")


def _engine(model: Any, config: FinetuneConfig, device: torch.device) -> Any:
    """An optimizer step with DeepSpeed, as the product's worker makes it."""
    import torch.distributed as dist

    from stitch_ray.training import zero

    for variable, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29507", "RANK": "0", "WORLD_SIZE": "1"}.items():
        os.environ.setdefault(variable, value)
    os.environ.setdefault("LOCAL_RANK", "0")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    engine = zero.engine(model, config, world_size=1, micro_batches_per_worker=1, device=device)
    engine.train()

    def step(loss: Any) -> None:
        zero.backward(engine, loss(engine))
        zero.step(engine, config.optimizer.learning_rate)

    return step


def _plain(model: Any, adamw: Any, config: FinetuneConfig) -> Any:
    """An optimizer step in the number format of the weights."""
    optimizer = adamw(model.parameters(), config.optimizer)

    def step(loss: Any) -> None:
        loss(model).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.max_grad_norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main()

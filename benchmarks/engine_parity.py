"""The same ratings through both engines, on every row: largest difference and rank agreement.

    python -m benchmarks.engine_parity [--model FOLDER] [--data FILE]

Needs the vLLM extra. Both engines run in this process, one after the other, in float32.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated

import numpy as np
import typer

from benchmarks.harness import publish, table
from benchmarks.selection import corpus, make_model, scratch
from stitch_ray.config.base import ModelConfig
from stitch_ray.engines.pretrained import context_length, load_model_config, load_tokenizer
from stitch_ray.engines.registry import load_engine
from stitch_ray.prompts import load_prompts
from stitch_ray.records import Example
from stitch_ray.selection.agreement import spearman
from stitch_ray.selection.encode import RatingEncoder
from stitch_ray.selection.layout import Layout, contents
from stitch_ray.selection.rater import rate_bodies
from stitch_ray.selection.scores import sentence_score


def main(
    model: Annotated[str | None, typer.Option(help="model folder; default: the random Llama of the benchmarks")] = None,
    data: Annotated[list[str] | None, typer.Option(help="instruction data; default: a made corpus")] = None,
    rows: Annotated[int, typer.Option(help="most rows")] = 1000,
    name: Annotated[str, typer.Option(help="name of the result files")] = "engine-parity-cpu",
) -> None:
    """Compare the engines on this machine."""
    examples = corpus(data or [], rows)
    if model is None:
        with scratch() as folder:
            make_model(folder / "model", examples)
            compare(str(folder / "model"), examples, name)
    else:
        compare(model, examples, name)


def compare(model: str, examples: Sequence[Example], name: str) -> None:
    """Rate `examples` with both engines and publish how far they agree."""
    every = [content for example in examples for content in contents(example.messages, example.context)]
    prompts = tuple(load_prompts(None, "rating.txt", 5))
    context = context_length(load_model_config(model))
    found, seconds = {}, {}
    for engine in ("transformers", "vllm"):
        loaded = load_engine(ModelConfig(path=model, engine=engine, dtype="float32", num_threads=2))
        for layout in ("prompt_first", "content_first"):
            encoder = RatingEncoder(
                load_tokenizer(model), Layout(layout, prompts), num_ratings=5, max_tokens=context - 1, name=model
            )
            started = time.perf_counter()
            logits, _ = rate_bodies(loaded, encoder, encoder.encode(every))
            seconds[engine, layout] = time.perf_counter() - started
            z = logits.astype(np.float64) - logits.max(-1, keepdims=True)
            found[engine, layout] = z - np.log(np.exp(z).sum(-1, keepdims=True))
        loaded.close()
    lines, facts = [], {}
    for layout in ("prompt_first", "content_first"):
        a, b = found["transformers", layout], found["vllm", layout]
        difference, rank = float(np.abs(a - b).max()), spearman(sentence_score(a), sentence_score(b))
        lines.append(
            {
                "layout": layout,
                "max difference of log-softmax over R": f"{difference:.1e}",
                "Spearman of sentence scores": f"{rank:.6f}",
                "transformers s": f"{seconds['transformers', layout]:.1f}",
                "vllm s": f"{seconds['vllm', layout]:.1f}",
            }
        )
        facts[layout] = {"difference": difference, "spearman": rank}
    note = f"{len(every)} contents x {len(prompts)} prompts. Seconds are of one run each, engine start excluded."
    sections = {"Transformers against vLLM": f"{table(lines)}\n\n{note}"}
    publish(name, "Engine parity", sections, facts, "python -m benchmarks.engine_parity --model FOLDER --data FILE")


if __name__ == "__main__":
    typer.run(main)

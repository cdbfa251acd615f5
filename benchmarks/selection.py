"""Rating instruction data: a naive loop, both layouts, Ray Data, vLLM and the arithmetic floor, side by side.

    python -m benchmarks.selection [--data FILE] [--prompts FILE] [--rows 40] [--ray-rows 1000] [--vllm-rows 200]

The model is a random Llama of 8 layers, width 512 and 4,096 tokens. The naive loop is the reference's call sequence:
one prompt a forward, batch 1, logits of the whole vocabulary at every position. It runs in `torch.inference_mode`,
warmed, with the same dtype and threads, tokenising included on every side.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import interleave, matmul_rate, median, publish, table
from stitch_ray.api import as_config
from stitch_ray.config import SelectConfig
from stitch_ray.data import formats, readers
from stitch_ray.data.quarantine import BadRow
from stitch_ray.data.synthetic import instruction_corpus
from stitch_ray.engines.hf import HfEngine
from stitch_ray.engines.rating import CachedRater
from stitch_ray.prompts import load_prompts
from stitch_ray.ray_session import session
from stitch_ray.records import Example, Turn
from stitch_ray.selection.agreement import spearman
from stitch_ray.selection.encode import RatingEncoder
from stitch_ray.selection.layout import Content, Layout, contents
from stitch_ray.selection.rater import rate_bodies, sequence_lengths
from stitch_ray.selection.scores import sentence_score
from stitch_ray.training.tiny import train_tokenizer

THREADS = 2
RATINGS = 5
BATCH_ROWS = 32


def corpus(data: Sequence[str], rows: int) -> list[Example]:
    """The first usable examples of the files, or of a made corpus."""
    found: list[Example] = []
    if not data:
        made = instruction_corpus(rows)
        return [
            Example(
                messages=(Turn("user", r["instruction"]), Turn("assistant", r["output"])),
                context=r["input"] or None,
                source="made",
                line=i,
                raw="{}",
            )
            for i, r in enumerate(made)
        ]
    for source in readers.expand(data):
        for row in readers.iter_rows(source):
            try:
                found.append(formats.convert(row))
            except BadRow:
                continue
            if len(found) == rows:
                return found
    return found


def make_model(folder: Path, examples: Sequence[Example]) -> None:
    """A random Llama 512 x 8 with a tokenizer of 4,096 tokens trained on the examples."""
    texts = [turn.content for example in examples for turn in example.messages]
    tokenizer = train_tokenizer(texts, vocab_size=4096, max_length=2048)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


class Naive:
    """The reference's loop."""

    def __init__(self, folder: Path, encoder: RatingEncoder, dtype: torch.dtype) -> None:
        from stitch_ray.engines.pretrained import load_tokenizer

        self._tokenizer = load_tokenizer(str(folder))
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self._ids = list(encoder.rating_ids)

    def rate(self, rows: Sequence[Content], layout: Layout) -> np.ndarray:
        out = np.empty((len(rows), len(layout.prompts), RATINGS), np.float32)
        with torch.inference_mode():
            for i, content in enumerate(rows):
                for k in range(len(layout.prompts)):
                    inputs = self._tokenizer(layout.whole(content.text, k), return_tensors="pt")
                    logits = self._model(**inputs).logits
                    out[i, k] = logits[0, -1, self._ids].float()
        return out


class Ours:
    """The engine in a plain loop over batches, without Ray."""

    def __init__(self, folder: Path, layout: Layout, dtype: str, path: str = "documents") -> None:
        from stitch_ray.engines.pretrained import load_tokenizer

        self._engine: Any = HfEngine(str(folder), dtype=dtype, num_threads=THREADS, device="cpu")
        if path == "cached":
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
            self._engine = CachedRater(model, self._engine.batch_tokens)
        self.encoder = RatingEncoder(
            load_tokenizer(str(folder)), layout, num_ratings=RATINGS, max_tokens=2048, name="bench"
        )

    def rate(self, rows: Sequence[Content]) -> np.ndarray:
        parts = []
        for start in range(0, len(rows), BATCH_ROWS):
            bodies = self.encoder.encode(rows[start : start + BATCH_ROWS])
            parts.append(rate_bodies(self._engine, self.encoder, bodies)[0])
        return np.concatenate(parts)


def engines(
    folder: Path, rows: Sequence[Content], prompts: tuple[str, ...], repeats: int
) -> tuple[str, dict[str, Any]]:
    """Naive against both layouts, float32 and bfloat16, interleaved."""
    layouts = {name: Layout(name, prompts) for name in ("prompt_first", "content_first")}
    ways = (("documents", "float32"), ("cached", "float32"), ("documents", "bfloat16"))
    ours = {(name, *way): Ours(folder, layout, way[1], way[0]) for name, layout in layouts.items() for way in ways}
    naive = Naive(folder, ours["prompt_first", "documents", "float32"].encoder, torch.float32)
    sides = {"naive prompt_first float32": lambda: naive.rate(rows, layouts["prompt_first"])}
    for (name, path, dtype), side in ours.items():
        sides[f"ours {name} {path} {dtype}"] = lambda side=side: side.rate(rows)
    seconds = interleave(sides, repeats)
    reference = {name: naive.rate(rows, layout) for name, layout in layouts.items()}
    base = median(seconds["naive prompt_first float32"])
    lengths = sequence_lengths(
        naive_encoder := ours["prompt_first", "documents", "float32"].encoder, naive_encoder.encode(rows)
    )
    lines = []
    for name, values in seconds.items():
        layout, path, dtype = name.split()[-3:]
        row = {
            "side": name,
            "seconds, every repetition": " ".join(f"{value:.2f}" for value in values),
            "median s": f"{median(values):.2f}",
            "x naive": f"{base / median(values):.2f}",
            "tokens/s": f"{lengths.sum() / median(values):,.0f}",
        }
        if name.startswith("ours"):
            got = ours[layout, path, dtype].rate(rows)
            row["max logit diff"] = f"{np.abs(got - reference[layout]).max():.1e}"
            row["Spearman"] = f"{spearman(sentence_score(got), sentence_score(reference[layout])):.4f}"
        lines.append({**row, **{key: row.get(key, "") for key in ("max logit diff", "Spearman")}})
    agreement = spearman(sentence_score(reference["prompt_first"]), sentence_score(reference["content_first"]))
    note = (
        f"{len(rows)} contents x {len(prompts)} prompts, mean {lengths.mean():.0f} tokens a sequence; tokens/s counts the "
        f"sequences the naive loop reads. Differences and Spearman (sentence scores) are against the naive loop of the "
        f"same layout in float32. Spearman between the two layouts, both naive: {agreement:.3f} (random weights)."
    )
    return f"{table(lines)}\n\n{note}", {"engines": seconds, "layout_agreement": agreement}


def floor(folder: Path, rows: Sequence[Content], prompts: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """Counted operations of the matrix products and attention over the measured rate of a matrix product."""
    rate = matmul_rate()
    lines, facts = [], {"matmul_flops": rate}
    width, inner, layers = 512, 1376, 8
    a_layer = 4 * width * width + 3 * width * inner
    for name in ("naive", "prompt_first", "content_first"):
        layout = Layout("content_first" if name == "content_first" else "prompt_first", prompts)
        ours = Ours(folder, layout, "float32")
        batch = ours.encoder.batch(ours.encoder.encode(rows))
        k = len(prompts)
        sequences = [[len(batch.sequence(b, p)) for p in range(k)] for b in range(len(batch.bodies))]
        if name == "naive":
            tokens = sum(map(sum, sequences))
            operations = 2 * tokens * (layers * a_layer + width * 4096)
            operations += sum(2 * width * n * n for of in sequences for n in of) * layers
        else:
            tails = sum(map(len, batch.tails)) if name == "content_first" else len(batch.tails[0]) * k
            bodies = [len(body) * (1 if name == "content_first" else k) for body in batch.bodies]
            tokens = sum(bodies) + tails * len(bodies)
            last = 2 * width * width
            operations = 2 * tokens * ((layers - 1) * a_layer + last)
            if name == "content_first":
                pairs = sum(n * n / 2 + tails * (n + tails / (2 * k)) for n in bodies)
            else:
                pairs = sum(n * n - len(batch.head(p)) ** 2 for of in sequences for p, n in enumerate(of)) / 2
            operations += 4 * width * pairs * (layers - 1)
        lines.append(
            {
                "side": name,
                "tokens computed": f"{tokens:,}",
                "GFLOP": f"{operations / 1e9:,.0f}",
                "floor s": f"{operations / rate:.2f}",
            }
        )
        facts[name] = operations / rate
    return f"{table(lines)}\n\nMatrix product of the model's largest layer: {rate / 1e9:.0f} GFLOP/s.", facts


@contextmanager
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def through_ray(
    folder: Path, data: Path, rows: Sequence[Content], prompts_file: Path, layout: Layout
) -> tuple[str, dict[str, Any]]:
    """The plain loop against `select` on Ray Data with one actor of two threads and two actors of one."""
    from stitch_ray.api import run_job

    lines, facts = [], {}
    ours = Ours(folder, layout, "float32")
    ours.rate(rows[:BATCH_ROWS])
    started = time.perf_counter()
    ours.rate(rows)
    plain = time.perf_counter() - started
    lines.append(
        {"side": "plain loop, 2 threads", "rating s": f"{plain:.1f}", "x plain": "1.00", "end to end s": "", "busy": ""}
    )
    del ours
    for replicas, threads in ((1, 2), (2, 1)):
        model = {"path": str(folder), "num_threads": threads, "replicas": replicas, "dtype": "float32", "name": "bench"}
        config = as_config(
            {
                "data": {"paths": [str(data)], "max_bad_fraction": 1},
                "models": [model],
                "rating": {"layout": layout.name, "prompts": str(prompts_file)},
            },
            SelectConfig,
        )
        with scratch() as out, session(num_cpus=4):
            started = time.perf_counter()
            summary = run_job("select", config, out / "run")
            whole = time.perf_counter() - started
        used = summary.facts["rating"][0]
        steady = used["steady_seconds"]
        name = f"Ray Data, {replicas} actor(s) x {threads} thread(s)"
        lines.append(
            {
                "side": name,
                "rating s": f"{steady:.1f}",
                "x plain": f"{steady / plain:.3f}",
                "end to end s": f"{whole:.1f}",
                "busy": f"{used['busy']:.1%}",
            }
        )
        facts[name] = {"steady": steady, "end_to_end": whole, "busy": used["busy"]}
    note = (
        f"{len(rows)} distinct contents, {layout.name}. Rating runs from the first batch's start to the last one's end; "
        "end to end adds reading, sorting, tokenising, actor and model start, scores and report in an open session."
    )
    return f"{table(lines)}\n\n{note}", {"plain": plain, **facts}


def through_vllm(folder: Path, rows: Sequence[Content], layout: Layout) -> tuple[str, dict[str, Any]]:
    """`ray.data.llm` with vLLM on the same rows, engine start apart, against our engine in a plain loop."""
    import os

    import ray.data
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    ours = Ours(folder, layout, "float32")
    ours.rate(rows[:BATCH_ROWS])
    started = time.perf_counter()
    reference = ours.rate(rows)
    mine = time.perf_counter() - started
    batch = ours.encoder.batch(ours.encoder.encode(rows))
    ids = list(batch.rating_ids)
    del ours
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with session(num_cpus=4):
        config = vLLMEngineProcessorConfig(
            model_source=str(folder),
            engine_kwargs={
                "dtype": "float32",
                "max_model_len": 2048,
                "enforce_eager": True,
                "enable_prefix_caching": True,
            },
            batch_size=64,
            concurrency=1,
            placement_group_config={"bundles": [{"CPU": 1}]},
            chat_template_stage={"enabled": False},
            tokenize_stage={"enabled": False},
            detokenize_stage={"enabled": False},
            runtime_env={"env_vars": {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(THREADS)}},
        )

        def before(row: dict[str, Any]) -> dict[str, Any]:
            sampling = {"max_tokens": 1, "temperature": 0, "logprob_token_ids": ids, "detokenize": False}
            return {**row, "tokenized_prompt": row["ids"], "sampling_params": sampling}

        def after(row: dict[str, Any]) -> dict[str, Any]:
            found = row["logprobs"][0]
            values = [found.get(str(token), found.get(token))["logprob"] for token in ids]
            return {"body": row["body"], "k": row["k"], "logits": values, "at": time.time()}

        processor = build_processor(config, preprocess=before, postprocess=after)
        items = [
            {"body": b, "k": k, "ids": list(batch.sequence(b, k))}
            for b in range(len(batch.bodies))
            for k in range(batch.num_prompts)
        ]
        whole = time.perf_counter()
        got = processor(ray.data.from_items(items, override_num_blocks=max(4, len(items) // 64))).take_all()
        whole = time.perf_counter() - whole
    steady = max(row["at"] for row in got) - min(row["at"] for row in got)
    first = sum(row["at"] - min(r["at"] for r in got) < 1e-3 for row in got)
    logits = np.empty_like(reference)
    for row in got:
        logits[row["body"], row["k"]] = row["logits"]
    worst = np.abs(_log_softmax(logits) - _log_softmax(reference)).max()
    steady_rate = (len(got) - first) / steady if steady else float("nan")
    lines = [
        {"side": "ours, plain loop", "seconds": f"{mine:.1f}", "sequences/s": f"{len(got) / mine:.1f}"},
        {
            "side": "ray.data.llm + vLLM, end to end",
            "seconds": f"{whole:.1f}",
            "sequences/s": f"{len(got) / whole:.1f}",
        },
        {
            "side": "ray.data.llm + vLLM, first result to last",
            "seconds": f"{steady:.1f}",
            "sequences/s": f"{steady_rate:.1f}",
        },
    ]
    note = (
        f"{len(rows)} contents x {batch.num_prompts} prompts, {layout.name}, float32, eager, prefix caching on. "
        f"Engine start is the difference of the last two rows. Largest difference of log-softmax: {worst:.1e}."
    )
    return f"{table(lines)}\n\n{note}", {"ours": mine, "vllm": whole, "vllm_steady": steady, "difference": float(worst)}


def _log_softmax(z: np.ndarray) -> np.ndarray:
    z = z.astype(np.float64) - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def main(
    data: Annotated[list[str] | None, typer.Option(help="instruction data; default: a made corpus")] = None,
    prompts: Annotated[Path | None, typer.Option(help="rating prompts; default: built in")] = None,
    rows: Annotated[int, typer.Option(help="rows of the engine comparison")] = 40,
    ray_rows: Annotated[int, typer.Option(help="rows of the Ray comparison, 0 leaves it out")] = 1000,
    vllm_rows: Annotated[int, typer.Option(help="rows of the vLLM comparison, 0 leaves it out")] = 100,
    repeats: Annotated[int, typer.Option(help="repetitions of every side")] = 5,
    name: Annotated[str, typer.Option(help="name of the result files")] = "selection-cpu",
) -> None:
    """Measure rating on this machine."""
    torch.set_num_threads(THREADS)
    torch.set_grad_enabled(False)
    examples = corpus(data or [], max(1000, rows, ray_rows, vllm_rows))  # the tokenizer is trained on all of them
    texts = tuple(load_prompts(str(prompts) if prompts else None, "rating.txt", RATINGS))
    every = list({c.text: c for e in examples for c in contents(e.messages, e.context)}.values())
    sections: dict[str, str] = {}
    facts: dict[str, Any] = {}
    command = f"python -m benchmarks.selection --rows {rows} --ray-rows {ray_rows} --vllm-rows {vllm_rows}"
    command += " --data FILE --prompts FILE" if data else ""

    def done(section: str, result: tuple[str, dict[str, Any]]) -> None:
        """Publish what there is: a later part that fails must not take the earlier ones along."""
        sections[section], facts[section] = result
        publish(name, "Rating instruction data", sections, facts, command)

    with scratch() as folder:
        model = folder / "model"
        make_model(model, examples)
        done("Engines", engines(model, every[:rows], texts, repeats))
        done("Arithmetic floor", floor(model, every[:rows], texts))
        prompts_file = folder / "prompts.txt"
        prompts_file.write_text("\n".join(texts), encoding="utf-8")
        if ray_rows:
            file = folder / "data.jsonl"
            write_questions(file, every[:ray_rows])
            done("Ray Data", through_ray(model, file, every[:ray_rows], prompts_file, Layout("content_first", texts)))
        for layout in ("prompt_first", "content_first") if vllm_rows else ():
            done(f"vLLM, {layout}", through_vllm(model, every[:vllm_rows], Layout(layout, texts)))


def write_questions(file: Path, rows: Sequence[Content]) -> None:
    """Contents as question/answer records, which read back as the same contents."""
    import json

    lines = [json.dumps({"question": row.instruction, "answer": row.response}, ensure_ascii=False) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)

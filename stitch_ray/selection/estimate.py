"""What a `select` run would read and rate, and how long it would take at least."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from stitch_ray.data.corpus import read_source
from stitch_ray.errors import UserError
from stitch_ray.selection.layout import Content, contents
from stitch_ray.selection.preflight import Ready, ReadyModel
from stitch_ray.selection.rater import sequence_lengths

_SAMPLE = 256


@dataclass(frozen=True, slots=True)
class ModelEstimate:
    """Extrapolated from a sample of contents. `seconds` is a lower bound on CPU, None where it cannot be known here."""

    name: str
    sequences: int
    tokens: int
    truncated_share: float
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """Counts are exact, tokens and seconds are not."""

    sources: tuple[str, ...]
    rows: int
    unusable: int
    distinct: int
    turns: int
    models: tuple[ModelEstimate, ...]


def estimate(ready: Ready) -> Estimate:
    """Read every row, tokenise a sample, rate nothing. Raises UserError if there is no usable row."""
    data = ready.config.data
    seen: set[str] = set()
    rows = unusable = turns = 0
    sample: list[Content] = []
    left = data.limit
    for source in ready.sources:
        for good, bad in read_source(source, data, left):
            rows += len(good) + len(bad)
            left = None if left is None else left - len(good) - len(bad)
            unusable += len(bad)
            for example in good:
                if example.content_id not in seen:
                    seen.add(example.content_id)
                    found = contents(example.messages, example.context)
                    turns += len(found)
                    if len(sample) < _SAMPLE:
                        sample += found
    if not sample:
        raise UserError(f"data.paths: no usable row in {', '.join(ready.sources)}")
    models = tuple(_estimate_model(model, sample, turns) for model in ready.models)
    return Estimate(ready.sources, rows, unusable, len(seen), turns, models)


def describe(ready: Ready) -> str:
    """The estimate as text, one fact a line."""
    found = estimate(ready)
    lines = [
        f"read   {found.rows} rows from {len(found.sources)} source(s), {found.unusable} unusable, "
        f"{found.distinct} distinct with {found.turns} answers to rate"
    ]
    for model in found.models:
        duration = "time unknown here (GPU)" if model.seconds is None else f"at least {_duration(model.seconds)}"
        lines.append(
            f"rate   {model.name}: {model.sequences} sequences, about {model.tokens} tokens computed, "
            f"{model.truncated_share:.1%} truncated, {duration}"
        )
    return "\n".join(lines)


def _estimate_model(model: ReadyModel, sample: list[Content], turns: int) -> ModelEstimate:
    encoder = model.encoder.encoder()
    bodies = encoder.encode(sample)
    computed = sequence_lengths(encoder, bodies).sum()
    if encoder.shares_bodies:
        batch = encoder.batch(bodies)
        sides = sum(map(len, batch.tails)) if len(batch.tails) > 1 else 0
        times = 1 if len(batch.tails) > 1 else batch.num_prompts
        computed = sum(len(body) for body in batch.bodies) * times + sides * len(bodies)
    tokens = int(computed / len(sample) * turns)
    config = model.config
    seconds = None
    if not config.num_gpus:
        seconds = 2 * model.parameters * tokens / (_matmul_rate(config.num_threads) * config.replicas)
    truncated = sum(body.truncated for body in bodies) / len(bodies)
    return ModelEstimate(config.name, turns * encoder.num_prompts, tokens, truncated, seconds)


def _matmul_rate(threads: int) -> float:
    """Floating point operations a second of a float32 matrix product on this machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        a @ b
        started = time.perf_counter()
        for _ in range(5):
            a @ b
        return 5 * 2 * 1024**3 / (time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

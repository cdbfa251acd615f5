"""What a `finetune` run would read and train, as text: `--dry-run`."""

from __future__ import annotations

from random import Random

from stitch_ray.config.finetune import FinetuneConfig, TaskConfig
from stitch_ray.data.corpus import read_source
from stitch_ray.data.quarantine import BadRow
from stitch_ray.engines.pretrained import load_tokenizer
from stitch_ray.errors import UserError
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.records import Example
from stitch_ray.training.encode import Encoded, Overlong, encode
from stitch_ray.training.objectives import objective
from stitch_ray.training.preflight import Ready

_SAMPLE = 256


def describe(ready: Ready) -> str:
    """Rows are counted, tokens extrapolated from the first 256 of every task. Raises UserError if nothing is usable."""
    config = ready.config
    tokenizer = load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)
    lines, tokens, longest = [], 0.0, 0
    for task, sources in zip(config.tasks, ready.sources, strict=True):
        rows, bad, sample = _read(task, sources, config.limit)
        template = ChatTemplate.resolve(task.template, tokenizer)
        encoded = [found for example in sample for found in _encoded(example, task, config, tokenizer, template)]
        if not encoded:
            raise UserError(f"tasks.{task.name}: no usable row in {', '.join(sources)}")
        trained = (rows - bad) * (1 - config.split.validation - config.split.test) * len(encoded) / len(sample)
        mean = sum(len(found.ids) for found in encoded) / len(encoded)
        learned = sum(float((found.weights > 0).mean()) for found in encoded) / len(encoded)
        cut = sum(found.truncated for found in encoded) / len(encoded)
        tokens += trained * mean
        longest = max(longest, *(len(found.ids) for found in encoded))
        lines.append(
            f"read   {task.name}: {rows:,} rows from {len(sources)} source(s), {bad:,} unusable; about {trained:,.0f} to train "
            f"on, {mean:,.0f} tokens each, {learned:.0%} of them with loss, {cut:.1%} truncated"
        )
    lines.append(_steps(config, tokens))
    lines.append(_memory(ready))
    return "\n".join(lines)


def _read(task: TaskConfig, sources: tuple[str, ...], limit: int | None) -> tuple[int, int, list[Example]]:
    """Rows, unusable rows, and the first usable ones."""
    rows = unusable = 0
    sample: list[Example] = []
    for source in sources:
        left = None if limit is None else limit - rows
        for good, bad in read_source(source, task.reading(left), left):
            rows += len(good) + len(bad)
            unusable += len(bad)
            sample += good[: _SAMPLE - len(sample)]
    return rows, unusable, sample


def _encoded(
    example: Example, task: TaskConfig, config: FinetuneConfig, tokenizer: object, template: ChatTemplate
) -> list[Encoded]:
    found = []
    for rendered in objective(task.objective or config.objective).render(example, Random(0)):
        try:
            found.append(encode(rendered, tokenizer, template, config.max_length, config.overlong))
        except (BadRow, Overlong):
            continue
    return found


def _steps(config: FinetuneConfig, tokens: float) -> str:
    micro = config.micro_batches
    if config.max_steps is not None:
        return f"train  {config.max_steps} steps of {micro} micro-batches"
    if config.batch_tokens is None:
        return f"train  {config.epochs:g} epochs, {micro} micro-batches of {config.batch.examples} examples a step"
    steps = max(1.0, tokens * config.epochs / (micro * config.batch_tokens))
    return (
        f"train  about {steps:,.0f} steps of {micro} x {config.batch_tokens:,} tokens, {tokens * config.epochs:,.0f} tokens "
        f"in {config.epochs:g} epochs"
    )


def _memory(ready: Ready) -> str:
    """Weights, gradients and optimizer states of full fine-tuning on the most workers (Rajbhandari et al. 2020, Sec. 3)."""
    config, size = ready.config, ready.num_parameters
    if config.method != "full":
        return f"memory {config.method}: weights of {size / 1e6:,.0f} M parameters on every worker, and the adapter's states"
    workers = config.worker_range[1]
    width = 2 if config.model.dtype == "bfloat16" else 4
    weights = width * size / (workers if config.zero.stage == 3 else 1)
    gradients = width * size / (workers if config.zero.stage >= 2 else 1)
    states = 12 * size / workers
    return (
        f"memory {(weights + gradients + states) / 1e9:,.2f} GB a worker for weights, gradients and optimizer "
        f"({size / 1e6:,.1f} M parameters, ZeRO-{config.zero.stage}, {workers} workers), activations beside it"
    )

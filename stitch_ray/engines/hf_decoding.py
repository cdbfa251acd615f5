"""Decoding of one batch: every row draws from its own distribution, with its own seed, up to its own end."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessor, StoppingCriteria

from stitch_ray.engines.base import Ids, Sampling
from stitch_ray.engines.guided import Guide, mask_logits
from stitch_ray.engines.hf_inputs import decode, padded
from stitch_ray.engines.hf_statistics import token_values


@dataclass(slots=True)
class Row:
    """One answer in the making. `failure`: why there will be none. `complete`: the schema lets nothing more follow."""

    slot: int
    prompt: Ids
    sampling: Sampling
    limit: int
    seed: int
    guide: Guide | None = None
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    finished: bool = False
    complete: bool = False
    failure: str | None = None

    def fail(self, reason: str) -> None:
        self.finished = True
        self.failure = reason


def run(
    model: Any, tokenizer: Any, rows: Sequence[Row], eos: frozenset[int], cancelled: Callable[[int], bool] | None
) -> None:
    """Run `rows` as one batch to their ends; `cancelled(slot)` is asked at every token."""
    inputs = padded([row.prompt for row in rows], model.device, left=True)
    sampler = _Sampler(tokenizer, rows, eos, model.device)
    if _has_common_inputs(model):
        _step_by_step(model, inputs, sampler, lambda: _ended(rows, cancelled))
        return
    with _no_generation_defaults(model):
        model.generate(
            **inputs,
            generation_config=GenerationConfig(
                max_new_tokens=max(row.limit for row in rows), do_sample=False, pad_token_id=0
            ),
            logits_processor=[_Processor(sampler)],
            stopping_criteria=[_Criteria(lambda: _ended(rows, cancelled))],
        )


def _has_common_inputs(model: Any) -> bool:
    """Whether a step of the model is a forward of token ids, mask, positions and cache, as in nearly all models.

    `model.generate` knows the others. It costs as much as several forwards of a small model each time it is called.
    """
    own_inputs = type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation
    if own_inputs or model._is_stateful or not model._supports_default_dynamic_cache():
        return False
    taken = inspect.signature(model.forward).parameters
    return all(name in taken for name in ("attention_mask", "position_ids", "past_key_values", "logits_to_keep"))


def _step_by_step(
    model: Any, inputs: dict[str, Tensor], sampler: _Sampler, ended: Callable[[], Sequence[bool]]
) -> None:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min_(0)
    cache = DynamicCache(config=model.config)
    while True:
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        ids = sampler(logits[:, -1].to(torch.float32, copy=True))[:, None]
        if all(ended()):
            return
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
        positions = positions[:, -1:] + 1


@contextmanager
def _no_generation_defaults(model: Any) -> Iterator[None]:
    """`model.generate` would fill what a request leaves open (penalties, top_k) from the model's own config."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


class _Sampler:
    """Draws the next token of every row by adding Gumbel noise to its logits, in place, so that greedy search finds it.

    argmax(logits / T + Gumbel) is a sample of softmax(logits / T) (Gumbel-max; Maddison et al. 2014, Sec. 2). Each row
    takes one vector of noise a step from its own generator, whatever else is in the batch.
    """

    def __init__(self, tokenizer: Any, rows: Sequence[Row], eos: frozenset[int], device: torch.device) -> None:
        self._tokenizer = tokenizer
        self._rows = rows
        self._eos = eos
        self._generators = {
            i: torch.Generator(device).manual_seed(row.seed)
            for i, row in enumerate(rows)
            if row.sampling.temperature > 0
        }

    def __call__(self, scores: Tensor) -> Tensor:
        """The next tokens, (rows,), from float32 logits (rows, vocabulary). Rows that have ended get any."""
        live = [i for i, row in enumerate(self._rows) if not row.finished]
        guides = {i: guide for i in live if (guide := self._rows[i].guide) is not None}
        if guides:
            mask_logits(scores, guides)
        sampled = [i for i in live if i in self._generators]
        with_stats = [i for i in live if self._rows[i].sampling.token_stats]
        plain = scores[with_stats] if with_stats else scores
        if sampled:
            scores[sampled] = self._perturbed(scores[sampled], sampled)
        best, chosen = scores.max(-1)  # NaN counts as the largest
        if with_stats:
            self._record_stats(with_stats, plain, chosen[with_stats])
        values, tokens = best.tolist(), chosen.tolist()
        for i in live:
            self._extend(self._rows[i], tokens[i], values[i])
        return chosen

    def _perturbed(self, scores: Tensor, indices: Sequence[int]) -> Tensor:
        settings = [self._rows[i].sampling for i in indices]
        column = {"device": scores.device, "dtype": scores.dtype}
        scores = scores / torch.tensor([[one.temperature] for one in settings], **column)
        cut = [k for k, one in enumerate(settings) if one.top_p < 1]
        if cut:
            top_p = torch.tensor([[settings[k].top_p] for k in cut], **column)
            scores[cut] = _nucleus(scores[cut], top_p)
        noise = torch.empty_like(scores)
        for row, i in zip(noise, indices, strict=True):
            row.exponential_(generator=self._generators[i])
        # clamped, for the logarithm of 0 would turn a token that top_p dropped (-inf) into NaN
        return scores - noise.clamp_min_(torch.finfo(noise.dtype).tiny).log_()

    def _record_stats(self, indices: Sequence[int], scores: Tensor, chosen: Tensor) -> None:
        values = [column.tolist() for column in token_values(scores, chosen)]
        for i, logprob, entropy, margin in zip(indices, *values, strict=True):
            self._rows[i].logprobs.append(logprob)
            self._rows[i].entropies.append(entropy)
            self._rows[i].margins.append(margin)

    def _extend(self, row: Row, token: int, best: float) -> None:
        if math.isnan(best):
            row.fail("the model computes NaN for this prompt")
            return
        if best == float("-inf"):
            row.fail("no token of the vocabulary can continue the JSON that json_schema allows")
            return
        row.finished = token in self._eos
        if row.finished:
            return
        row.ids.append(token)
        if row.guide is not None:
            row.guide.accept(token)
            row.complete = row.guide.complete
        full = row.complete or len(row.ids) == row.limit
        row.finished = full or _has_stop(self._tokenizer, row.ids, row.sampling.stop)


def _ended(rows: Sequence[Row], cancelled: Callable[[int], bool] | None) -> list[bool]:
    """Which rows have ended, those that nobody wants any more included."""
    if cancelled is not None:
        for row in rows:
            if not row.finished and cancelled(row.slot):
                row.fail("cancelled")
    return [row.finished for row in rows]


class _Processor(LogitsProcessor):
    """The sampler within `model.generate`."""

    def __init__(self, sampler: _Sampler) -> None:
        self._sampler = sampler

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._sampler(scores)
        return scores


class _Criteria(StoppingCriteria):
    """The ends of rows within `model.generate`."""

    def __init__(self, ended: Callable[[], Sequence[bool]]) -> None:
        self._ended = ended

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor(self._ended(), device=input_ids.device)


def _nucleus(scores: Tensor, top_p: Tensor) -> Tensor:
    """-inf outside the smallest set of tokens whose probabilities reach `top_p`, shape (rows, 1)."""
    ordered, order = scores.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    outside = probabilities.cumsum(-1) - probabilities >= top_p
    outside[:, 0] = False
    return scores.masked_fill(outside.scatter(-1, order, outside), float("-inf"))


def _has_stop(tokenizer: Any, ids: Sequence[int], stop: tuple[str, ...]) -> bool:
    """Whether the text of `ids` holds a stop string, told from its last tokens if it does not."""
    if not stop:
        return False
    # A token is at least a byte. The first ones of a piece may decode differently there than in the whole.
    window = ids[-max(len(one.encode()) for one in stop) - 8 :]
    tail = decode(tokenizer, window)
    if not any(one in tail for one in stop):
        return False
    text = decode(tokenizer, ids)
    return any(one in text for one in stop)

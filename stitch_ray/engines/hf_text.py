"""Answers and embeddings of a Hugging Face causal language model, as functions of it.

All take `token_budget`, the tokens (padding included) of one forward or of one generating batch, and `max_context`,
the longest sequence.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from stitch_ray.engines.base import EngineError, Generation, Ids, Request, Sampling
from stitch_ray.engines.hf_inputs import batches, check_adapter, check_ids, decode, encode, eos_ids, padded, prompt_ids
from stitch_ray.engines.hf_statistics import token_values
from stitch_ray.records import content_hash


def generate(
    model: Any, tokenizer: Any, requests: Sequence[Request], *, token_budget: int, max_context: int
) -> list[list[Generation] | EngineError]:
    """`num_samples` answers a request, in request order; at temperature 0 one answer, repeated.

    A sample depends on its prompt, its seed and its index among the samples, not on the batch it is drawn in, up to
    rounding of the model's logits and on the same kind of device. The model's own generation config gives the
    end-of-sequence ids (with the tokenizer's) and nothing else: no penalties, no temperature.

    `text` ends before the first stop string. `token_ids` and the values per token belong to `text`: they hold neither
    the end-of-sequence token nor the tokens of a stop string. `max_tokens` is cut where the context ends.
    The values are the model's, before temperature and top_p.
    """
    rows: list[_Row] = []
    answers: list[list[Generation] | EngineError] = [[] for _ in requests]
    for slot, request in enumerate(requests):
        try:
            rows += _rows(model, tokenizer, slot, request, max_context)
        except ValueError as error:
            answers[slot] = EngineError(request.request_id, str(error))
    eos = eos_ids(model, tokenizer)
    by_settings = sorted(rows, key=_settings)
    with torch.inference_mode(), _no_generation_defaults(model):
        for _, alike in groupby(by_settings, key=_settings):
            together = list(alike)
            for indices in batches([len(row.prompt) + row.limit for row in together], token_budget):
                _decode(model, tokenizer, [together[i] for i in indices], eos)
    for row in rows:  # by slot, then sample
        request, so_far = requests[row.slot], answers[row.slot]
        if isinstance(so_far, EngineError):
            continue
        if row.failed:
            answers[row.slot] = EngineError(request.request_id, "the model computes NaN for this prompt")
            continue
        times = request.sampling.num_samples if request.sampling.temperature == 0 else 1
        so_far += [_generation(tokenizer, row)] * times
    return answers


def embed(
    model: Any, tokenizer: Any, texts: Sequence[str], *, token_budget: int, max_context: int
) -> NDArray[np.float32]:
    """Unit-length mean of the last hidden state over a text's tokens, shape (texts, width).

    Raises ValueError for an empty text and one longer than `max_context`, naming its index.
    """
    ids: list[Ids] = []
    for index, text in enumerate(texts):
        ids.append(encode(tokenizer, text, special=True) if text else ())
        if not ids[-1]:
            raise ValueError(f"text {index} is empty and has no embedding")
        if len(ids[-1]) > max_context:
            raise ValueError(
                f"text {index} has {len(ids[-1])} tokens; the model takes {max_context}: truncate or split it"
            )
    out = np.empty((len(texts), model.get_input_embeddings().weight.shape[1]), np.float32)
    with torch.inference_mode():
        for indices in batches([len(row) for row in ids], token_budget):
            inputs = padded([ids[i] for i in indices], model.device, left=False)
            hidden = model.base_model(**inputs, use_cache=False).last_hidden_state.float()
            real = inputs["attention_mask"][..., None]
            mean = hidden.masked_fill(real == 0, 0.0).sum(1) / real.sum(1)
            out[indices] = nn.functional.normalize(mean, dim=-1).cpu().numpy()
    return out


@dataclass(slots=True)
class _Row:
    """One answer in the making."""

    slot: int
    prompt: Ids
    sampling: Sampling
    limit: int
    seed: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    finished: bool = False
    failed: bool = False


def _rows(model: Any, tokenizer: Any, slot: int, request: Request, max_context: int) -> list[_Row]:
    sampling = request.sampling
    check_adapter(request)
    if sampling.json_schema is not None:
        raise ValueError("engine transformers has no guided decoding; use engine: vllm")
    if sampling.max_tokens < 1 or sampling.num_samples < 1:
        raise ValueError(f"max_tokens {sampling.max_tokens} and num_samples {sampling.num_samples} must be at least 1")
    if sampling.temperature < 0 or not 0 < sampling.top_p <= 1:
        raise ValueError(f"temperature {sampling.temperature} must be at least 0, top_p {sampling.top_p} in (0, 1]")
    prompt = prompt_ids(tokenizer, request.prompt)
    if not 0 < len(prompt) < max_context:
        raise ValueError(f"{len(prompt)} prompt tokens; the model takes 1 to {max_context - 1} before an answer")
    check_ids(model, prompt)
    limit = min(sampling.max_tokens, max_context - len(prompt))
    seed = secrets.randbits(62) if sampling.seed is None else sampling.seed
    num_rows = 1 if sampling.temperature == 0 else sampling.num_samples
    return [
        _Row(slot, prompt, sampling, limit, seed=int(content_hash([seed, sample])[:15], 16))
        for sample in range(num_rows)
    ]


def _settings(row: _Row) -> tuple[tuple[str, ...], int]:
    """Answers end in similar places within a batch of equal settings; a finished row waits for the longest."""
    return row.sampling.stop, row.sampling.max_tokens


@contextmanager
def _no_generation_defaults(model: Any) -> Iterator[None]:
    """`model.generate` would fill what a request leaves open (penalties, top_k) from the model's own config."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _decode(model: Any, tokenizer: Any, rows: Sequence[_Row], eos: frozenset[int]) -> None:
    """Run `rows` as one batch to their ends."""
    model.generate(
        **padded([row.prompt for row in rows], model.device, left=True),
        generation_config=GenerationConfig(
            max_new_tokens=max(row.limit for row in rows), do_sample=False, pad_token_id=0
        ),
        logits_processor=[_Sampler(tokenizer, rows, eos, model.device)],
        stopping_criteria=[_AllTold(rows)],
    )


class _Sampler(LogitsProcessor):
    """Draws the next token of every row by adding Gumbel noise to its logits, so that greedy search finds it.

    argmax(logits / T + Gumbel) is a sample of softmax(logits / T) (Gumbel-max; Maddison et al. 2014, Sec. 2). Each row
    takes one vector of noise a step from its own generator, whatever else is in the batch.
    """

    def __init__(self, tokenizer: Any, rows: Sequence[_Row], eos: frozenset[int], device: torch.device) -> None:
        self._tokenizer = tokenizer
        self._rows = rows
        self._eos = eos
        self._generators = [torch.Generator(device).manual_seed(row.seed) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        live = [i for i, row in enumerate(self._rows) if not row.finished]
        sampled = [i for i in live if self._rows[i].sampling.temperature > 0]
        with_stats = [i for i in live if self._rows[i].sampling.token_stats]
        plain = scores[with_stats]
        if sampled:
            scores[sampled] = self._perturbed(scores[sampled], sampled)
        best, chosen = scores.max(-1)  # NaN counts as the largest
        if with_stats:
            self._record_stats(with_stats, plain, chosen[with_stats])
        for i, token, failed in zip(live, chosen[live].tolist(), best[live].isnan().tolist(), strict=True):
            self._extend(self._rows[i], token, failed)
        return scores

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

    def _extend(self, row: _Row, token: int, failed: bool) -> None:
        row.failed = failed
        row.finished = failed or token in self._eos
        if not row.finished:
            row.ids.append(token)
            row.finished = len(row.ids) == row.limit or _has_stop(self._tokenizer, row.ids, row.sampling.stop)


class _AllTold(StoppingCriteria):
    """Ends a row when the sampler has."""

    def __init__(self, rows: Sequence[_Row]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.tensor([row.finished for row in self._rows], device=input_ids.device)


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


def _generation(tokenizer: Any, row: _Row) -> Generation:
    text, kept = decode(tokenizer, row.ids), len(row.ids)
    ends = [text.find(one) for one in row.sampling.stop if one in text]
    if ends:
        text = text[: min(ends)]
        while kept and decode(tokenizer, row.ids[: kept - 1]).startswith(text):
            kept -= 1
    stats = row.sampling.token_stats
    return Generation(
        text=text,
        token_ids=tuple(row.ids[:kept]),
        finish_reason="length" if not ends and len(row.ids) == row.limit else "stop",
        prompt_tokens=len(row.prompt),
        logprobs=tuple(row.logprobs[:kept]) if stats else None,
        entropies=tuple(row.entropies[:kept]) if stats else None,
        margins=tuple(row.margins[:kept]) if stats else None,
    )

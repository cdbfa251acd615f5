"""Answers and embeddings of a Hugging Face causal language model, as functions of it.

All take `token_budget`, the tokens (padding included) of one forward or of one generating batch, and `max_context`,
the longest sequence.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from stitch_ray.engines import hf_decoding
from stitch_ray.engines.base import EngineError, Generation, Ids, Request
from stitch_ray.engines.guided import Guide
from stitch_ray.engines.hf_decoding import Row
from stitch_ray.engines.hf_inputs import batches, check_adapter, check_ids, decode, encode, eos_ids, padded, prompt_ids
from stitch_ray.records import content_hash


def generate(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    token_budget: int,
    max_context: int,
    cancelled: Callable[[int], bool] | None = None,
) -> list[list[Generation] | EngineError]:
    """`num_samples` answers a request, in request order; at temperature 0 one answer, repeated.

    A sample depends on its prompt, its seed and its index among the samples, not on the batch it is drawn in, up to
    rounding of the model's logits and on the same kind of device. The model's own generation config gives the
    end-of-sequence ids (with the tokenizer's) and nothing else: no penalties, no temperature.

    `text` ends before the first stop string. `token_ids` and the values per token belong to `text`: they hold neither
    the end-of-sequence token nor the tokens of a stop string. `max_tokens` is cut where the context ends.
    The values are the model's, before temperature and top_p; under `json_schema`, as vLLM has them: among the tokens
    that the schema allows. Such an answer is whole JSON without blanks where it ended with "stop".

    A request for which `cancelled(index)` is true ends at its next token, with an EngineError.
    """
    eos = eos_ids(model, tokenizer)
    rows: list[Row] = []
    answers: list[list[Generation] | EngineError] = [[] for _ in requests]
    for slot, request in enumerate(requests):
        try:
            rows += _rows(model, tokenizer, slot, request, max_context, eos)
        except ValueError as error:
            answers[slot] = EngineError(request.request_id, str(error))
    by_settings = sorted(rows, key=_settings)
    with torch.inference_mode():
        for _, alike in groupby(by_settings, key=_settings):
            together = list(alike)
            for indices in batches([len(row.prompt) + row.limit for row in together], token_budget):
                hf_decoding.run(model, tokenizer, [together[i] for i in indices], eos, cancelled)
    for row in rows:  # by slot, then sample
        request, so_far = requests[row.slot], answers[row.slot]
        if isinstance(so_far, EngineError):
            continue
        if row.failure is not None:
            answers[row.slot] = EngineError(request.request_id, row.failure)
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


def _rows(model: Any, tokenizer: Any, slot: int, request: Request, max_context: int, eos: frozenset[int]) -> list[Row]:
    sampling = request.sampling
    check_adapter(request)
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
    vocab_size = model.get_output_embeddings().weight.shape[0]
    schema = sampling.json_schema
    return [
        Row(
            slot,
            prompt,
            sampling,
            limit,
            seed=int(content_hash([seed, sample])[:15], 16),
            guide=None if schema is None else Guide(tokenizer, vocab_size, eos, schema),
        )
        for sample in range(num_rows)
    ]


def _settings(row: Row) -> tuple[tuple[str, ...], int]:
    """Answers end in similar places within a batch of equal settings; a finished row waits for the longest."""
    return row.sampling.stop, row.sampling.max_tokens


def _generation(tokenizer: Any, row: Row) -> Generation:
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
        finish_reason="length" if not ends and not row.complete and len(row.ids) == row.limit else "stop",
        prompt_tokens=len(row.prompt),
        logprobs=tuple(row.logprobs[:kept]) if stats else None,
        entropies=tuple(row.entropies[:kept]) if stats else None,
        margins=tuple(row.margins[:kept]) if stats else None,
    )

"""From requests to token ids, and from sequences of ids to batches, for a Hugging Face causal language model.

Nothing here needs a padding token: masked positions hold id 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from stitch_ray.engines.base import Ids, Request
from stitch_ray.records import Turn


def prompt_ids(tokenizer: Any, prompt: tuple[Turn, ...] | str | Ids) -> Ids:
    """Turns through the chat template up to the assistant's turn, text with the tokenizer's own special tokens.

    Raises ValueError if the tokenizer has no chat template, or the template or tokenizer does not take the prompt.
    """
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], Turn)):
        text, special = _prompt_text(tokenizer, prompt)
        return encode(tokenizer, text, special)
    return tuple(prompt)  # type: ignore[arg-type]


def _prompt_text(tokenizer: Any, prompt: tuple[Turn, ...] | str) -> tuple[str, bool]:
    """The prompt as text, and whether the tokenizer is to add its special tokens (a template has its own)."""
    if isinstance(prompt, str):
        return prompt, True
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the tokenizer has no chat template; give the prompt as text instead of turns")
    messages = [{"role": turn.role, "content": turn.content} for turn in prompt]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(f"the chat template refuses the prompt: {error}") from error
    assert isinstance(text, str)
    return text, False


def encode(tokenizer: Any, text: str, special: bool) -> Ids:
    text.encode()  # a lone surrogate is a ValueError here, a misleading TypeError in the tokenizer
    return tuple(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def split_ids(tokenizer: Any, request: Request) -> tuple[Ids, Ids]:
    """Ids of prompt and continuation, neither empty."""
    prompt, continuation = prompt_ids(tokenizer, request.prompt), request.continuation
    if not continuation:
        raise ValueError("loglikelihood needs a continuation")
    if not prompt:
        raise ValueError("loglikelihood needs a prompt of at least one token")
    if not isinstance(continuation, str):
        return prompt, tuple(continuation)
    if isinstance(request.prompt, str) or isinstance(request.prompt[0], Turn):
        text, special = _prompt_text(tokenizer, request.prompt)
        whole = encode(tokenizer, text + continuation, special)
        if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            return prompt, whole[len(prompt) :]
    alone = encode(tokenizer, continuation, special=False)
    if not alone:
        raise ValueError("the continuation has no tokens")
    return prompt, alone


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    own = model.generation_config.eos_token_id
    ids = own if isinstance(own, list | tuple) else [own]
    return frozenset(one for one in (*ids, tokenizer.eos_token_id) if one is not None)


def check_adapter(request: Request) -> None:
    if request.adapter is not None:
        raise ValueError(f"engine transformers has no adapters, and the request names {request.adapter!r}")


def check_ids(model: Any, ids: Ids) -> None:
    """An id without an embedding fails a whole batch on a CPU and the process on a GPU."""
    top = model.get_input_embeddings().weight.shape[0]
    if not all(0 <= one < top for one in ids):
        raise ValueError(f"token id {next(one for one in ids if not 0 <= one < top)} is not among the model's {top}")


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices by ascending length, in batches of rows x longest at most `budget` (a single row may exceed it)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def padded(rows: Sequence[Ids], device: torch.device, *, left: bool) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), None) if left else slice(len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}

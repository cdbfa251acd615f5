"""Attention over a packed row: documents one after another, each seeing only itself.

The lengths of the documents reach the attention as keyword arguments of the model's forward (`packed_arguments`), not
through a context variable: with gradient checkpointing the forward runs again in autograd's own thread, which sees no
context of ours. Packing by `position_ids` alone is no substitute: with `use_cache` at its default, transformers 5.19 does
not look for packed documents, and they see each other without any error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from stitch_ray.engines.documents import LAYER_TYPES, UnsupportedAttentionError, Variant, attend, trunk_mask
from stitch_ray.engines.rating import CHECK_TOLERANCE, attention

IMPLEMENTATION = "stitch_packed"

_VARLEN_WIDTH = 256
"""Widest head of the flash kernel behind `varlen_attn`; the width must also be a multiple of 8."""

_mask_windows: ContextVar[set[int | None] | None] = ContextVar("stitch_ray_packed_mask_windows", default=None)
"""While `check_isolation` looks: windows of the masks that the model would have had."""

_attention_windows: ContextVar[set[int | None] | None] = ContextVar("stitch_ray_packed_windows", default=None)
"""While `check_isolation` looks: windows that the attention was given."""


def register() -> None:
    """Make the function known to transformers as `attn_implementation="stitch_packed"`. Safe to call again."""
    AttentionInterface.register(IMPLEMENTATION, _attend_packed)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


def packed_arguments(document_lengths: Sequence[int], device: torch.device | str) -> dict[str, Any]:
    """Keyword arguments that the model's forward needs beside `input_ids` and `position_ids` of a packed row.

    document_lengths: tokens of every document, in row order.
    """
    offsets = torch.tensor([0, *accumulate(document_lengths)], dtype=torch.int32, device=device)
    return {"document_lengths": tuple(document_lengths), "document_offsets": offsets}


def _no_mask(*_args: Any, local_size: int | None = None, use_vmap: bool = False, **_kwargs: Any) -> None:
    """In place of a mask. `local_size` is its window or chunk; transformers sets `use_vmap` for a model's own rules."""
    if use_vmap:
        raise UnsupportedAttentionError("the model adds rules of its own to the causal mask")
    seen = _mask_windows.get()
    if seen is not None:
        seen.add(local_size)


def _attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    document_lengths: tuple[int, ...] | None = None,
    document_offsets: Tensor | None = None,
    **_extra: Any,
) -> tuple[Tensor, None]:
    """query: (1, heads, tokens, width); key, value: (1, kv heads, tokens, width). Returns (1, tokens, heads, width).

    Raises UnsupportedAttentionError for what it would have to ignore.
    """
    name = type(module).__name__
    if document_lengths is None or document_offsets is None:
        raise UnsupportedAttentionError(f"{name} did not get the keyword arguments of packed_arguments()")
    if dropout:
        raise UnsupportedAttentionError(
            f"{name} drops out attention ({dropout}), which packed rows do not; set its attention dropout to 0 in "
            "config.json of the model, or packing: false"
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is not None or position_bias is not None or not causal:
        raise UnsupportedAttentionError(f"{name} passes a mask or a bias, or is not causal")
    assert query.shape[0] == 1, "a packed row is a batch of one"
    seen = _attention_windows.get()
    if seen is not None:
        seen.add(sliding_window)
    variant = Variant(scaling, sliding_window, softcap, s_aux)
    if _varlen_applies(query, value, variant):
        return _attend_varlen(query, key, value, document_offsets, max(document_lengths), variant), None
    # Splitting and joining, whose backward is one copy; that of writing into slices would copy the row per document.
    parts = zip(*(tensor.split(document_lengths, 2) for tensor in (query, key, value)), strict=True)
    return torch.cat([_attend_document(q, k, v, variant) for q, k, v in parts], 2).transpose(1, 2), None


def _attend_document(query: Tensor, key: Tensor, value: Tensor, variant: Variant) -> Tensor:
    tokens = query.shape[2]
    if not variant.plain(tokens):
        return attend(query, key, value, trunk_mask(0, tokens, variant.window).to(query.device), variant)
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=variant.scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _varlen_applies(query: Tensor, value: Tensor, variant: Variant) -> bool:
    width = query.shape[3]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and variant.softcap is None
        and variant.sinks is None
        and width == value.shape[3]
        and width % 8 == 0
        and width <= _VARLEN_WIDTH
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, variant: Variant
) -> Tensor:
    """All documents in one kernel. Its window counts the tokens before the query; transformers' counts the query too."""
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    window = (-1 if variant.window is None or variant.window >= longest else variant.window - 1, 0)
    gqa = q.shape[1] != k.shape[1]
    out = varlen_attn(
        q, k, v, offsets, offsets, longest, longest, scale=variant.scale, window_size=window, enable_gqa=gqa
    )
    assert isinstance(out, Tensor)
    return out[None]


def check_isolation(model: Any) -> str | None:
    """Whether documents packed with this attention stay apart: None, or the reason why packing cannot be used.

    Runs a row of two short documents, each of them alone through the model's own eager attention, and the row again
    with other tokens in the first document: the second one's logits must not change by a bit, or, where experts round
    by the size of their batch, must not have a gradient from the first. For whole models only (before ZeRO stage 3 shares the weights out). Leaves
    the model, its attention implementation and torch's random state as they were.
    """
    register()
    layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if not layer_types <= LAYER_TYPES:
        return f"layers {sorted(layer_types - LAYER_TYPES)} carry state from one document into the next"
    training, devices = model.training, [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            return _isolation(model)
    except Exception as error:  # any model-specific failure means: not packed
        return f"the model does not run on packed rows ({type(error).__name__}: {error})"
    finally:
        model.train(training)


def _isolation(model: Any) -> str | None:
    generator = torch.Generator().manual_seed(0)
    top = model.get_input_embeddings().weight.shape[0]
    first, other, second = (torch.randint(0, top, (n,), generator=generator) for n in (13, 13, 22))
    lengths = (len(first), len(second))

    def packed(document: Tensor) -> Tensor:
        positions = torch.cat([torch.arange(n) for n in lengths])[None].to(model.device)
        ids = torch.cat((document, second))[None].to(model.device)
        return model(input_ids=ids, position_ids=positions, **packed_arguments(lengths, model.device)).logits[0]

    with attention(model, IMPLEMENTATION):
        windows: set[int | None] = set()
        mask_windows: set[int | None] = set()
        tokens = _attention_windows.set(windows), _mask_windows.set(mask_windows)
        try:
            model.train()  # attention dropout shows in training mode only
            packed(first)
        finally:
            _attention_windows.reset(tokens[0])
            _mask_windows.reset(tokens[1])
        if not windows:
            return "the model's attention does not go through transformers' AttentionInterface"
        if mask_windows - {None, 0} != windows - {None, 0}:
            return f"its masks have windows {mask_windows - {None, 0}}, its attention is given {windows - {None, 0}}"
        model.eval()
        row, changed = packed(first), packed(other)
        leaks = not torch.equal(row[lengths[0] :], changed[lengths[0] :]) and _gradient_crosses(
            model, lambda: packed(first), lengths[0]
        )
    with attention(model, "eager"):
        alone = torch.cat([model(input_ids=document[None].to(model.device)).logits[0] for document in (first, second)])
    if leaks:
        return "a document's logits change with the document before it"
    off = float((row - alone).float().norm() / (alone - alone.mean(0)).float().norm())
    if not off <= CHECK_TOLERANCE.get(model.dtype, 1e-3):
        return f"a packed document's logits are off by {off:.1e} of their spread"
    return None


def _gradient_crosses(model: Any, forward: Callable[[], Tensor], start: int) -> bool:
    """Whether logits from position `start` on have a gradient with respect to embeddings before it.

    For mixtures of experts: other tokens change the size of an expert's batch and so the rounding, but no gradient.
    """
    embedded: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output if output.requires_grad else output.detach().requires_grad_())
        return embedded[0]

    handle = model.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            loss = forward()[start:].float().square().sum()
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(loss, embedded)
    return bool(gradient[0, :start].any())

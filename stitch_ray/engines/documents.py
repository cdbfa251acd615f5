"""One attention function for many documents in one unpadded row, shared prefixes and trees of branches.

A transformers decoder whose attention goes through `AttentionInterface` hands q, k and v of a flat row of tokens to the
function registered here. It attends document by document, so nothing is padded and nothing leaks between documents:

    [ trunk 0 | branches 0 ] [ trunk 1 | branches 1 ] ...

A trunk may continue a prefix whose keys and values were recorded once (`Pass.recording`). Branches continue their trunk and do
not see each other (the K rating prompts behind one content). No forward is rewritten: the plan of a pass travels in a
context variable, positions in `position_ids`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

IMPLEMENTATION = "stitch_documents"

LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "moe", "mlp"})
"""What `config.layer_types` may hold. A recurrent or convolutional layer would carry its state across documents."""

LayerKV = tuple[Tensor, Tensor]
"""Keys and values of one layer, each of shape (1, key/value heads, tokens, head width)."""


@dataclass(slots=True)
class Prefix:
    """Recorded keys and values of a shared prefix, one pair a layer in the order the layers run."""

    length: int
    layers: list[LayerKV] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Document:
    """`start` is the trunk's first position in the row; `branches` are the lengths of the branches behind it."""

    start: int
    trunk: int
    branches: tuple[int, ...] = ()
    prefix: Prefix | None = None

    @property
    def prefix_length(self) -> int:
        return self.prefix.length if self.prefix else 0


@dataclass(slots=True)
class Pass:
    """The plan of one forward, and what was seen of the model on the way.

    `last_only`: the last of `num_layers` attends from the wanted positions alone, the end of every trunk or, if it has
    any, branch. `recording` collects keys and values. `layer` counts the attention calls so far. `windows` are the
    sliding windows the attention was given, `mask_windows` those the model's masks would have had.
    """

    documents: Sequence[Document]
    num_layers: int = 0
    last_only: bool = False
    recording: Prefix | None = None
    layer: int = 0
    last_module: torch.nn.Module | None = None
    windows: set[int | None] = field(default_factory=set)
    mask_windows: set[int | None] = field(default_factory=set)
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def check_windows(self) -> None:
        """Raise where the masks, which this attention ignores, say more than its arguments (chunks, Llama 4)."""
        none = {None, 0}  # 0: Qwen2-MoE without windows makes such a mask and does not use it
        if self.mask_windows - none != self.windows - none:
            raise UnsupportedAttentionError(
                f"masks have windows {self.mask_windows - none}, the attention is given {self.windows - none}"
            )


class UnsupportedAttentionError(ValueError):
    """The model asks its attention for something this function does not compute."""


_current: ContextVar[Pass | None] = ContextVar("stitch_ray_attention_pass", default=None)


@contextmanager
def attention_pass(plan: Pass) -> Iterator[Pass]:
    """Every attention call inside belongs to `plan`; layers are counted in the order they run."""
    token = _current.set(plan)
    try:
        yield plan
    finally:
        _current.reset(token)


def _current_pass() -> Pass:
    plan = _current.get()
    if plan is None:
        raise RuntimeError(f"attention {IMPLEMENTATION!r} was called outside attention_pass()")
    return plan


def register() -> None:
    """Make the function known to transformers as `attn_implementation="stitch_documents"`. Safe to call again."""
    AttentionInterface.register(IMPLEMENTATION, _attend_row)
    AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)


def _no_mask(*_args: Any, local_size: int | None = None, use_vmap: bool = False, **_kwargs: Any) -> None:
    """In place of a mask. `local_size` is its window or chunk; transformers sets `use_vmap` for a model's own rules."""
    plan = _current_pass()
    if use_vmap:
        raise UnsupportedAttentionError("the model adds rules of its own to the causal mask")
    plan.mask_windows.add(local_size)


@dataclass(frozen=True, slots=True)
class Variant:
    """What a model adds to plain scaled dot-product attention."""

    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    def plain(self, tokens: int) -> bool:
        return self.softcap is None and self.sinks is None and (self.window is None or tokens <= self.window)


def _attend_row(
    module: torch.nn.Module,
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
    **_extra: Any,
) -> tuple[Tensor, None]:
    """Attention over a flat row. query: (1, heads, tokens, width); key, value: (1, kv heads, tokens, width).

    Returns (1, tokens, heads, value width). Positions that nobody wants in the last layer stay zero. Raises
    UnsupportedAttentionError for what it would have to ignore.
    """
    plan = _current_pass()
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if attention_mask is not None or position_bias is not None or dropout or not causal:
        raise UnsupportedAttentionError(f"{type(module).__name__} passes a mask, a bias or dropout, or is not causal")
    layer, plan.layer, plan.last_module = plan.layer, plan.layer + 1, module
    plan.windows.add(sliding_window)
    if plan.recording is not None:
        plan.recording.layers.append((key.clone(), value.clone()))
    variant = Variant(scaling, sliding_window, softcap, s_aux)
    last = plan.last_only and layer == plan.num_layers - 1
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
    for document in plan.documents:
        keys, values = _with_prefix(document, layer, key, value)
        if last:
            _attend_wanted(plan, document, variant, query, keys, values, out)
            continue
        if document.trunk:
            _attend_trunk(plan, document, variant, query, keys, values, out)
        if document.branches:
            _attend_branches(plan, document, variant, query, keys, values, out)
    return out, None


def _with_prefix(document: Document, layer: int, key: Tensor, value: Tensor) -> LayerKV:
    """Keys and values of the prefix, the trunk and the branches, in this order."""
    stop = document.start + document.trunk + sum(document.branches)
    keys, values = key[:, :, document.start : stop], value[:, :, document.start : stop]
    if document.prefix is None:
        return keys, values
    prefix_keys, prefix_values = document.prefix.layers[layer]
    return torch.cat((prefix_keys, keys), 2), torch.cat((prefix_values, values), 2)


def _attend_trunk(
    plan: Pass, document: Document, variant: Variant, query: Tensor, keys: Tensor, values: Tensor, out: Tensor
) -> None:
    start, stop, prefix = document.start, document.start + document.trunk, document.prefix_length
    q, tokens = query[:, :, start:stop], prefix + document.trunk
    keys, values = keys[:, :, :tokens], values[:, :, :tokens]
    if variant.plain(tokens):
        if prefix:
            # Square and causal beats a masked rectangle: no mask to build, and the kernel skips the upper triangle.
            q = F.pad(q, (0, 0, prefix, 0))
        y = F.scaled_dot_product_attention(
            q, keys, values, is_causal=True, scale=variant.scale, enable_gqa=q.shape[1] != keys.shape[1]
        )[:, :, prefix:]
    else:
        mask = _masks(plan, ("trunk", prefix, document.trunk, variant.window), query.device, trunk_mask)
        y = attend(q, keys, values, mask, variant)
    out[:, start:stop] = y.transpose(1, 2)


def _attend_branches(
    plan: Pass, document: Document, variant: Variant, query: Tensor, keys: Tensor, values: Tensor, out: Tensor
) -> None:
    start = document.start + document.trunk
    stop = start + sum(document.branches)
    mask = _branch_masks(plan, document, variant, query.device)
    out[:, start:stop] = attend(query[:, :, start:stop], keys, values, mask, variant).transpose(1, 2)


def _attend_wanted(
    plan: Pass, document: Document, variant: Variant, query: Tensor, keys: Tensor, values: Tensor, out: Tensor
) -> None:
    trunk_end = document.start + document.trunk
    if not document.branches:
        tokens = document.prefix_length + document.trunk
        mask = None
        if not variant.plain(tokens):
            key = ("trunk", document.prefix_length, document.trunk, variant.window)
            mask = _masks(plan, key, query.device, trunk_mask)[-1:]
        q = query[:, :, trunk_end - 1 : trunk_end]
        out[:, trunk_end - 1 : trunk_end] = attend(q, keys, values, mask, variant).transpose(1, 2)
        return
    ends = torch.tensor(document.branches, device=query.device).cumsum(0) - 1
    mask = _branch_masks(plan, document, variant, query.device)[ends]
    at = trunk_end + ends
    out[:, at] = attend(query[:, :, at], keys, values, mask, variant).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, variant: Variant) -> Tensor:
    """Masked attention, (1, heads, queries, width). Soft-capping (Gemma 2) and sinks (gpt-oss) need explicit scores."""
    gqa = q.shape[1] != k.shape[1]
    if variant.softcap is None and variant.sinks is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=variant.scale, enable_gqa=gqa)
    if gqa:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (variant.scale if variant.scale is not None else q.shape[-1] ** -0.5)
    if variant.softcap is not None:
        scores = torch.tanh(scores / variant.softcap) * variant.softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if variant.sinks is not None:
        sinks = variant.sinks.view(1, -1, 1, 1).expand(1, -1, q.shape[2], 1).to(scores.dtype)
        scores = torch.cat((scores, sinks), -1)
        return (scores.float().softmax(-1)[..., :-1]).to(v.dtype) @ v
    return scores.float().softmax(-1).to(v.dtype) @ v


def _masks(plan: Pass, key: tuple[Any, ...], device: torch.device, make: Any) -> Tensor:
    if key not in plan.masks:
        plan.masks[key] = make(*key[1:]).to(device)
    return plan.masks[key]


def _branch_masks(plan: Pass, document: Document, variant: Variant, device: torch.device) -> Tensor:
    before = document.prefix_length + document.trunk
    return _masks(plan, ("branches", before, document.branches, variant.window), device, _branch_mask)


def _within(query_at: Tensor, key_at: Tensor, window: int | None) -> Tensor:
    """Causal and inside the window, by position. Shape (queries, keys)."""
    seen = key_at[None] <= query_at[:, None]
    return seen if window is None else seen & (query_at[:, None] - key_at[None] < window)


def trunk_mask(prefix: int, trunk: int, window: int | None) -> Tensor:
    at = torch.arange(prefix + trunk)
    return _within(at[prefix:], at, window)


def _branch_mask(before: int, branches: tuple[int, ...], window: int | None) -> Tensor:
    at = torch.cat([torch.arange(length) for length in branches]) + before
    branch = torch.repeat_interleave(torch.arange(len(branches)), torch.tensor(branches))
    inside = _within(at, at, window) & (branch[:, None] == branch[None])
    return torch.cat((_within(at, torch.arange(before), window), inside), 1)


@dataclass(slots=True)
class RowBuilder:
    """Lays documents into one row: `add` them, then read `input_ids`, `position_ids`, `documents` and `wanted`."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def add(self, trunk: Sequence[int], branches: Sequence[Sequence[int]] = (), prefix: Prefix | None = None) -> None:
        """The last token of the trunk, or of every branch if there are any, is wanted."""
        assert all(branches) if branches else trunk, "a document, or one of its branches, has no token to read"
        document = Document(len(self.ids), len(trunk), tuple(len(branch) for branch in branches), prefix)
        first = document.prefix_length
        self.documents.append(document)
        self.ids.extend(trunk)
        self.positions.extend(range(first, first + len(trunk)))
        for branch in branches:
            self.ids.extend(branch)
            self.positions.extend(range(first + len(trunk), first + len(trunk) + len(branch)))
            self.ends.append(len(self.ids) - 1)
        if not branches:
            self.ends.append(len(self.ids) - 1)

    @property
    def wanted(self) -> Tensor:
        return torch.tensor(self.ends)

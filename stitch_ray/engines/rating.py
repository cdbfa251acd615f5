"""How a `RatingBatch` becomes forwards: three ways to the same logits, from fast to plain.

`documents`  a flat unpadded row through `documents.py`; prefixes recorded once, prompts as branches of their content
`cached`     padded batches through the model's own key/value cache, for models outside `AttentionInterface`
`plain`      one sequence a forward; always right, and the yardstick the other two are checked against

All read the rating from an output head cut down to the rating tokens' rows, inside the model's own forward, so that
soft-capping and logit scales apply as the model defines them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stitch_ray.engines import documents
from stitch_ray.engines.base import Ids, RatingBatch
from stitch_ray.engines.documents import Pass, Prefix, RowBuilder, attention_pass
from stitch_ray.engines.trim import only_at, trim_last_layer

Logits = NDArray[np.float32]


@contextmanager
def attention(model: nn.Module, implementation: str) -> Iterator[None]:
    """Switch the model's attention implementation inside."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def rating_head(model: nn.Module, rating_ids: Ids) -> Iterator[None]:
    """Swap the output head for its rows of `rating_ids`; the model's logits become (…, ratings)."""
    head = model.get_output_embeddings()
    rows = torch.tensor(rating_ids, device=head.weight.device)
    small = nn.Linear(
        head.weight.shape[1], len(rating_ids), bias=getattr(head, "bias", None) is not None, device="meta"
    )
    small.weight = nn.Parameter(head.weight[rows], requires_grad=False)
    if small.bias is not None:
        small.bias = nn.Parameter(head.bias[rows], requires_grad=False)
    model.set_output_embeddings(small)
    try:
        yield
    finally:
        model.set_output_embeddings(head)


def _fill(items: Iterable[tuple[int, Any]], budget: int) -> Iterator[list[Any]]:
    """Group `(cost, item)` in order into lists whose costs sum to at most `budget` (a single item may exceed it)."""
    group: list[Any] = []
    total = 0
    for cost, item in items:
        if group and total + cost > budget:
            yield group
            group, total = [], 0
        group.append(item)
        total += cost
    if group:
        yield group


class PlainRater:
    """One whole sequence a forward."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def rate(self, batch: RatingBatch) -> Logits:
        out = np.empty((len(batch.bodies), batch.num_prompts, len(batch.rating_ids)), np.float32)
        with torch.inference_mode(), rating_head(self._model, batch.rating_ids):
            for body in range(len(batch.bodies)):
                for prompt in range(batch.num_prompts):
                    ids = torch.tensor([batch.sequence(body, prompt)], device=self._model.device)
                    out[body, prompt] = self._model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
        return out


class DocumentRater:
    """Flat rows of about `token_budget` tokens. Prefixes stay recorded for the next batch with the same heads."""

    def __init__(self, model: nn.Module, token_budget: int) -> None:
        documents.register()
        self._model = model
        self._budget = token_budget
        self._heads: dict[Ids, Prefix | None] = {(): None}
        probe = Pass([documents.Document(0, 2)], num_layers=0)

        def forward() -> None:
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            with torch.inference_mode(), attention_pass(probe):
                model(input_ids=ids, position_ids=torch.arange(2, device=model.device)[None], use_cache=False)

        with attention(model, documents.IMPLEMENTATION):
            self.trimmed = trim_last_layer(model, forward, lambda: probe.last_module)
        self._num_layers = probe.layer
        if not self._num_layers:
            raise documents.UnsupportedAttentionError(f"{type(model).__name__} does not use AttentionInterface")

    def rate(self, batch: RatingBatch) -> Logits:
        out = np.empty((len(batch.bodies), batch.num_prompts, len(batch.rating_ids)), np.float32)
        fast = attention(self._model, documents.IMPLEMENTATION)
        with torch.inference_mode(), fast, rating_head(self._model, batch.rating_ids):
            if len(batch.tails) > 1:
                self._rate_trees(batch, out)
            else:
                self._rate_rows(batch, out)
        return out

    def _rate_rows(self, batch: RatingBatch, out: Logits) -> None:
        prefixes = [self._prefix(head) for head in batch.heads]
        tail = batch.tails[0]
        items = (
            (len(body) + len(tail), (b, k)) for k in range(batch.num_prompts) for b, body in enumerate(batch.bodies)
        )
        for group in _fill(items, self._budget):
            row = RowBuilder()
            for b, k in group:
                row.add(batch.bodies[b] + tail, prefix=prefixes[k])
            logits = self._forward(row)
            out[tuple(np.array(group).T)] = logits

    def _rate_trees(self, batch: RatingBatch, out: Logits) -> None:
        prefix = self._prefix(batch.heads[0])
        tails = sum(len(tail) for tail in batch.tails)
        for group in _fill(((len(body) + tails, b) for b, body in enumerate(batch.bodies)), self._budget):
            row = RowBuilder()
            for b in group:
                row.add(batch.bodies[b], batch.tails, prefix)
            out[group] = self._forward(row).reshape(len(group), batch.num_prompts, -1)

    def _prefix(self, head: Ids) -> Prefix | None:
        if head not in self._heads:
            prefix = Prefix(len(head))
            ids = torch.tensor([head], device=self._model.device)
            plan = Pass([documents.Document(0, len(head))], self._num_layers, recording=prefix)
            with attention_pass(plan):
                self._model(
                    input_ids=ids, position_ids=torch.arange(len(head), device=ids.device)[None], use_cache=False
                )
            self._heads[head] = prefix
        return self._heads[head]

    def _forward(self, row: RowBuilder) -> Logits:
        device = self._model.device
        ids = torch.tensor([row.ids], device=device)
        positions = torch.tensor([row.positions], device=device)
        wanted = row.wanted.to(device)
        plan = Pass(row.documents, self._num_layers, last_only=True)
        with attention_pass(plan), only_at(wanted):
            logits = self._model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=wanted).logits
        return logits[0].float().cpu().numpy()


class CachedRater:
    """Padded batches behind the model's own key/value cache: of the head (`prompt_first`) or of the content."""

    def __init__(self, model: nn.Module, token_budget: int) -> None:
        self._model = model
        self._budget = token_budget
        self._heads: dict[Ids, Any] = {}

    def rate(self, batch: RatingBatch) -> Logits:
        out = np.empty((len(batch.bodies), batch.num_prompts, len(batch.rating_ids)), np.float32)
        order = sorted(range(len(batch.bodies)), key=lambda b: (len(batch.bodies[b]), b))
        with torch.inference_mode(), rating_head(self._model, batch.rating_ids):
            if len(batch.tails) > 1:
                for group in self._groups(order, [len(body) for body in batch.bodies]):
                    self._rate_contents(batch, group, out)
            else:
                lengths = [len(body) + len(batch.tails[0]) for body in batch.bodies]
                for prompt in range(batch.num_prompts):
                    for group in self._groups(order, lengths):
                        self._rate_prompt(batch, prompt, group, out)
        return out

    def _groups(self, order: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
        group: list[int] = []
        for item in order:
            if group and (len(group) + 1) * lengths[item] > self._budget:
                yield group
                group = []
            group.append(item)
        if group:
            yield group

    def _rate_prompt(self, batch: RatingBatch, prompt: int, group: list[int], out: Logits) -> None:
        head = batch.head(prompt)
        rows = [batch.bodies[b] + batch.tails[0] for b in group]
        cache, mask = None, None
        if head:
            cache = self._repeat(self._head_cache(head), len(rows))
            mask = torch.ones(len(rows), len(head), dtype=torch.long, device=self._model.device)
        logits, _, _ = self._forward(rows, cache, mask, torch.full((len(rows),), len(head)))
        out[group, prompt] = _last(logits, rows)

    def _rate_contents(self, batch: RatingBatch, group: list[int], out: Logits) -> None:
        rows = [batch.head(0) + batch.bodies[b] for b in group]
        _, cache, mask = self._forward(rows, None, None, torch.zeros(len(rows), dtype=torch.long), use_cache=True)
        cache.batch_repeat_interleave(batch.num_prompts)
        mask = mask.repeat_interleave(batch.num_prompts, 0)
        starts = torch.tensor([len(row) for row in rows]).repeat_interleave(batch.num_prompts)
        tails = list(batch.tails) * len(group)
        logits, _, _ = self._forward(tails, cache, mask, starts)
        out[group] = _last(logits, tails).reshape(len(group), batch.num_prompts, -1)

    def _forward(
        self, rows: Sequence[Ids], cache: Any, mask: Tensor | None, starts: Tensor, use_cache: bool = False
    ) -> tuple[Tensor, Any, Tensor]:
        device, width = self._model.device, max(len(row) for row in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.long)
        own = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            own[i, : len(row)] = 1
        own = own.to(device)
        mask = own if mask is None else torch.cat((mask, own), 1)
        result = self._model(
            input_ids=ids.to(device),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=use_cache or cache is not None,
            **self._positions(starts.to(device), width),
        )
        return result.logits, result.past_key_values if use_cache else None, mask

    def _positions(self, starts: Tensor, width: int) -> dict[str, Tensor]:
        if not _accepts(self._model, "position_ids"):
            return {}
        return {"position_ids": starts[:, None] + torch.arange(width, device=starts.device)}

    def _head_cache(self, head: Ids) -> Any:
        if head not in self._heads:
            ids = torch.tensor([head], device=self._model.device)
            self._heads[head] = self._model(input_ids=ids, use_cache=True).past_key_values
        return self._heads[head]

    @staticmethod
    def _repeat(cache: Any, times: int) -> Any:
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(times)
        return cache


def _last(logits: Tensor, rows: Sequence[Ids]) -> Logits:
    ends = torch.tensor([len(row) - 1 for row in rows], device=logits.device)
    return logits[torch.arange(len(rows), device=logits.device), ends].float().cpu().numpy()


def _accepts(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters

"""How a `RatingBatch` becomes forwards: three ways to the same logits, from fast to plain.

`documents`  a flat unpadded row through `documents.py`; prefixes recorded once, prompts as branches of their content
`cached`     padded batches through the model's own key/value cache, for models outside `AttentionInterface`
`plain`      one sequence a forward; always right, and the yardstick the other two are checked against

The first two read the rating from an output head cut down to the rating tokens' rows, inside the model's own forward,
so that soft-capping and logit scales apply as the model defines them. `plain` leaves the model as it is.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from stitch_ray.engines import documents
from stitch_ray.engines.base import Ids, RatingBatch
from stitch_ray.engines.documents import Pass, Prefix, RowBuilder, attention_pass
from stitch_ray.engines.trim import find_positionwise, only_at

log = logging.getLogger(__name__)

Logits = NDArray[np.float32]
"""Rating logits, shape (bodies, prompts, ratings)."""

CHECK_TOLERANCE = {torch.bfloat16: 1.2e-1, torch.float16: 2e-2}
"""Largest `disagreement` that is still rounding, by dtype; 1e-3 for others.

Seen with 2 to 24 layers: bfloat16 up to 7e-2, float16 1e-2, float32 4e-6; mistakes of structure gave 1.5e-1 or more.
"""


class Rater(Protocol):
    def rate(self, batch: RatingBatch) -> Logits: ...


def fastest_rater(model: nn.Module, token_budget: int, num_ratings: int = 5) -> tuple[str, Rater]:
    """The fastest way that runs on this model and agrees with the plain one on made-up sequences, with its name.

    Ways that fail are logged. Sequences of more than `plain_beyond(model)` tokens need `PlainRater` all the same.
    """
    model_name = type(model).__name__
    for name, make in (("documents", DocumentRater), ("cached", CachedRater)):
        try:
            rater: Rater = make(model, token_budget)
            difference = disagreement(model, rater, num_ratings)
        except Exception as error:  # any model-specific failure means: not this way
            log.warning("%s: rating path %s does not run (%s: %s)", model_name, name, type(error).__name__, error)
            continue
        if difference <= CHECK_TOLERANCE.get(model.dtype, 1e-3):
            log.info("%s: rating path %s, check %.1e", model_name, name, difference)
            return name, rater
        log.warning("%s: rating path %s is off by %.1e, not used", model_name, name, difference)
    log.warning("%s: rated one sequence at a time", model_name)
    return "plain", PlainRater(model)


def disagreement(model: nn.Module, rater: Rater, num_ratings: int = 5) -> float:
    """How far `rater` is from the plain way, as a share of how far bodies are apart; the worse of both layouts.

    Root mean squares of log-probabilities over the ratings, on short made-up sequences. A share, since rounding grows
    with the logits, and so that a model with small weights does not pass by having small logits. NaN: cannot tell.
    """
    generator = torch.Generator().manual_seed(0)
    top = min(model.get_input_embeddings().weight.shape[0], model.get_output_embeddings().weight.shape[0])

    def ids(length: int) -> Ids:
        return tuple(torch.randint(0, top, (length,), generator=generator).tolist())

    rating_ids = ids(num_ratings)
    bodies, sides = (ids(9), ids(23), ids(14)), (ids(7), ids(4))
    shares = []
    for heads, tails in ((sides, (ids(3),)), (((),), sides)):
        batch = RatingBatch(heads=heads, bodies=bodies, tails=tails, rating_ids=rating_ids)
        expected = _log_softmax(PlainRater(model).rate(batch))
        off = _log_softmax(rater.rate(batch)) - expected
        shares.append(np.linalg.norm(off) / np.linalg.norm(expected - expected.mean(0)))
    return float(np.max(shares))


def _log_softmax(logits: Logits) -> NDArray[np.float64]:
    z = logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))


def plain_beyond(model: nn.Module) -> float:
    """Longest sequence that may share a forward or a prefix with others.

    "longrope" (Phi 3 with 128k context) rotates every token of a longer sequence by other frequencies, which depend on
    the longest sequence of the forward.
    """
    limits = [float("inf")]
    for module in model.modules():
        rope = getattr(getattr(module, "config", None), "rope_parameters", None) or {}
        for parameters in (rope, *rope.values()):
            if isinstance(parameters, dict) and parameters.get("rope_type") == "longrope":
                limits.append(parameters["original_max_position_embeddings"])
    return min(limits)


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
    """One whole sequence a forward, through the model as it was loaded."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._last_only = {"logits_to_keep": 1} if _accepts(model, "logits_to_keep") else {}

    def rate(self, batch: RatingBatch) -> Logits:
        out = _empty(batch)
        with torch.inference_mode():
            for body in range(len(batch.bodies)):
                for prompt in range(batch.num_prompts):
                    ids = torch.tensor([batch.sequence(body, prompt)], device=self._model.device)
                    logits = self._model(input_ids=ids, use_cache=False, **self._last_only).logits[0, -1]
                    out[body, prompt] = logits[list(batch.rating_ids)].float().cpu()
        return out


class DocumentRater:
    """Flat rows of about `token_budget` tokens. Prefixes stay recorded for the next batch with the same heads."""

    def __init__(self, model: nn.Module, token_budget: int) -> None:
        layer_types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
        if not layer_types <= documents.LAYER_TYPES:
            raise documents.UnsupportedAttentionError(f"layers {sorted(layer_types - documents.LAYER_TYPES)}")
        documents.register()
        self._model = model
        self._budget = token_budget
        self._heads: dict[Ids, Prefix | None] = {(): None}
        probe = Pass([documents.Document(0, 2)])

        def forward() -> None:
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.device)
            with torch.inference_mode(), attention_pass(probe):
                model(input_ids=ids, position_ids=torch.arange(2, device=model.device)[None], use_cache=False)

        with attention(model, documents.IMPLEMENTATION):
            self.trimmed = find_positionwise(model, forward, lambda: probe.last_module)
        self._num_layers = probe.layer
        if not self._num_layers:
            raise documents.UnsupportedAttentionError("the model does not use AttentionInterface")
        probe.check_windows()

    def rate(self, batch: RatingBatch) -> Logits:
        out = _empty(batch)
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
        with attention_pass(plan), only_at(list(self.trimmed.values()), wanted):
            logits = self._model(input_ids=ids, position_ids=positions, use_cache=False, logits_to_keep=wanted).logits
        return logits[0].float().cpu().numpy()


class CachedRater:
    """Padded batches behind the model's own key/value cache: of the head (`prompt_first`) or of the content.

    What is cached is padded on the left and what follows it on the right, so that the tokens of a sequence stay side by
    side: sliding caches keep the right ones, and biases by distance (ALiBi) hold.
    """

    def __init__(self, model: nn.Module, token_budget: int) -> None:
        self._model = model
        self._budget = token_budget
        self._takes_positions = _accepts(model, "position_ids")
        self._heads: dict[Ids, Any] = {}
        self.trimmed = self._find_positionwise()

    def rate(self, batch: RatingBatch) -> Logits:
        out = _empty(batch)
        with torch.inference_mode(), rating_head(self._model, batch.rating_ids):
            if len(batch.tails) > 1:
                for group in self._groups([len(body) for body in batch.bodies]):
                    self._rate_contents(batch, group, out)
            else:
                groups = list(self._groups([len(body) + len(batch.tails[0]) for body in batch.bodies]))
                for prompt in range(batch.num_prompts):
                    for group in groups:
                        self._rate_prompt(batch, prompt, group, out)
        return out

    def _find_positionwise(self) -> dict[str, nn.Module]:
        """What runs behind the last module that calls itself an attention."""
        computed: list[nn.Module] = []
        attentions = [module for module in self._model.modules() if "attention" in type(module).__name__.lower()]
        handles = [module.register_forward_hook(lambda m, _i, _o: computed.append(m)) for module in attentions]

        def forward() -> None:
            with torch.inference_mode():
                self._model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=self._model.device), use_cache=False)

        try:
            return find_positionwise(self._model, forward, lambda: computed[-1] if computed else None)
        finally:
            for handle in handles:
                handle.remove()

    def _groups(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Bodies by length, shortest first; a group, padded to its longest, stays within the token budget."""
        group: list[int] = []
        for body in sorted(range(len(lengths)), key=lambda b: lengths[b]):
            if group and (len(group) + 1) * lengths[body] > self._budget:
                yield group
                group = []
            group.append(body)
        if group:
            yield group

    def _rate_prompt(self, batch: RatingBatch, prompt: int, group: list[int], out: Logits) -> None:
        head = batch.head(prompt)
        rows = [batch.bodies[b] + batch.tails[0] for b in group]
        cache, before = None, torch.ones(len(rows), len(head), dtype=torch.long)
        if head:
            cache = copy.deepcopy(self._head_cache(head))
            cache.batch_repeat_interleave(len(rows))
        out[group, prompt] = self._last_logits(rows, cache, before)

    def _rate_contents(self, batch: RatingBatch, group: list[int], out: Logits) -> None:
        ids, mask = _pad([batch.head(0) + batch.bodies[b] for b in group], left=True)
        cache = self._forward(ids, mask, None).past_key_values
        cache.batch_repeat_interleave(batch.num_prompts)
        logits = self._last_logits(list(batch.tails) * len(group), cache, mask.repeat_interleave(batch.num_prompts, 0))
        out[group] = logits.reshape(len(group), batch.num_prompts, -1)

    def _head_cache(self, head: Ids) -> Any:
        if head not in self._heads:
            self._heads[head] = self._forward(*_pad([head]), None).past_key_values
        return self._heads[head]

    def _last_logits(self, rows: Sequence[Ids], cache: Any, before: Tensor) -> Logits:
        """Logits behind the last token of every row; `before` masks what the cache holds."""
        ids, mask = _pad(rows)
        ends = mask.sum(1) - 1
        logits = self._forward(ids, torch.cat((before, mask), 1), cache, ends).logits
        return logits[torch.arange(len(rows)), ends].float().cpu().numpy()

    def _forward(self, ids: Tensor, mask: Tensor, cache: Any, ends: Tensor | None = None) -> Any:
        """One forward. Behind the last attention only position `ends` of every row is computed; default: the last."""
        device = self._model.device
        rows, width = ids.shape
        wanted = torch.arange(rows) * width + (width - 1 if ends is None else ends)
        positions = {}
        if self._takes_positions:
            positions["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :].to(device)
        with only_at(list(self.trimmed.values()), wanted.to(device)):
            return self._model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                past_key_values=cache,
                use_cache=True,
                **positions,
            )


def _pad(rows: Sequence[Ids], *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Token ids and their mask, both (rows, longest row). The padding id does not matter: the mask hides it."""
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if left else slice(len(row))
        ids[i, at], mask[i, at] = torch.tensor(row), 1
    return ids, mask


def _empty(batch: RatingBatch) -> Logits:
    return np.empty((len(batch.bodies), batch.num_prompts, len(batch.rating_ids)), np.float32)


def _accepts(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters

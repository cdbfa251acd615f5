"""Forward and backward over the same examples: packed rows, padded batches, one example at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.finetuning.workload import encoded, listed, make_model, verdict, write_dataset
from benchmarks.harness import interleave, median, table
from stitch_ray.records import Example
from stitch_ray.training import attention
from stitch_ray.training.collate import collate
from stitch_ray.training.dataset import TokenDataset
from stitch_ray.training.forward import Forward
from stitch_ray.training.losses import LossTotals, multitask_loss
from stitch_ray.training.packing import pack, utilisation

BATCH = 8
CAPACITIES = (1024, 2048)


class Sides:
    """Every side takes groups of rows and returns the loss of all of them, a mean over tokens with loss."""

    def __init__(self, folder: Path, data: TokenDataset) -> None:
        attention.register()
        self.data = data
        self.packed: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention.IMPLEMENTATION)
        self.plain: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
        self.forward = Forward(self.packed, packing=True, device=torch.device("cpu"))
        for model in (self.packed, self.plain):
            model.train()
        everything = torch.tensor([data.loss_weights.sum()]), torch.tensor([len(data)], dtype=torch.float64)
        self.totals = LossTotals(*everything)

    def ours(self, groups: Sequence[Sequence[int]]) -> float:
        """The product's forward and loss."""

        def loss(group: Sequence[int]) -> Tensor:
            found = self.forward(self.packed, self.data, group)
            return multitask_loss(
                found.losses,
                found.weights,
                found.task_ids,
                mode="token_mean",
                example_ids=found.example_ids,
                totals=self.totals,
            )

        return self._backward(self.packed, groups, loss)

    def padded(self, groups: Sequence[Sequence[int]]) -> float:
        """The usual call: rectangle, attention mask, logits everywhere. Groups of one have no padding and no mask."""

        def loss(group: Sequence[int]) -> Tensor:
            batch = collate([(*self.data.tokens(row), 0) for row in group], packing=False, pad_id=0)
            mask = batch.attention_mask if len(group) > 1 else None
            logits = self.plain(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).logits
            return self._token_mean(logits, batch.targets, batch.weights)

        return self._backward(self.plain, groups, loss)

    def dense(self, groups: Sequence[Sequence[int]]) -> float:
        """Packed rows under one (tokens, tokens) mask for all heads."""

        def loss(group: Sequence[int]) -> Tensor:
            batch = collate([(*self.data.tokens(row), 0) for row in group], packing=True, pad_id=0)
            document, tokens = batch.example_ids[0], batch.example_ids.shape[1]
            mask = (document[:, None] == document) & torch.ones(tokens, tokens, dtype=torch.bool).tril()
            logits = self.plain(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                attention_mask=mask[None, None],
                use_cache=False,
            ).logits
            return self._token_mean(logits, batch.targets, batch.weights)

        return self._backward(self.plain, groups, loss)

    def _token_mean(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        chosen = torch.where(weights > 0, targets, -100).flatten()
        return F.cross_entropy(logits.flatten(0, 1), chosen, ignore_index=-100, reduction="sum") / float(
            self.totals.weights
        )

    def _backward(self, model: Any, groups: Sequence[Sequence[int]], loss: Callable[[Sequence[int]], Tensor]) -> float:
        model.zero_grad()
        total = 0.0
        for group in groups:
            part = loss(group)
            part.backward()
            total += part.item()
        return total


def _batches(order: Sequence[int], size: int) -> list[list[int]]:
    return [list(order[i : i + size]) for i in range(0, len(order), size)]


def _padded_share(groups: Sequence[Sequence[int]], lengths: np.ndarray) -> float:
    """Tokens over computed positions."""
    positions = sum(len(group) * int(lengths[list(group)].max()) for group in groups)
    return float(lengths.sum() / positions)


def compare(
    folder: Path, source: str, data: Sequence[Example], *, repeats: int, count: int
) -> tuple[str, dict[str, Any]]:
    """Useful tokens a second of all sides, their losses, and how full packing makes the rows of the whole file."""
    model = folder / "llama"
    if not model.exists():
        make_model(model, data)
    records = encoded(data, model, max_length=1024)
    small = write_dataset(folder / "packing.arrow", records[:count])
    lengths = small.lengths
    sides = Sides(model, small)
    order = list(range(count))
    by_length = np.argsort(lengths, kind="stable").tolist()
    rows = {capacity: pack(lengths, capacity) for capacity in CAPACITIES}
    plans: dict[str, tuple[Callable[[Any], float], list[list[int]], float]] = {
        f"ours, packed {capacity}": (sides.ours, rows[capacity], utilisation(rows[capacity], lengths, capacity))
        for capacity in CAPACITIES
    }
    random, grouped = _batches(order, BATCH), _batches(by_length, BATCH)
    plans[f"padded, random batches of {BATCH}"] = sides.padded, random, _padded_share(random, lengths)
    plans[f"padded, batches of {BATCH} of like length"] = sides.padded, grouped, _padded_share(grouped, lengths)
    plans["batch 1, no padding"] = sides.padded, _batches(order, 1), 1.0
    plans["packed 1024, dense block mask"] = sides.dense, rows[1024], utilisation(rows[1024], lengths, 1024)

    losses: dict[str, float] = {}

    def timed(name: str) -> Callable[[], None]:
        side, groups, _ = plans[name]
        return lambda: losses.__setitem__(name, side(groups))

    seconds = interleave({name: timed(name) for name in plans}, repeats)
    rates = {name: float(lengths.sum()) / median(values) for name, values in seconds.items()}
    base = rates[f"padded, random batches of {BATCH}"]
    lines = [
        {
            "side": name,
            "filled": f"{plans[name][2]:.3f}",
            "seconds, every repetition": listed(values, 2),
            "useful tokens/s": f"{rates[name]:,.0f}",
            "x random padded": f"{rates[name] / base:.2f}",
            "loss": f"{losses[name]:.7f}",
        }
        for name, values in seconds.items()
    ]
    best = max(rates[f"ours, packed {capacity}"] for capacity in CAPACITIES)
    spread = max(losses.values()) - min(losses.values())
    whole = np.array([len(record.ids) for record in records])
    full = {capacity: utilisation(pack(whole, capacity), whole, capacity) for capacity in CAPACITIES}
    against = {
        "random padded": verdict(best / base, 2.2),
        "like length": verdict(best / rates[f"padded, batches of {BATCH} of like length"], 1.3),
        "batch 1": verdict(best / rates["batch 1, no padding"], 1.0),
    }
    note = (
        f"{count} examples of {source}, {lengths.sum():,} tokens (mean {lengths.mean():.0f}, longest {lengths.max()}), "
        f"float32, {torch.get_num_threads()} threads, forward and backward. The better of ours against "
        + ", ".join(f"{name}: {text}" for name, text in against.items())
        + f". Largest difference of the losses: {spread:.1e} (bar 1e-5: {'met' if spread <= 1e-5 else 'MISSED'}). "
        f"Rows packed from all {len(whole)} examples are filled to "
        + " and ".join(f"{share:.2%} (rows of {capacity})" for capacity, share in full.items())
        + " (bar 95 %)."
    )
    facts = {"seconds": seconds, "tokens": int(lengths.sum()), "losses": losses, "utilisation": full}
    return f"{table(lines)}\n\n{note}", facts

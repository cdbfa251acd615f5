"""From a micro-batch to the losses of its tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from stitch_ray.training import attention
from stitch_ray.training.collate import Batch, collate
from stitch_ray.training.dataset import TokenDataset

_PAD = 0  # any id does: nothing attends to padding and nothing there carries loss


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Cross-entropy in nats of the targets that carry loss, and what they belong to; all (1, targets).

    `tokens` are those of the micro-batch, `positions` those that were computed: the rest was padding.
    """

    losses: Tensor
    weights: Tensor
    task_ids: Tensor
    example_ids: Tensor
    tokens: int
    positions: int


class Forward:
    """Runs micro-batches of `data` through a model. Without packing they are padded to the longest example."""

    def __init__(self, model: torch.nn.Module, *, packing: bool, device: torch.device) -> None:
        self._packing = packing
        self._device = device
        self._keeps_logits = "logits_to_keep" in inspect.signature(_language_model(model).forward).parameters

    def __call__(self, model: Callable[..., Any], data: TokenDataset, rows: Sequence[int]) -> TokenLosses:
        """Losses of the rows' tokens. No rows: a forward of the same kind, whose tokens carry no loss.

        `model` is the model or the DeepSpeed engine around it.
        """
        examples = [(*data.tokens(row), int(data.task_ids[row])) for row in rows]
        batch = collate(examples or [_nothing()], packing=self._packing, pad_id=_PAD)
        # Found on the CPU, where it does not wait for the device. A forward of nothing needs a position too.
        chosen = torch.nonzero(batch.weights.flatten() > 0).flatten()
        chosen = chosen if len(chosen) else torch.tensor([0])
        batch, chosen = batch.to(self._device), chosen.to(self._device)
        logits = self._logits(model, batch, chosen)
        losses = F.cross_entropy(logits.float(), batch.targets.flatten()[chosen], reduction="none")
        return TokenLosses(
            losses[None],
            batch.weights.flatten()[None, chosen],
            batch.task_ids.flatten()[None, chosen],
            batch.example_ids.flatten()[None, chosen],
            tokens=sum(len(ids) for ids, _, _ in examples),
            positions=batch.input_ids.numel() if examples else 0,
        )

    def _logits(self, model: Callable[..., Any], batch: Batch, chosen: Tensor) -> Tensor:
        """Logits at the chosen positions of the flattened batch, (chosen, vocabulary)."""
        arguments: dict[str, Any] = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        if batch.attention_mask is None:
            arguments.update(attention.packed_arguments(batch.document_lengths, self._device))
            if self._keeps_logits:
                logits: Tensor = model(**arguments, logits_to_keep=chosen, use_cache=False).logits
                return logits[0]
        else:
            arguments["attention_mask"] = batch.attention_mask
        return model(**arguments, use_cache=False).logits.flatten(0, 1)[chosen]


def _language_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model below an adapter."""
    below = getattr(model, "get_base_model", None)
    found: torch.nn.Module = below() if below else model
    return found


def _nothing() -> tuple[Any, Any, int]:
    import numpy as np

    return np.zeros(2, np.int32), np.zeros(2, np.float32), 0

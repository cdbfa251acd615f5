"""From a micro-batch to the losses of its tokens, or of its sequences where a classifier is trained."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from stitch_ray.training import attention
from stitch_ray.training.collate import Batch, collate, collate_sequences
from stitch_ray.training.dataset import TokenDataset

_PAD = 0  # any id does: nothing attends to padding and nothing there carries loss


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """Losses of the targets, and what they belong to; all (1, targets).

    Targets are the tokens that carry loss (cross-entropy in nats), or the sequences of a classifier. `tokens` are those of the micro-batch, `positions` those that were computed: the rest was padding.
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


class ClassifierForward:
    """Runs padded micro-batches of labelled rows through a sequence classifier with one output.

    `loss`: "bce" is the cross-entropy in nats between label and sigmoid of the logit, for labels anywhere in [0, 1];
    "mse" the squared difference of label and logit.
    """

    def __init__(self, model: Any, *, loss: Literal["bce", "mse"], device: torch.device) -> None:
        self._loss = loss
        self._device = device
        # Not any id: some models tell from it where padding is (RoBERTa its positions, decoders their last token).
        self._pad_id = int(model.config.get_text_config().pad_token_id)
        self._tells_segments = tells_segments(model)
        self._caches = "use_cache" in inspect.signature(model.forward).parameters

    def __call__(self, model: Callable[..., Any], data: TokenDataset, rows: Sequence[int]) -> TokenLosses:
        """Losses of the rows. No rows: a forward of the same kind, whose loss has weight 0."""
        sequences = [
            (data.tokens(row)[0], int(data.seconds[row]), float(data.labels[row]), float(data.loss_weights[row]))
            for row in rows
        ]
        nothing = (np.array([self._pad_id == 0], np.int32), 0, 0.0, 0.0)
        batch = collate_sequences(sequences or [nothing], self._pad_id).to(self._device)
        arguments: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if self._tells_segments:
            arguments["token_type_ids"] = batch.token_type_ids
        if self._caches:
            arguments["use_cache"] = False
        logits = model(**arguments).logits[:, 0].float()
        if self._loss == "bce":
            losses = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none")
        else:
            losses = (logits - batch.labels) ** 2
        count = torch.arange(len(losses), device=self._device)
        return TokenLosses(
            losses[None],
            batch.weights[None],
            torch.zeros_like(count)[None],
            count[None],
            tokens=sum(len(ids) for ids, *_ in sequences),
            positions=batch.input_ids.numel() if sequences else 0,
        )


def tells_segments(model: Any) -> bool:
    """Whether the model has embeddings that tell the two texts of a pair apart (`token_type_ids`)."""
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    return takes and getattr(model.config, "type_vocab_size", 0) > 1


def _language_model(model: torch.nn.Module) -> torch.nn.Module:
    """The model below an adapter."""
    below = getattr(model, "get_base_model", None)
    found: torch.nn.Module = below() if below else model
    return found


def _nothing() -> tuple[Any, Any, int]:
    return np.zeros(2, np.int32), np.zeros(2, np.float32), 0

"""From the token rows of a micro-batch to the tensors of one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DatasetRow = tuple[NDArray[np.int32], NDArray[np.float32], int]
"""Token ids (length,), the weight of predicting each of them (length,), and the task."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch. B rows of T tokens; packed: B = 1, documents one after another.

    `targets[b, t]` is the token after position t of the same document and `weights[b, t]` the weight of its loss; both
    are 0 at the last token of a document and on padding. `example_ids` count the examples of the micro-batch from 0;
    padding has the ids of example 0, so that every example has one task.
    """

    input_ids: Tensor  # (B, T) int64
    position_ids: Tensor  # (B, T) int64, from 0 in every document
    attention_mask: Tensor | None  # (B, T) int64, 0 on padding; None: packed
    targets: Tensor  # (B, T) int64
    weights: Tensor  # (B, T) float32
    task_ids: Tensor  # (B, T) int64
    example_ids: Tensor  # (B, T) int64
    document_lengths: tuple[int, ...]  # packed: tokens of every document in row order; padded: ()

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        mask = self.attention_mask
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            attention_mask=None if mask is None else mask.to(device),
            targets=self.targets.to(device),
            weights=self.weights.to(device),
            task_ids=self.task_ids.to(device),
            example_ids=self.example_ids.to(device),
        )


def collate(dataset_rows: Sequence[DatasetRow], packing: bool, pad_id: int) -> Batch:
    """One flat row without padding, or a rectangle padded with `pad_id` on the right."""
    lengths = [len(ids) for ids, _, _ in dataset_rows]
    padding = dataset_rows[0][2]
    join = _flat if packing else _rectangle

    def joined(make: Callable[[int], NDArray[np.generic]], dtype: torch.dtype, pad: int = 0) -> Tensor:
        return join([torch.from_numpy(make(i)).to(dtype) for i in range(len(dataset_rows))], pad)

    return Batch(
        input_ids=joined(lambda i: np.array(dataset_rows[i][0]), torch.int64, pad_id),
        position_ids=joined(lambda i: np.arange(lengths[i]), torch.int64),
        attention_mask=None if packing else joined(lambda i: np.ones(lengths[i]), torch.int64),
        targets=joined(lambda i: _next(dataset_rows[i][0]), torch.int64),
        weights=joined(lambda i: _next(dataset_rows[i][1]), torch.float32),
        task_ids=joined(lambda i: np.full(lengths[i], dataset_rows[i][2]), torch.int64, padding),
        example_ids=joined(lambda i: np.full(lengths[i], i), torch.int64),
        document_lengths=tuple(lengths) if packing else (),
    )


def _next(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """What follows each position; 0 behind the last."""
    return np.append(values[1:], np.zeros(1, values.dtype))


def _flat(documents: list[Tensor], _pad: int) -> Tensor:
    return torch.cat(documents)[None]


def _rectangle(documents: list[Tensor], pad: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=pad)

"""From the rows of a micro-batch to the tensors of one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

DatasetRow = tuple[NDArray[np.int32], NDArray[np.float32], int]
"""Token ids (length,), the weight of predicting each of them (length,), and the task."""

SequenceRow = tuple[NDArray[np.int32], int, float, float]
"""Token ids (length,), where the second text of a pair begins (0: there is one text), label, and weight of the loss."""


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


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """One micro-batch of sequences that are classified: B rows, padded on the right to T tokens."""

    input_ids: Tensor  # (B, T) int64
    attention_mask: Tensor  # (B, T) int64, 0 on padding
    token_type_ids: Tensor  # (B, T) int64, 1 in the second text of a pair; 0 on padding
    labels: Tensor  # (B,) float32
    weights: Tensor  # (B,) float32

    def to(self, device: torch.device | str) -> SequenceBatch:
        """The same batch on another device."""
        return SequenceBatch(*(getattr(self, name).to(device) for name in self.__slots__))


def collate_sequences(sequences: Sequence[SequenceRow], pad_id: int) -> SequenceBatch:
    """A rectangle padded with `pad_id` on the right."""
    rows = [torch.from_numpy(np.array(ids)).to(torch.int64) for ids, *_ in sequences]
    types = [torch.arange(len(ids)) >= (second or len(ids)) for ids, second, _, _ in sequences]
    return SequenceBatch(
        input_ids=_rectangle(rows, pad_id),
        attention_mask=_rectangle([torch.ones_like(row) for row in rows], 0),
        token_type_ids=_rectangle([one.to(torch.int64) for one in types], 0),
        labels=torch.tensor([label for _, _, label, _ in sequences], dtype=torch.float32),
        weights=torch.tensor([weight for *_, weight in sequences], dtype=torch.float32),
    )


def _next(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """What follows each position; 0 behind the last."""
    return np.append(values[1:], np.zeros(1, values.dtype))


def _flat(documents: list[Tensor], _pad: int) -> Tensor:
    return torch.cat(documents)[None]


def _rectangle(documents: list[Tensor], pad: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=pad)

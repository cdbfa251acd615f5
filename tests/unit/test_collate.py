"""Targets and weights belong to the token before them, and padding weighs nothing."""

import numpy as np
import pytest
import torch

from stitch_ray.training.collate import collate

pytestmark = pytest.mark.numeric

ROWS = [
    (np.array([5, 6, 7], np.int32), np.array([0, 0, 2], np.float32), 1),
    (np.array([8, 9, 10, 11, 12], np.int32), np.array([0, 0.5, 1, 0, 1], np.float32), 0),
    (np.array([13], np.int32), np.array([0], np.float32), 2),
]


def test_packed_rows_follow_one_another():
    batch = collate(ROWS, packing=True, pad_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0]]
    assert batch.targets.tolist() == [[6, 7, 0, 9, 10, 11, 12, 0, 0]]
    assert batch.weights.tolist() == [[0, 2, 0, 0.5, 1, 0, 1, 0, 0]]
    assert batch.task_ids.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0, 2]]
    assert batch.example_ids.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 2]]
    assert batch.attention_mask is None
    assert batch.document_lengths == (3, 5, 1)


def test_padded_rows_are_a_rectangle():
    batch = collate(ROWS, packing=False, pad_id=99)
    assert batch.input_ids.tolist() == [[5, 6, 7, 99, 99], [8, 9, 10, 11, 12], [13, 99, 99, 99, 99]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 0, 0, 0], [9, 10, 11, 12, 0], [0, 0, 0, 0, 0]]
    assert batch.weights.tolist() == [[0, 2, 0, 0, 0], [0.5, 1, 0, 1, 0], [0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]]
    assert batch.document_lengths == ()


def test_padding_belongs_to_example_0_and_to_its_task():
    """Else an example would have two tasks where losses are summed by example."""
    batch = collate(ROWS, packing=False, pad_id=0)
    assert batch.example_ids.tolist() == [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [2, 0, 0, 0, 0]]
    assert batch.task_ids.tolist() == [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0], [2, 1, 1, 1, 1]]


@pytest.mark.parametrize("packing", [True, False])
def test_every_weight_of_the_data_arrives_once(packing):
    batch = collate(ROWS, packing=packing, pad_id=0)
    assert batch.weights.sum() == sum(float(weights.sum()) for _, weights, _ in ROWS)


@pytest.mark.parametrize("packing", [True, False])
def test_types(packing):
    batch = collate(ROWS, packing=packing, pad_id=0)
    for name in ("input_ids", "position_ids", "targets", "task_ids", "example_ids"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.weights.dtype == torch.float32
    assert packing or batch.attention_mask.dtype == torch.int64


@pytest.mark.parametrize("packing", [True, False])
def test_a_batch_moves_as_a_whole(packing):
    moved = collate(ROWS, packing=packing, pad_id=0).to("meta")
    tensors = [value for name in moved.__slots__ if isinstance(value := getattr(moved, name), torch.Tensor)]
    assert len(tensors) == (6 if packing else 7)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.document_lengths == ((3, 5, 1) if packing else ())


def test_read_only_memory_is_not_kept():
    """Rows are views of a memory-mapped file."""
    ids = np.array([1, 2], np.int32)
    ids.flags.writeable = False
    batch = collate([(ids, np.array([0, 1], np.float32), 0)], packing=True, pad_id=0)
    batch.input_ids[0, 0] = 7
    assert ids[0] == 1

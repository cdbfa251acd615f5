"""The file of token rows: what is written is what is read, without copies, whatever the blocks."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from stitch_ray.training import dataset
from stitch_ray.training.dataset import TokenDataset
from stitch_ray.training.encode import Encoded

LENGTHS = [3, 1, 7, 2, 5, 4, 9, 1, 1, 6]


def encoded(row: int) -> Encoded:
    ids = np.arange(LENGTHS[row], dtype=np.int32) + 100 * row
    weights = np.linspace(0, 0.1 * row, LENGTHS[row], dtype=np.float32)
    return Encoded(ids, weights, truncated=False)


RECORDS = [(encoded(row), row // 4, f"example-{row}") for row in range(len(LENGTHS))]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "_ROWS_A_BLOCK", 4)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    dataset.write(tmp_path / "rows.arrow", [dataset.table(RECORDS)])
    return tmp_path / "rows.arrow"


def test_rows_come_back_as_they_were_written(path: Path) -> None:
    rows = TokenDataset.open(path)
    assert len(rows) == len(RECORDS)
    assert rows.lengths.tolist() == LENGTHS
    assert rows.lengths.dtype == np.int32
    assert rows.task_ids.tolist() == [task_id for _, task_id, _ in RECORDS]
    assert rows.task_ids.dtype == np.int32
    assert list(rows.example_ids) == [example_id for _, _, example_id in RECORDS]
    assert list(rows.example_ids[2:5]) == ["example-2", "example-3", "example-4"]
    assert rows.example_ids[np.int64(9)] == "example-9"
    for row, (record, _, _) in enumerate(RECORDS):
        ids, weights = rows.tokens(row)
        np.testing.assert_array_equal(ids, record.ids, strict=True)
        np.testing.assert_array_equal(weights, record.weights, strict=True)
        assert rows.loss_weights[row] == record.weights.sum(dtype=np.float64)


def test_tokens_are_views_of_the_file(path: Path) -> None:
    rows = TokenDataset.open(path)
    first, again = rows.tokens(6)[0], rows.tokens(6)[0]
    assert np.shares_memory(first, again)
    assert not first.flags.writeable
    assert not first.flags.owndata


def test_views_outlive_the_dataset(path: Path) -> None:
    ids, _ = TokenDataset.open(path).tokens(6)
    assert ids.tolist() == encoded(6).ids.tolist()


@pytest.mark.parametrize("sizes", [[10], [1] * 10, [3, 0, 6, 1], [4, 4, 2]])
def test_the_bytes_do_not_depend_on_the_pieces_they_came_in(path: Path, tmp_path: Path, sizes: list[int]) -> None:
    ends = np.cumsum(sizes)
    pieces = [RECORDS[end - size : end] for end, size in zip(ends, sizes, strict=True)]
    dataset.write(tmp_path / "other.arrow", (dataset.table(piece) for piece in pieces))
    assert (tmp_path / "other.arrow").read_bytes() == path.read_bytes()


def test_a_pickle_is_the_path(path: Path) -> None:
    pickled = pickle.dumps(TokenDataset.open(path))
    assert len(pickled) < 500
    assert pickle.loads(pickled).tokens(2)[0].tolist() == encoded(2).ids.tolist()


def test_an_empty_split_is_a_file_as_well(tmp_path: Path) -> None:
    dataset.write(tmp_path / "none.arrow", [dataset.table([])])
    rows = TokenDataset.open(tmp_path / "none.arrow")
    assert len(rows) == len(rows.lengths) == len(rows.task_ids) == len(rows.loss_weights) == len(rows.example_ids) == 0


@pytest.mark.parametrize("row", [-1, 10])
def test_a_row_that_is_not_there_is_an_error(path: Path, row: int) -> None:
    with pytest.raises(IndexError, match=f"row {row} of 10"):
        TokenDataset.open(path).tokens(row)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken():
        yield dataset.table(RECORDS)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        dataset.write(tmp_path / "rows.arrow", broken())
    assert list(tmp_path.iterdir()) == []

"""Tokenised records as one memory-mapped Arrow file a split, over all tasks; with labels for a classifier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stitch_ray.runs import atomic_path
from stitch_ray.training.encode import Encoded

SCHEMA = pa.schema(
    [
        ("ids", pa.large_list(pa.int32())),
        ("weights", pa.large_list(pa.float32())),
        ("task_id", pa.int32()),
        ("loss_weight", pa.float64()),
        ("example_id", pa.string()),
    ]
)
LABELLED_SCHEMA = pa.schema([*SCHEMA, ("label", pa.float32()), ("second", pa.int32())])
"""Of records that are classified as a whole; `weights` is then 0 but for the last token, which has the record's."""

_ROWS_A_BLOCK = 4096


class TokenDataset:
    """Tokenised records, read-only. Only the index is held in memory; it is pickled as its path.

    `lengths`: (rows,) int32, tokens. `task_ids`: (rows,) int32. `loss_weights`: (rows,) float64, the sum of a row's
    token weights. `example_ids`: (rows,), unique within a task. Of a file with labels also `labels`: (rows,) float32 in
    [0, 1], and `seconds`: (rows,) int32, where the second text of a pair begins; of others these are empty.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with pa.memory_map(str(self.path)) as source, pa.ipc.open_file(source) as reader:
            blocks = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._blocks = [_Block.of(block) for block in blocks]
        self._starts = np.cumsum([0, *(block.num_rows for block in blocks)])
        self.lengths = _joined([np.diff(block.offsets) for block in self._blocks], np.int32)
        self.task_ids = _joined([block["task_id"].to_numpy() for block in blocks], np.int32)
        self.loss_weights = _joined([block["loss_weight"].to_numpy() for block in blocks], np.float64)
        self.example_ids: Sequence[str] = _Strings(
            pa.chunked_array([block["example_id"] for block in blocks], pa.string())
        )
        labelled = [block for block in blocks if "label" in block.schema.names]
        self.labels = _joined([block["label"].to_numpy() for block in labelled], np.float32)
        self.seconds = _joined([block["second"].to_numpy() for block in labelled], np.int32)

    @classmethod
    def open(cls, path: Path) -> TokenDataset:
        """Map the file that `write` made."""
        return cls(path)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def tokens(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Ids and weights of a row, both (length,), without a copy. `weights[t]` is that of predicting `ids[t]`."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        block = self._blocks[number]
        start, stop = block.offsets[row - self._starts[number] :][:2]
        return block.ids[start:stop], block.weights[start:stop]

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenDataset, (self.path,)


@dataclass(frozen=True, slots=True)
class _Block:
    """Views of the tokens of one record batch: `offsets` (rows + 1,) into `ids` and `weights` (tokens,)."""

    offsets: NDArray[np.int64]
    ids: NDArray[np.int32]
    weights: NDArray[np.float32]

    @classmethod
    def of(cls, block: pa.RecordBatch) -> _Block:
        ids, weights = block["ids"], block["weights"]
        return cls(ids.offsets.to_numpy(), ids.values.to_numpy(), weights.values.to_numpy())


@dataclass(frozen=True, slots=True)
class Labelled:
    """A sequence that is classified as a whole.

    `ids`: (length,) int32, at least one token. `second`: position at which the second text of a pair begins; 0: there
    is one text. `label`: in [0, 1]. `weight`: of its loss.
    """

    ids: NDArray[np.int32]
    second: int
    label: float
    weight: float
    example_id: str


class _Strings(Sequence[str]):
    """A column of text that stays in Arrow."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Strings(self._column[index])
        return self._column[int(index)].as_py()


def table(records: Sequence[tuple[Encoded, int, str]]) -> pa.Table:
    """Records, each with its task's number and its example id, as rows of `SCHEMA`."""
    encoded = [record for record, _, _ in records]
    offsets = np.cumsum([0, *(len(record.ids) for record in encoded)])
    ids = _joined([record.ids for record in encoded], np.int32)
    weights = _joined([record.weights for record in encoded], np.float32)
    columns = [
        pa.LargeListArray.from_arrays(offsets, ids),
        pa.LargeListArray.from_arrays(offsets, weights),
        pa.array([task_id for _, task_id, _ in records], pa.int32()),
        pa.array([record.weights.sum(dtype=np.float64) for record in encoded], pa.float64()),
        pa.array([example_id for _, _, example_id in records], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def labelled_table(records: Sequence[Labelled]) -> pa.Table:
    """Records of one task as rows of `LABELLED_SCHEMA`."""
    plain = table([(_weighted_at_its_end(record), 0, record.example_id) for record in records])
    labels = pa.array([record.label for record in records], pa.float32())
    seconds = pa.array([record.second for record in records], pa.int32())
    return pa.Table.from_arrays([*plain.columns, labels, seconds], schema=LABELLED_SCHEMA)


def write(path: Path, tables: Iterable[pa.Table], schema: pa.Schema = SCHEMA) -> None:
    """Write tables of `schema` one after another as the file of a `TokenDataset`, whole or not at all.

    The bytes depend on the rows alone, not on how they are spread over the tables.
    """
    with atomic_path(path) as temporary, pa.OSFile(str(temporary), "wb") as sink, pa.ipc.new_file(sink, schema) as out:
        left = schema.empty_table()
        for more in tables:
            left = pa.concat_tables([left, more])
            while left.num_rows >= _ROWS_A_BLOCK:
                _write_block(out, left.slice(0, _ROWS_A_BLOCK))
                left = left.slice(_ROWS_A_BLOCK)
        if left.num_rows:
            _write_block(out, left)


def read_table(path: Path) -> pa.Table:
    """All rows of a file that `write` made."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        return reader.read_all()


def _weighted_at_its_end(record: Labelled) -> Encoded:
    weights = np.zeros(len(record.ids), np.float32)
    weights[-1] = record.weight
    return Encoded(record.ids, weights, truncated=False)


def _joined(parts: Sequence[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.empty(0, dtype), *parts]).astype(dtype, copy=False)


def _write_block(out: pa.RecordBatchWriter, rows: pa.Table) -> None:
    # Taking every row copies: of a slice, Arrow also writes bytes of the rows around it.
    whole = rows.combine_chunks().take(pa.array(np.arange(rows.num_rows)))
    (block,) = whole.to_batches()
    out.write_batch(block)

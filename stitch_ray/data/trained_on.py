"""Which questions a model has learned from: kept beside it, so that no later job measures it or chooses by them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.runs import atomic_path

TRAINED_ON = "trained_on.parquet"


def write_trained_on(folder: Path, group_ids: Iterable[str]) -> None:
    """Write the distinct group ids, sorted, to `trained_on.parquet` in `folder`."""
    table = pa.table({"group_id": pa.array(sorted(set(group_ids)), pa.string())})
    with atomic_path(folder / TRAINED_ON) as temporary:
        pq.write_table(table, temporary)


def read_trained_on(folder: Path) -> frozenset[str]:
    """Group ids in `folder`; none where a model from elsewhere does not say."""
    file = folder / TRAINED_ON
    return frozenset(pq.read_table(file)["group_id"].to_pylist()) if file.is_file() else frozenset()

"""Files of batches: the unit of work, retry and resume. A batch that has its file is not done again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.runs import atomic_path

_MOST_ATTEMPTS = 3
_COUNTS = b"counts"


def batch_file(folder: Path, batch_id: int) -> Path:
    """Where a batch is kept."""
    return folder / f"{batch_id:06d}.parquet"


def readable(file: Path) -> bool:
    """Whether `file` is there and can be read to its end. A damaged one is removed."""
    if not file.exists():
        return False
    try:
        pq.read_table(file, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError):
        file.unlink()
        return False
    return True


def write_batch(file: Path, table: pa.Table, counts: Mapping[str, int] | None = None) -> None:
    """Write the table, and what was counted while it was made, whole or not at all."""
    table = table.replace_schema_metadata({_COUNTS: json.dumps(dict(sorted((counts or {}).items())))})
    with atomic_path(file) as temporary:
        pq.write_table(table, temporary, write_page_checksum=True)


def counts_of(file: Path) -> dict[str, int]:
    """What was counted when `file` was written."""
    found: dict[str, int] = json.loads((pq.read_schema(file).metadata or {}).get(_COUNTS, b"{}"))
    return found


def count_attempt(folder: Path, batch_id: int, advice: str) -> None:
    """Note that a batch was begun. Raises RuntimeError, with `advice`, for one that took its worker down every time."""
    with open(folder / f"{batch_id:06d}", "a", encoding="utf-8") as file:
        file.write("x")
        attempts = file.tell()
    if attempts > _MOST_ATTEMPTS:
        raise RuntimeError(f"took its worker down {_MOST_ATTEMPTS} times (out of memory?); {advice}")


def audit(call_log: str | None, stage: str, batch_id: int, rows: int) -> None:
    """Note in a file outside the run, where one was asked for, that a stage of a batch was worked on."""
    if call_log:
        with open(call_log, "a", encoding="utf-8") as log:
            log.write(f"{stage}\t{batch_id}\t{rows}\n")

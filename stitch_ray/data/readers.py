"""Input files as a stream of rows: JSON, JSON lines (plain, .gz, .zst), Parquet, Excel, `datasets` folders, the Hub.

Nothing here knows what a record means (see `formats`). A row that cannot be read becomes a `SourceRow` with an error;
a file that cannot be read past some point is a `UserError`.
"""

from __future__ import annotations

import codecs
import glob
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.data.json_stream import JsonText, is_utf8_text
from stitch_ray.data.workbook import sheet_rows
from stitch_ray.errors import UserError

_COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
_READABLE = "readable are .json, .jsonl and .ndjson (also with .gz or .zst), .parquet, .xlsx and `datasets` folders"
_HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)(?::([^:/]+))?")
_CHUNK = 1 << 20
_PARQUET_BATCH = 256
_FIRST_LINE_LIMIT = 1 << 24


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row of input: either `record` or `error` is set.

    `line` counts from 1: the line of a JSON-lines file, the position of the record everywhere else (on through the
    splits of a dataset). `raw` is the line as it stands, without its line break, or the record dumped on one line.
    """

    source: str
    line: int
    raw: str
    record: dict[str, Any] | None
    error: str | None


def expand(paths: Sequence[str]) -> list[str]:
    """The sources that `paths` name, in the order given, each once.

    A directory or glob stands for its readable files, sorted, without hidden ones; directories are not descended into
    (`**` in a glob is). A `save_to_disk` folder and `hf://owner/name[:split]` are one source each.
    Raises `UserError` for a path that is missing, of an unknown kind, or matches nothing.
    """
    found: dict[str, str] = {}
    for path in paths:
        for source in _expand_one(path):
            found.setdefault(source if source.startswith("hf://") else os.path.realpath(source), source)
    return list(found.values())


def _expand_one(path: str) -> list[str]:
    if path.startswith("hf://"):
        _hub_name(path)
        return [path]
    if os.path.isfile(path) or _is_dataset(path):
        _reader(path)
        return [path]
    if os.path.isdir(path):
        candidates = [os.path.join(path, name) for name in os.listdir(path)]
    else:
        candidates = glob.glob(path, recursive=True)
        if not candidates:
            raise UserError(f"{path}: no such file or directory, and as a pattern it matches nothing")
    sources = sorted(name for name in candidates if not os.path.basename(name).startswith(".") and _kind(name))
    if not sources:
        raise UserError(f"{path}: has no readable file; {_READABLE}")
    return sources


def iter_rows(source: str) -> Iterator[SourceRow]:
    """The rows of one source from `expand`, in memory that does not grow with the file.

    Raises `UserError` naming the file and the position when it is missing, of an unknown kind or broken midway.
    """
    return _reader(source)(source)


def _reader(source: str) -> Callable[[str], Iterator[SourceRow]]:
    reader = _hub_rows if source.startswith("hf://") else _kind(source)
    if reader is None:
        reason = f"unknown kind of file; {_READABLE}" if os.path.exists(source) else "no such file or directory"
        raise UserError(f"{source}: {reason}")
    return reader


def _kind(path: str) -> Callable[[str], Iterator[SourceRow]] | None:
    if not os.path.isfile(path):
        return _dataset_rows if _is_dataset(path) else None
    stem, ending = os.path.splitext(path.lower())
    if ending in _COMPRESSION:
        ending = os.path.splitext(stem)[1]
        if ending in (".parquet", ".xlsx"):  # both are compressed inside
            return None
    readers = {
        ".json": _json_rows,
        ".jsonl": _line_rows,
        ".ndjson": _line_rows,
        ".parquet": _parquet_rows,
        ".xlsx": _workbook_rows,
    }
    return readers.get(ending)


def _is_dataset(path: str) -> bool:
    return any(os.path.isfile(os.path.join(path, name)) for name in ("state.json", "dataset_dict.json"))


def _open(path: str) -> io.BufferedReader:
    """Decompressed bytes. Arrow reads both compressions: `zstandard` takes a truncated stream for a complete one."""
    compression = _COMPRESSION.get(os.path.splitext(path.lower())[1])
    if compression is None:
        return open(path, "rb")
    return io.BufferedReader(pa.input_stream(path, compression=compression))


def _line_rows(source: str) -> Iterator[SourceRow]:
    line = 0
    try:
        with _open(source) as stream:
            for line, data in enumerate(stream, start=1):
                text = data.removeprefix(codecs.BOM_UTF8) if line == 1 else data
                if text.strip():
                    yield _line_row(source, line, text.removesuffix(b"\n").removesuffix(b"\r"))
    except OSError as error:
        raise UserError(f"{source}: cannot be read past line {line}: {error}; repair or replace the file") from error


def _line_row(source: str, line: int, data: bytes) -> SourceRow:
    raw = data.decode("utf-8", "replace")
    try:
        return _row(source, line, raw, json.loads(data.decode("utf-8")))
    except UnicodeDecodeError as error:
        return SourceRow(source, line, raw, None, f"invalid UTF-8 at byte {error.start + 1} of the line")
    except (ValueError, RecursionError) as error:
        return SourceRow(source, line, raw, None, f"invalid JSON: {error}")


def _row(source: str, line: int, raw: str, record: object) -> SourceRow:
    if isinstance(record, dict):
        return SourceRow(source, line, raw, record, None)
    return SourceRow(source, line, raw, None, f"row is of type {type(record).__name__}, expected an object")


def _dumped_row(source: str, line: int, record: object) -> SourceRow:
    try:
        raw = json.dumps(record, ensure_ascii=False, default=_as_text)
        if not is_utf8_text(raw):  # a lone surrogate can only be written as its escape
            raw = json.dumps(record, default=_as_text)
    except (TypeError, ValueError, RecursionError) as error:
        return SourceRow(source, line, "", None, f"row has no JSON form: {error}")
    return _row(source, line, raw, record)


def _as_text(value: object) -> str:
    if isinstance(value, date | time | timedelta | Decimal):
        return str(value)
    raise TypeError(f"a value is of type {type(value).__name__}; drop that column")


def _counted(records: Callable[[str], Iterable[object]]) -> Callable[[str], Iterator[SourceRow]]:
    """Make rows of the records that `records(source)` yields."""

    def rows(source: str) -> Iterator[SourceRow]:
        line = 0
        try:
            for line, record in enumerate(records(source), start=1):
                yield _dumped_row(source, line, record)
        except UserError:
            raise
        # Arrow, datasets and the network raise errors of many unrelated types.
        except Exception as error:
            raise UserError(f"{source}: cannot be read past record {line}: {type(error).__name__}: {error}") from error

    return rows


@_counted
def _parquet_rows(source: str) -> Iterator[object]:
    with pq.ParquetFile(source) as file:
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH):
            yield from batch.to_pylist()


@_counted
def _workbook_rows(source: str) -> Iterator[object]:
    return (row.record for row in sheet_rows(source))


@_counted
def _dataset_rows(source: str) -> Iterator[object]:
    from datasets import load_from_disk

    return _splits(load_from_disk(source))


@_counted
def _hub_rows(source: str) -> Iterator[object]:
    from datasets import load_dataset

    name, split = _hub_name(source)
    return _splits(load_dataset(name, split=split, streaming=True))


def _splits(loaded: Any) -> Iterator[object]:
    for split in loaded.values() if isinstance(loaded, dict) else [loaded]:
        yield from split.with_format(None)


def _hub_name(source: str) -> tuple[str, str | None]:
    match = _HUB.fullmatch(source)
    if match is None:
        raise UserError(f"{source}: write a Hub dataset as hf://owner/name or hf://owner/name:split")
    return match[1], match[2]


def _json_rows(source: str) -> Iterator[SourceRow]:
    """Records of a top-level array, of the one list of objects in a top-level object, or of JSON lines."""
    line = 0
    try:
        with _open(source) as stream:
            json_lines = _is_json_lines(stream)
        if json_lines:
            yield from _line_rows(source)
            return
        with _open(source) as stream:
            for line, (record, is_utf8) in enumerate(JsonText(stream).rows(), start=1):
                row = _dumped_row(source, line, record)
                yield row if is_utf8 else SourceRow(source, line, row.raw, None, "invalid UTF-8 in the record")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{source}: broken at record {line + 1}, nothing after it can be read: {error}; repair or replace the file"
        ) from error


def _is_json_lines(stream: io.BufferedReader) -> bool:
    """Whether the first line is a whole object and another line follows."""
    first = next((line for line in iter(lambda: stream.readline(_FIRST_LINE_LIMIT), b"") if line.strip()), b"")
    try:
        record = json.loads(first.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and any(line.strip() for line in iter(lambda: stream.readline(_CHUNK), b""))

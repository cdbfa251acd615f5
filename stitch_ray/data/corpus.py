"""The normalised corpus of a run: every usable row, sorted by content, in Parquet below the run folder.

Sorting by content id makes everything after it independent of the order and the blocks in which rows arrived, and puts
exact repeats next to each other.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import dataset

from stitch_ray.config.base import DataConfig
from stitch_ray.data import formats, readers
from stitch_ray.data.quarantine import BadRow, Quarantined
from stitch_ray.errors import UserError
from stitch_ray.records import CORPUS_SCHEMA, Example, Turn
from stitch_ray.runs import write_json, write_text

_ROWS_A_BLOCK = 1024
_MARKER = "corpus.json"


@dataclass(frozen=True, slots=True)
class Corpus:
    """A finished corpus folder: its Parquet files in content order and what reading it found."""

    folder: Path
    files: tuple[Path, ...]
    rows_in: int
    quarantined: tuple[Quarantined, ...]

    @property
    def num_rows(self) -> int:
        return self.rows_in - len(self.quarantined)

    def column_table(self, columns: Sequence[str]) -> pa.Table:
        """Some columns of every row, in content order."""
        return pa.concat_tables([pq.read_table(file, columns=list(columns)) for file in self.files])

    def take(self, rows: Iterable[int], columns: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of the rows at these positions (in content order), in the order asked for."""
        table = dataset.dataset([str(file) for file in self.files], format="parquet")
        return list(table.take([int(row) for row in rows], columns=list(columns)).to_pylist())


def read_source(
    source: str, config: DataConfig, limit: int | None = None
) -> Iterator[tuple[list[Example], list[Quarantined]]]:
    """Blocks of at most 1,024 rows of one source, converted; what cannot be used comes with its reason.

    `limit`: read only so many of its rows; that of `config` is over all sources.
    """
    good: list[Example] = []
    bad: list[Quarantined] = []
    for count, row in enumerate(readers.iter_rows(source)):
        if limit is not None and count >= limit:
            break
        try:
            good.append(formats.convert(row, config.format, config.max_characters, config.fields))
        except BadRow as error:
            bad.append(Quarantined.of(row.source, row.line, str(error), row.raw))
        if len(good) + len(bad) >= _ROWS_A_BLOCK:
            yield good, bad
            good, bad = [], []
    yield good, bad


def build_corpus(folder: Path, config: DataConfig, sources: Sequence[str]) -> Corpus:
    """Read, convert and sort all sources with Ray Data, or return the corpus that is there already.

    Raises UserError if there is no usable row or more than `max_bad_fraction` of them is not.
    """
    corpus = read_corpus(folder, config, sources)
    if not corpus.num_rows:
        first = f"; the first: {_place(corpus.quarantined[0])}" if corpus.quarantined else ""
        raise UserError(f"data.paths: no usable row in {', '.join(sources)}{first}")
    if len(corpus.quarantined) > config.max_bad_fraction * corpus.rows_in:
        raise UserError(
            f"data.max_bad_fraction: {len(corpus.quarantined)} of {corpus.rows_in} rows cannot be used, more than "
            f"{config.max_bad_fraction:g}; the first: {_place(corpus.quarantined[0])}"
        )
    return corpus


def read_corpus(folder: Path, config: DataConfig, sources: Sequence[str]) -> Corpus:
    """`build_corpus` for callers with a rule of their own for too many unusable rows."""
    if not (folder / _MARKER).exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "quarantine").mkdir(parents=True)
        _run(folder, config, sources)
    return load_corpus(folder)


def load_corpus(folder: Path) -> Corpus:
    """Open a finished corpus folder."""
    marker = json.loads((folder / _MARKER).read_text("utf-8"))
    quarantined = [
        Quarantined(**json.loads(line))
        for file in sorted((folder / "quarantine").glob("*.jsonl"))
        for line in _lines(file)
    ]
    quarantined.sort(key=lambda row: (row.source, row.line))
    return Corpus(folder, tuple(folder / name for name in marker["files"]), marker["rows_in"], tuple(quarantined))


def inputs_hash(sources: Sequence[str]) -> str:
    """Hash of the files' contents, whatever their order; of the name for a source that is not a local file."""
    digests = []
    for source in sources:
        path = Path(source)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                with file.open("rb") as stream:
                    digests.append(hashlib.file_digest(stream, "sha256").hexdigest())
            else:
                digests.append(source)
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()[:16]


def data_work(config: DataConfig, sources: Sequence[str]) -> dict[str, Any]:
    """What the examples of a run depend on, for its manifest's `work`."""
    work = config.model_dump(mode="json", include={"format", "max_characters", "limit"})
    return {"inputs": inputs_hash(sources), **work, **({"fields": config.fields} if config.fields else {})}


def example_ids(corpus: Corpus) -> list[str]:
    """An id for every row, in corpus order: the row's own id where it is unique, else its content id.

    Exact repeats get `-2`, `-3`, … Raises UserError if two different records carry the same own id.
    """
    table = corpus.column_table(["content_id", "own_id", "source", "line"])
    content, own = table["content_id"].to_pylist(), table["own_id"].to_pylist()
    holders: dict[str, list[int]] = {}
    for row, name in enumerate(own):
        if name is not None:
            holders.setdefault(name, []).append(row)
    for name, rows in holders.items():
        other = next((row for row in rows if content[row] != content[rows[0]]), None)
        if other is not None:
            places = " and ".join(f"{table['source'][row]}:{table['line'][row]}" for row in (rows[0], other))
            raise UserError(f"id {name!r} names two different records: {places}. Make the ids unique or remove them")
    taken: dict[str, int] = {}
    found = []
    for row, name in enumerate(own):
        if name is not None and len(holders[name]) == 1:
            found.append(name)
            continue
        taken[content[row]] = taken.get(content[row], 0) + 1
        found.append(content[row] if taken[content[row]] == 1 else f"{content[row]}-{taken[content[row]]}")
    if len(set(found)) != len(found):
        twice = next(name for name in found if found.count(name) > 1)
        raise UserError(f"id {twice!r} in the data is also the content id of another row. Rename it")
    return found


def messages_of(row: dict[str, Any]) -> tuple[Turn, ...]:
    """The turns of a corpus row."""
    return tuple(Turn(turn["role"], turn["content"]) for turn in row["messages"])


def _run(folder: Path, config: DataConfig, sources: Sequence[str]) -> None:
    import ray.data

    if config.limit is not None:
        # A limit is over all sources in order, so one task reads them one after another.
        items = [{"sources": list(sources), "index": 0}]
    else:
        items = [{"sources": [source], "index": index} for index, source in enumerate(sources)]

    def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
        index = int(batch["index"][0])
        count, left = 0, config.limit
        bad: list[Quarantined] = []
        for source in batch["sources"][0]:
            for good, rejected in read_source(source, config, left):
                count += len(good) + len(rejected)
                left = None if left is None else left - len(good) - len(rejected)
                bad += rejected
                yield _table(good)
        lines = "".join(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in bad)
        write_text(folder / "quarantine" / f"{index:06d}.jsonl", lines)
        write_json(folder / "quarantine" / f"{index:06d}.count", count)

    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(read, batch_size=1)
    # By the record too, so that of equal contents with different records each has the same id whatever comes first.
    rows = rows.sort(["content_id", "raw"])
    try:
        rows.write_parquet(str(folder / "rows"), min_rows_per_file=1)
    except Exception as error:
        cause = user_error(error)
        if cause is not None:
            raise cause from error
        raise
    files = [file for file in (folder / "rows").rglob("*.parquet") if pq.read_metadata(file).num_rows]
    files.sort(key=_first_row)
    rows_in = sum(json.loads(file.read_text()) for file in (folder / "quarantine").glob("*.count"))
    stored = sum(pq.read_metadata(file).num_rows for file in files)
    rejected = sum(len(_lines(file)) for file in (folder / "quarantine").glob("*.jsonl"))
    if stored + rejected != rows_in:
        raise RuntimeError(f"{rows_in} rows read, but {stored} stored and {rejected} quarantined")
    write_json(folder / _MARKER, {"rows_in": rows_in, "files": [str(file.relative_to(folder)) for file in files]})


def _first_row(file: Path) -> tuple[str, str]:
    with pq.ParquetFile(file) as parquet:
        row = next(parquet.iter_batches(1, columns=["content_id", "raw"])).to_pylist()[0]
    return row["content_id"], row["raw"]


def _lines(file: Path) -> list[str]:
    # Not splitlines(): JSON may hold U+2028 and the like as they are.
    return [line for line in file.read_text("utf-8").split("\n") if line]


def _table(examples: Sequence[Example]) -> pa.Table:
    rows = [
        {
            "content_id": example.content_id,
            "own_id": example.own_id,
            "group_id": example.group_id,
            "task": example.task,
            "messages": [{"role": turn.role, "content": turn.content} for turn in example.messages],
            "context": example.context,
            "references": list(example.references),
            "excluded": list(example.excluded),
            "verdict": example.verdict,
            "weight": example.weight,
            "source": example.source,
            "line": example.line,
            "raw": example.raw,
        }
        for example in examples
    ]
    return pa.Table.from_pylist(rows, schema=CORPUS_SCHEMA)


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError that made a Ray task fail, if that is what did."""
    while error is not None:
        if isinstance(error, UserError):
            return UserError(str(error.args[0]) if error.args else str(error))
        error = getattr(error, "cause", None) or error.__cause__
    return None


def _place(row: Quarantined) -> str:
    return f"{row.source}:{row.line}: {row.reason}"

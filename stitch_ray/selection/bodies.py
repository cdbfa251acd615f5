"""The tokenised corpus: one Parquet file beside every corpus file, row for row, for one encoder.

Tokenising happens once for a tokenizer, a layout and a longest sequence, in Ray Data tasks on all CPUs; models that
agree in these share the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.data.corpus import Corpus, messages_of
from stitch_ray.records import content_hash
from stitch_ray.runs import atomic_path
from stitch_ray.selection.encode import EncodedBody, RatingEncoder
from stitch_ray.selection.layout import Layout, LayoutName, contents

_IDS = pa.list_(pa.int32())
_TURN = pa.struct([("ids", _IDS), ("truncated", pa.bool_()), ("whole", pa.list_(_IDS))])
BODIES_SCHEMA = pa.schema([("content_id", pa.string()), ("turns", pa.list_(_TURN))])
_ROWS_A_GROUP = 512


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """All that token ids depend on. `tokenizer` is a path to load from; `tokenizer_hash` is what it held."""

    tokenizer: str
    tokenizer_hash: str
    layout: LayoutName
    prompts: tuple[str, ...]
    num_ratings: int
    max_tokens: int
    name: str
    trust_remote_code: bool = False

    @property
    def key(self) -> str:
        """Names the folder of the bodies; the place and name of the tokenizer do not matter."""
        values = asdict(self)
        for field in ("tokenizer", "name", "trust_remote_code"):
            del values[field]
        return content_hash(values)

    def encoder(self) -> RatingEncoder:
        """The encoder, made once a process. Raises UserError for an unsuitable tokenizer."""
        return _encoder(self)


@lru_cache(maxsize=8)
def _encoder(spec: EncoderSpec) -> RatingEncoder:
    from stitch_ray.engines.pretrained import load_tokenizer

    return RatingEncoder(
        load_tokenizer(spec.tokenizer, trust_remote_code=spec.trust_remote_code),
        Layout(spec.layout, spec.prompts),
        num_ratings=spec.num_ratings,
        max_tokens=spec.max_tokens,
        name=spec.name,
    )


def body_file(folder: Path, corpus_file: Path) -> Path:
    """Where the bodies of a corpus file are kept."""
    return folder / corpus_file.name


def build_bodies(folder: Path, corpus: Corpus, spec: EncoderSpec) -> None:
    """Tokenise every corpus file whose bodies are not there yet."""
    import ray.data

    pending = [file for file in corpus.files if not body_file(folder, file).exists()]
    if not pending:
        return

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        for file in batch["file"]:
            _encode_file(Path(file), body_file(folder, Path(file)), spec.encoder())
        return batch

    items = [{"file": str(file)} for file in pending]
    ray.data.from_items(items, override_num_blocks=len(items)).map_batches(encode, batch_size=1).materialize()


def read_turn_tokens(folder: Path, corpus_file: Path) -> list[tuple[int, ...]]:
    """Tokens of every turn of every row of one corpus file."""
    table = pq.read_table(body_file(folder, corpus_file), columns=["turns"])
    return [tuple(_body(turn).tokens for turn in turns) for turns in table["turns"].to_pylist()]


class BodyReader:
    """Reads single rows of the bodies; keeps the row group it read last."""

    def __init__(self, folder: Path, corpus_files: Sequence[str]) -> None:
        self._files = [body_file(folder, Path(file)) for file in corpus_files]
        self._at: tuple[int, int] | None = None
        self._rows: list[list[dict[str, Any]]] = []

    def turns(self, file: int, row: int) -> list[EncodedBody]:
        """The encoded turns of row `row` of corpus file number `file`."""
        at = (file, row // _ROWS_A_GROUP)
        if at != self._at:
            with pq.ParquetFile(self._files[file]) as parquet:
                self._rows = parquet.read_row_group(at[1], columns=["turns"])["turns"].to_pylist()
            self._at = at
        return [_body(turn) for turn in self._rows[row % _ROWS_A_GROUP]]


def _encode_file(source: Path, target: Path, encoder: RatingEncoder) -> None:
    with atomic_path(target) as temporary, pq.ParquetWriter(temporary, BODIES_SCHEMA) as writer:
        for batch in pq.ParquetFile(source).iter_batches(_ROWS_A_GROUP, columns=["content_id", "messages", "context"]):
            rows = batch.to_pylist()
            turns = [contents(messages_of(row), row["context"]) for row in rows]
            encoded = iter(encoder.encode([content for of_row in turns for content in of_row]))
            table = pa.Table.from_pylist(
                [
                    {"content_id": row["content_id"], "turns": [asdict(next(encoded)) for _ in of_row]}
                    for row, of_row in zip(rows, turns, strict=True)
                ],
                schema=BODIES_SCHEMA,
            )
            writer.write_table(table, row_group_size=_ROWS_A_GROUP)


def _body(turn: dict[str, Any]) -> EncodedBody:
    return EncodedBody(tuple(turn["ids"]), turn["truncated"], tuple(tuple(ids) for ids in turn["whole"]))

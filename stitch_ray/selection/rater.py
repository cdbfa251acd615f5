"""The rating actor: takes planned batches, writes one file for each, by rename."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stitch_ray.batch_files import readable
from stitch_ray.config.base import ModelConfig
from stitch_ray.engines.base import Engine
from stitch_ray.engines.registry import load_engine
from stitch_ray.records import RATING_SCHEMA
from stitch_ray.runs import atomic_path
from stitch_ray.selection.bodies import BodyReader, EncoderSpec
from stitch_ray.selection.encode import EncodedBody, RatingEncoder
from stitch_ray.selection.plan import Item
from stitch_ray.selection.prompt_sets import PromptSet

log = logging.getLogger(__name__)

_MOST_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class RatingJob:
    """What one model's actors need to rate one set of prompts: everything but the batches."""

    model: ModelConfig
    encoder: EncoderSpec
    prompts: PromptSet
    corpus_files: tuple[str, ...]
    bodies: Path
    ratings: Path
    attempts: Path
    call_log: str | None = None

    def rating_file(self, batch_id: int) -> Path:
        """The file of a finished batch."""
        return self.ratings / f"{self.model.name}.{self.prompts.name}.{batch_id:06d}.parquet"

    def is_rated(self, batch_id: int) -> bool:
        """Whether the batch has a file that can be read to its end. A damaged one is removed."""
        return readable(self.rating_file(batch_id))


class Rater:
    """A Ray Data actor. Loads the engine once; a call rates planned batches and returns what they cost."""

    def __init__(self, job: RatingJob) -> None:
        self._job = job
        self._engine = load_engine(job.model)
        self._encoder = job.encoder.encoder()
        self._reader = BodyReader(job.bodies, job.corpus_files)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = [
            self._report(int(number), items) for number, items in zip(batch["batch_id"], batch["items"], strict=True)
        ]
        return {key: np.array([row[key] for row in done]) for key in done[0]}

    def _report(self, batch_id: int, packed: bytes) -> dict[str, Any]:
        """What rating the batch cost, or why it failed: Ray Data wraps what a worker raises and loses the reason."""
        started = time.time()
        try:
            return {**self._rate(batch_id, packed, started), "error": ""}
        except Exception as error:
            log.exception("batch %d", batch_id)
            cost = self._cost(batch_id, 0, 0, 0, started)
            return {
                **cost,
                "error": f"batch {batch_id} of model {self._job.model.name}: {str(error) or type(error).__name__}",
            }

    def _rate(self, batch_id: int, packed: bytes, started: float) -> dict[str, Any]:
        items = unpack_items(packed)
        target = self._job.rating_file(batch_id)
        sequences = tokens = 0
        if not target.exists():  # a retry of work that reached the disk before its actor died
            self._count_attempt(batch_id)
            bodies = [self._reader.turns(item.file, item.row) for item in items]
            flat = [body for turns in bodies for body in turns]
            if self._job.call_log:
                with open(self._job.call_log, "a", encoding="utf-8") as audit:
                    audit.write(f"{self._job.model.name}\t{batch_id}\t{sum(len(item.example_ids) for item in items)}\n")
            logits, lengths = rate_bodies(self._engine, self._encoder, flat)
            write_ratings(target, self._job, items, bodies, logits, lengths)
            sequences, tokens = lengths.size, int(lengths.sum())
        return self._cost(batch_id, sum(len(item.example_ids) for item in items), sequences, tokens, started)

    def _cost(self, batch_id: int, rows: int, sequences: int, tokens: int, started: float) -> dict[str, Any]:
        return {
            "batch_id": batch_id,
            "rows": rows,
            "sequences": sequences,
            "tokens": tokens,
            "started": started,
            "seconds": time.time() - started,
            "actor": os.getpid(),
            "node": platform.node(),
            "path": getattr(self._engine, "rating_path", self._job.model.engine),
        }

    def _count_attempt(self, batch_id: int) -> None:
        """A batch that takes its actor down every time must not be retried for ever."""
        with open(self._job.attempts / self._job.rating_file(batch_id).stem, "a", encoding="utf-8") as file:
            file.write("x")
            attempts = file.tell()
        if attempts > _MOST_ATTEMPTS:
            raise RuntimeError(
                f"took its worker down {_MOST_ATTEMPTS} times (out of memory?); "
                "lower models[].batch_tokens or max_tokens"
            )


def rate_bodies(
    engine: Engine, encoder: RatingEncoder, bodies: Sequence[EncodedBody]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Rating logits (bodies, prompts, ratings) and the lengths of the rated sequences (bodies, prompts)."""
    shared = [index for index, body in enumerate(bodies) if not body.whole]
    logits = np.empty((len(bodies), encoder.num_prompts, len(encoder.rating_ids)), np.float32)
    if shared:
        logits[shared] = engine.rate(encoder.batch([bodies[index] for index in shared]))
    for index, body in enumerate(bodies):
        if body.whole:
            logits[index] = engine.rate(encoder.whole_batch(body))[:, 0]
    return logits, sequence_lengths(encoder, bodies)


def sequence_lengths(encoder: RatingEncoder, bodies: Sequence[EncodedBody]) -> NDArray[np.int64]:
    """Tokens of the rated sequences, shape (bodies, prompts)."""
    batch = encoder.batch([])
    sides = [len(batch.head(k)) + len(batch.tail(k)) for k in range(encoder.num_prompts)]
    rows = [[len(ids) for ids in body.whole] or [len(body.ids) + side for side in sides] for body in bodies]
    return np.array(rows, dtype=np.int64).reshape(len(bodies), encoder.num_prompts)


def write_ratings(
    target: Path,
    job: RatingJob,
    items: Sequence[Item],
    bodies: Sequence[Sequence[EncodedBody]],
    logits: NDArray[np.float32],
    lengths: NDArray[np.int64],
) -> None:
    """Write the rows of a finished batch. Logits that are not finite become null: the row is quarantined later."""
    rows = []
    flat = 0
    for item, turns in zip(items, bodies, strict=True):
        for turn, body in enumerate(turns):
            for k, (number, prompt_hash) in enumerate(zip(job.prompts.numbers, job.prompts.hashes, strict=True)):
                values = logits[flat, k]
                shared = {
                    "content_id": item.content_id,
                    "turn": turn,
                    "model": job.model.name,
                    "prompt": number,
                    "prompt_hash": prompt_hash,
                    "logits": values.tolist() if np.isfinite(values).all() else None,
                    "tokens": int(lengths[flat, k]),
                    "truncated": body.truncated,
                }
                rows += [{"example_id": example_id, **shared} for example_id in item.example_ids]
            flat += 1
    with atomic_path(target) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=RATING_SCHEMA), temporary, write_page_checksum=True)


_ITEM_SCHEMA = pa.schema(
    [
        ("content_id", pa.string()),
        ("file", pa.int32()),
        ("row", pa.int64()),
        ("turn_tokens", pa.list_(pa.int32())),
        ("example_ids", pa.list_(pa.string())),
    ]
)


def pack_items(items: Iterable[Item]) -> bytes:
    """Items as an Arrow IPC stream, so that a batch is one compact value in a Ray Data row."""
    table = pa.Table.from_pylist(
        [
            {
                "content_id": item.content_id,
                "file": item.file,
                "row": item.row,
                "turn_tokens": list(item.turn_tokens),
                "example_ids": list(item.example_ids),
            }
            for item in items
        ],
        schema=_ITEM_SCHEMA,
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, _ITEM_SCHEMA) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def unpack_items(packed: bytes) -> list[Item]:
    """The inverse of `pack_items`."""
    with pa.ipc.open_stream(packed) as reader:
        return [
            Item(row["content_id"], row["file"], row["row"], tuple(row["turn_tokens"]), tuple(row["example_ids"]))
            for row in reader.read_all().to_pylist()
        ]

"""From the files of all chunks to `predictions.parquet`, with labels, and what the auxiliaries say alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stitch_ray.batch_files import batch_file, counts_of
from stitch_ray.data.quarantine import Quarantined
from stitch_ray.ensemble.batch.preflight import Ready
from stitch_ray.ensemble.batch.questions import CHUNK_SCHEMA, Chunks
from stitch_ray.ensemble.batch.rows import PREDICTION_SCHEMA
from stitch_ray.ensemble.batch.runner import PredictJob
from stitch_ray.reliability.risk.predictions import PREDICTIONS
from stitch_ray.runs import atomic_path


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run has found. `table`: predictions, by example id; `references`: row for row theirs.

    `failed`: questions without a prediction. `labels`: what labelling counted.
    """

    table: pa.Table
    references: tuple[tuple[str, ...], ...]
    failed: tuple[Quarantined, ...]
    labels: Mapping[str, int]


def put_together(ready: Ready, path: Path, job: PredictJob, chunks: Chunks) -> Outcome:
    """Write `predictions.parquet`. Raises RuntimeError, with the first reason, if more than half of the questions have
    none, or a judge answered on less than half of the answers."""
    parts, failed = [], []
    labels: Counter[str] = Counter()
    for chunk in range(len(chunks.sizes)):
        asked = pq.read_table(chunks.file(chunk), schema=CHUNK_SCHEMA)
        table = pq.read_table(batch_file(job.predictions, chunk)).drop_columns(["example_id"])
        for name in CHUNK_SCHEMA.names:
            table = table.append_column(CHUNK_SCHEMA.field(name), asked[name])
        for folder in (job.baselines, job.labels):
            if folder is not None:
                table = _beside(table, batch_file(folder, chunk))
        if job.labels is not None:
            labels.update(counts_of(batch_file(job.labels, chunk)))
        lost = table.filter(pc.is_valid(table["error"])).to_pylist()
        failed += [
            Quarantined.of(row["source"], row["line"], row["error"], row["question"], row["example_id"]) for row in lost
        ]
        parts.append(table.filter(pc.is_null(table["error"])))
    if 2 * len(failed) > len(chunks):
        raise RuntimeError(
            f"{len(failed)} of {len(chunks)} questions got no prediction from {ready.name}; "
            f"the first: {failed[0].reason}"
        )
    if 2 * labels["judge_failed"] > labels["judge_asked"]:
        raise RuntimeError(
            f"labels.judge: no reply for {labels['judge_failed']} of {labels['judge_asked']} answers; "
            "run the same command again when the judge can be reached"
        )
    whole = pa.concat_tables(parts, promote_options="permissive")
    whole = whole.take(pc.sort_indices(whole, sort_keys=[("example_id", "ascending")]))
    table = _prediction_table(whole, ready, job.auxiliaries if job.baselines is not None else ())
    with atomic_path(path / PREDICTIONS) as temporary:
        pq.write_table(table.replace_schema_metadata(None).combine_chunks(), temporary)
    references = tuple(tuple(own or ()) for own in whole["references"].to_pylist())
    return Outcome(table, references, tuple(failed), dict(labels))


def _beside(table: pa.Table, file: Path) -> pa.Table:
    """`table` with the columns of `file`, row for row."""
    made = pq.read_table(file)
    if made.num_rows != table.num_rows:
        raise RuntimeError(f"{file} does not belong to the chunk beside it; remove it and run the same command again")
    for name in made.column_names:
        table = table.append_column(made.schema.field(name), made[name])
    return table


def _prediction_table(whole: pa.Table, ready: Ready, auxiliaries: tuple[str, ...]) -> pa.Table:
    rows, threshold = whole.num_rows, ready.config.labels.threshold

    def label(name: str) -> Any:
        return whole[name] if name in whole.column_names else pa.nulls(rows, pa.float32())

    draft, refined = label("draft_label"), label("refined_label")
    final = refined
    if ready.config.calibration:
        # Where refining came to nothing the second stage has no answer of its own. Its confidence is null, so that no
        # threshold gives it; its label only must be there, for a row without one is not of both stages.
        final = pc.if_else(pc.is_null(whole["refined"]), draft, refined)
    made = {
        "draft_label": draft,
        "draft_correct": _correct(draft, threshold),
        "final_label": final,
        "final_correct": _correct(final, threshold),
        "correct": _correct(label("answer_label"), threshold),
    }
    columns = [made[name] if name in made else whole[name] for name in PREDICTION_SCHEMA.names]
    table = pa.table(columns, names=PREDICTION_SCHEMA.names).cast(PREDICTION_SCHEMA)
    for name in auxiliaries:
        own = label(f"label.{name}")
        table = table.append_column(f"answer.{name}", whole[f"answer.{name}"])
        table = table.append_column(f"label.{name}", own)
        table = table.append_column(f"correct.{name}", _correct(own, threshold))
        for cost in ("tokens", "seconds"):
            table = table.append_column(f"{cost}.{name}", whole[f"{cost}.{name}"])
    return table


def _correct(label: Any, threshold: float) -> Any:
    return pc.greater_equal(pc.cast(label, pa.float32()), pa.scalar(threshold, pa.float32()))

"""Predictions as rows: what a chunk's file holds, and what `predictions.parquet` makes of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from stitch_ray.ensemble.batch.questions import Asked
from stitch_ray.ensemble.types import Prediction

CHUNK_RESULT_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("draft", pa.string()),
        ("draft_confidence", pa.float64()),
        ("refined", pa.string()),
        ("final_confidence", pa.float64()),
        ("answer", pa.string()),
        ("confidence", pa.float64()),
        ("decision", pa.string()),
        ("reason", pa.string()),
        ("route", pa.string()),
        ("target_risk", pa.float64()),
        ("calls", pa.int32()),
        ("tokens", pa.int64()),
        ("policy_version", pa.string()),
        ("model_version", pa.string()),
        ("trace", pa.string()),
        ("seconds", pa.float64()),
        ("error", pa.string()),
    ]
)
"""One row a question; with an `error` and nothing else for a question that got no prediction."""

PREDICTION_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("group_id", pa.string()),
        ("split", pa.string()),
        ("task", pa.string()),
        ("question", pa.string()),
        ("context", pa.string()),
        *(field for field in CHUNK_RESULT_SCHEMA if field.name not in ("example_id", "error")),
        ("draft_label", pa.float32()),
        ("draft_correct", pa.bool_()),
        ("final_label", pa.float32()),
        ("final_correct", pa.bool_()),
        ("correct", pa.bool_()),
    ]
)
"""`final_*` is about the answer that the second stage ends with: the refined one, or the draft where refining failed, whose
`final_confidence` is then null, so that it is never given. Both labels are null where nothing was refined. `correct` is of
the answer given, null where there is none or no label."""

Row = dict[str, Any]


def prediction_row(prediction: Prediction) -> Row:
    values = prediction.to_dict()
    row = {name: values[name] for name in CHUNK_RESULT_SCHEMA.names if name not in ("trace", "error")}
    return {**row, "trace": trace_text(prediction.trace), "error": None}


def trace_text(trace: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(list(trace), ensure_ascii=False, allow_nan=False)


def failure_row(asked: Asked, reason: str) -> Row:
    return {"example_id": asked.question.example_id, "error": reason}

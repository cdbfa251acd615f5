"""Which questions are answered together: decided before any is asked, by the data alone.

Questions in the order of their hash are cut into batches by rows and prompt tokens. A batch is the unit of work, of
retry and of resume, so that actors, kills and the order of the input change no answer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

PLAN = "plan.parquet"
PLAN_SCHEMA = pa.schema([("batch_id", pa.int32()), ("example_id", pa.string()), ("tokens", pa.int32())])
"""One row a question. `tokens` are those of its prompt; null where a server answers, whose tokens nobody sees."""

_LEAST_ROWS, _MOST_ROWS = 32, 1024
_BATCHES_AIMED_AT = 2000
_TOKENS_A_ROW = 1024


@dataclass(frozen=True, slots=True)
class Planned:
    """One question: its id, and the length of its prompt in tokens (0: unknown)."""

    example_id: str
    tokens: int


def rows_a_batch(num_questions: int, least: int = _LEAST_ROWS) -> int:
    """Enough for about 2,000 batches, from `least` to 1,024: small data loses little to a kill, large data few files."""
    return max(least, min(_MOST_ROWS, -(-num_questions // _BATCHES_AIMED_AT)))


def plan_batches(questions: Sequence[Planned], least_rows: int = _LEAST_ROWS) -> Iterator[tuple[Planned, ...]]:
    """Cut `questions`, in their order, into batches. A single long prompt may exceed the limit of tokens."""
    most_rows = rows_a_batch(len(questions), least_rows)
    group: list[Planned] = []
    tokens = 0
    for question in questions:
        if group and (len(group) == most_rows or tokens + question.tokens > most_rows * _TOKENS_A_ROW):
            yield tuple(group)
            group, tokens = [], 0
        group.append(question)
        tokens += question.tokens
    if group:
        yield tuple(group)


def plan_table(batches: Sequence[Sequence[Planned]]) -> pa.Table:
    """The plan as written to `plan.parquet`."""
    rows = [
        {"batch_id": number, "example_id": question.example_id, "tokens": question.tokens or None}
        for number, batch in enumerate(batches)
        for question in batch
    ]
    return pa.Table.from_pylist(rows, PLAN_SCHEMA)


def batch_sizes(plan: pa.Table) -> list[int]:
    """Questions of every batch, from a plan."""
    counts = plan.group_by("batch_id").aggregate([("example_id", "count")]).sort_by("batch_id")
    return list(counts["example_id_count"].to_pylist())

"""Which contents are rated together: decided before rating, by the data alone.

Contents in the order of their hash are cut into batches by rows and tokens. A batch is the unit of work, of retry and
of resume, so actors, kills and the order of the input change neither what a forward sees nor a bit of its result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.data.corpus import Corpus
from stitch_ray.records import PLAN_SCHEMA
from stitch_ray.selection.bodies import read_turn_tokens

_LEAST_ROWS, _MOST_ROWS = 32, 4096
_BATCHES_AIMED_AT = 2000
_TOKENS_A_ROW = 1024
"""A batch closes early at this many tokens times its row limit, so that long documents do not make giant batches."""


@dataclass(frozen=True, slots=True)
class Item:
    """One distinct content: where its rows stand in the corpus, its tokens a turn, and the ids it stands for."""

    content_id: str
    file: int
    row: int
    turn_tokens: tuple[int, ...]
    example_ids: tuple[str, ...]

    @property
    def tokens(self) -> int:
        return sum(self.turn_tokens)


@dataclass(frozen=True, slots=True)
class Batch:
    """The unit of work."""

    batch_id: int
    items: tuple[Item, ...]

    @property
    def rows(self) -> int:
        """Example rows that the batch rates (repeats of a content count)."""
        return sum(len(item.example_ids) for item in self.items)


def rows_a_batch(num_contents: int) -> int:
    """Enough for about 2,000 batches, within 32 and 4,096: small data loses little to a kill, large data few files."""
    return min(_MOST_ROWS, max(_LEAST_ROWS, -(-num_contents // _BATCHES_AIMED_AT)))


def plan_batches(items: Sequence[Item]) -> list[Batch]:
    """Cut `items` (in content order) into batches. A single item may exceed the token limit."""
    most_rows = rows_a_batch(len(items))
    return [Batch(number, group) for number, group in enumerate(_groups(items, most_rows, most_rows * _TOKENS_A_ROW))]


def plan_table(batches: Sequence[Batch]) -> pa.Table:
    """The plan as written to `plan.parquet`: one row for every content and turn."""
    rows = [
        {"batch_id": batch.batch_id, "content_id": item.content_id, "turn": turn, "tokens": tokens}
        for batch in batches
        for item in batch.items
        for turn, tokens in enumerate(item.turn_tokens)
    ]
    return pa.Table.from_pylist(rows, schema=PLAN_SCHEMA)


def restore_batches(table: pa.Table, items: Sequence[Item]) -> list[Batch]:
    """The batches of a plan written earlier. Raises RuntimeError if it is not a plan of these items."""
    by_id = {item.content_id: item for item in items}
    members: dict[int, dict[str, list[int]]] = {}
    for row in table.sort_by(
        [("batch_id", "ascending"), ("content_id", "ascending"), ("turn", "ascending")]
    ).to_pylist():
        members.setdefault(row["batch_id"], {}).setdefault(row["content_id"], []).append(row["tokens"])
    if sorted(c for of_batch in members.values() for c in of_batch) != sorted(by_id):
        raise RuntimeError("plan.parquet does not belong to this corpus; remove the run folder and start over")
    return [
        Batch(number, tuple(replace(by_id[c], turn_tokens=tuple(tokens)) for c, tokens in of_batch.items()))
        for number, of_batch in members.items()
    ]


def corpus_items(corpus: Corpus, ids: Sequence[str], bodies: Path | None) -> list[Item]:
    """The distinct contents in order; exact repeats become one item. Without `bodies`, turn lengths stay empty."""
    items: list[Item] = []
    position = 0
    for number, file in enumerate(corpus.files):
        content = pq.read_table(file, columns=["content_id"])["content_id"].to_pylist()
        lengths = read_turn_tokens(bodies, file) if bodies else [()] * len(content)
        for row, (content_id, tokens) in enumerate(zip(content, lengths, strict=True)):
            if items and items[-1].content_id == content_id:
                items[-1] = replace(items[-1], example_ids=(*items[-1].example_ids, ids[position]))
            else:
                items.append(Item(content_id, number, row, tokens, (ids[position],)))
            position += 1
    return items


def _groups(items: Sequence[Item], most_rows: int, most_tokens: int) -> Iterator[tuple[Item, ...]]:
    group: list[Item] = []
    tokens = 0
    for item in items:
        if group and (len(group) == most_rows or tokens + item.tokens > most_tokens):
            yield tuple(group)
            group, tokens = [], 0
        group.append(item)
        tokens += item.tokens
    if group:
        yield tuple(group)

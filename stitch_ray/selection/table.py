"""From the files of rating logits to one array a model, and from there to the scores of every example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stitch_ray.config.select import SelectConfig
from stitch_ray.selection.scores import (
    REPO_MODEL_WEIGHTS,
    model_score,
    sentence_score,
    token_score,
    weighted_model_score,
)

Floats = NDArray[np.float64]

_KEY = ["example_id", "turn"]


@dataclass(frozen=True, slots=True)
class Ratings:
    """`logits` of shape (models, turns, prompts, ratings) in float32, one row of `example_ids` and `turns` a turn.

    `bad` maps an example without finite logits to the reason; its turns are in no other field.
    """

    example_ids: list[str]
    first_turn: NDArray[np.int64]
    logits: NDArray[np.float32]
    tokens: NDArray[np.int64]
    truncated: NDArray[np.bool_]
    bad: dict[str, str]

    def per_example(self, turn_values: Floats) -> Floats:
        """Mean over the turns of every example. turn_values: (turns, …) -> (examples, …)."""
        counts = np.diff(np.append(self.first_turn, len(turn_values)))
        sums = np.add.reduceat(turn_values, self.first_turn, axis=0)
        return np.asarray(sums / counts.reshape(-1, *[1] * (turn_values.ndim - 1)))


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of every example. token: (examples, models, prompts); sentence: (examples, models); model: (examples,)."""

    token: Floats
    sentence: Floats
    model: Floats


def load_ratings(files: Sequence[Sequence[Path]], prompt_hashes: Sequence[str], num_ratings: int) -> Ratings:
    """Read and align the rating files: `files[m]` are those of model m. Rows come sorted by example and turn.

    Raises RuntimeError if a (example, turn, model, prompt) is missing or stands twice.
    """
    tables = [_model_table(paths, prompt_hashes) for paths in files]
    keys = tables[0].select(_KEY).take(np.arange(0, tables[0].num_rows, len(prompt_hashes)))
    per_model = []
    bad: dict[str, str] = {}
    for table in tables:
        if not table.select(_KEY).take(np.arange(0, table.num_rows, len(prompt_hashes))).equals(keys):
            raise RuntimeError("the models' rating files are not of the same turns")
        for row in table.filter(pc.is_null(table["logits"])).select(["example_id", "model", "prompt"]).to_pylist():
            bad[row["example_id"]] = f"model {row['model']} gives logits that are not finite (prompt {row['prompt']})"
        per_model.append(_stack(table, len(prompt_hashes), num_ratings))
    ids = keys["example_id"].to_pylist()
    good = np.array([name not in bad for name in ids], dtype=np.bool_)
    kept = [name for name in ids if name not in bad]
    first = np.flatnonzero([position == 0 or kept[position - 1] != name for position, name in enumerate(kept)])
    reference = tables[0]
    return Ratings(
        example_ids=[kept[position] for position in first],
        first_turn=first,
        logits=np.stack(per_model)[:, good],
        tokens=_every(reference["tokens"], len(prompt_hashes)).astype(np.int64)[good],
        truncated=_every(reference["truncated"], len(prompt_hashes)).astype(np.bool_)[good],
        bad=bad,
    )


def score(ratings: Ratings, config: SelectConfig, parameters: Sequence[float]) -> Scores:
    """All three levels. A conversation's score is the mean over its rated turns."""
    rating = config.rating
    by_turn = np.moveaxis(ratings.logits, 0, 1)
    token = ratings.per_example(token_score(by_turn, rating.mode))
    sentence = ratings.per_example(sentence_score(by_turn, rating.alpha, rating.mode))
    if rating.weights == "parameters":
        combined = model_score(sentence, parameters)
    else:
        weights = REPO_MODEL_WEIGHTS if rating.weights == "repo" else rating.weights
        combined = weighted_model_score(sentence, weights)
    return Scores(token, sentence, combined)


def _model_table(paths: Sequence[Path], prompt_hashes: Sequence[str]) -> pa.Table:
    """Ratings of one model for the wanted prompts, sorted by example, turn and the order of `prompt_hashes`."""
    columns = ["example_id", "turn", "model", "prompt", "prompt_hash", "logits", "tokens", "truncated"]
    table = pa.concat_tables([pq.read_table(path, columns=columns) for path in paths])
    wanted = pa.array(prompt_hashes)
    position = pc.index_in(table["prompt_hash"], value_set=wanted)
    table = table.set_column(table.schema.get_field_index("prompt"), "prompt", position)
    table = table.filter(pc.is_valid(table["prompt"]))
    table = table.sort_by([("example_id", "ascending"), ("turn", "ascending"), ("prompt", "ascending")])
    rows = np.arange(table.num_rows)
    in_place = np.array_equal(table["prompt"].to_numpy(), rows % len(prompt_hashes))
    whole_turns = len(rows) % len(prompt_hashes) == 0 and np.array_equal(
        _turn_starts(table), rows[:: len(prompt_hashes)]
    )
    if not in_place or not whole_turns:
        raise RuntimeError("the rating files have a (example, turn, prompt) missing or twice")
    return table


def _turn_starts(table: pa.Table) -> NDArray[np.int64]:
    """Rows of a sorted table whose (example, turn) differs from that of the row before."""
    before, after = table.slice(0, max(0, table.num_rows - 1)), table.slice(1)
    same = [pc.equal(before[name], after[name]).to_numpy() for name in _KEY]
    return np.flatnonzero(np.append(True, ~np.logical_and(*same))[: table.num_rows])


def _stack(table: pa.Table, prompts: int, ratings: int) -> NDArray[np.float32]:
    """Logits as (turns, prompts, ratings); NaN where the table has null."""
    lists = table["logits"].combine_chunks()
    out = np.full((len(lists), ratings), np.nan, np.float32)
    valid = lists.is_valid().to_numpy(zero_copy_only=False)
    out[valid] = lists.flatten().to_numpy(zero_copy_only=False).reshape(-1, ratings)
    return out.reshape(-1, prompts, ratings)


def _every(column: pa.ChunkedArray, step: int) -> NDArray[np.generic]:
    return np.asarray(column.to_numpy(zero_copy_only=False)[::step])

"""The result files of `select`: ratings are there already; this writes scores and the selection."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from stitch_ray.config.select import SelectConfig
from stitch_ray.data.corpus import Corpus, messages_of
from stitch_ray.errors import UserError
from stitch_ray.runs import atomic_path
from stitch_ray.selection.choose import choose_diverse, keep_count, rank_by, rank_random
from stitch_ray.selection.layout import contents
from stitch_ray.selection.preflight import Ready
from stitch_ray.selection.table import Ratings, Scores

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Positions into `Ratings.example_ids`, best first, and where each example stands in the corpus.

    `baselines` holds, for the same number of rows, what the score, a random choice and the longest rows would keep.
    """

    chosen: list[int]
    decisive: Floats
    tokens: NDArray[np.int64]
    corpus_rows: NDArray[np.int64]
    baselines: dict[str, list[int]]


def write_results(
    ready: Ready,
    path: Path,
    corpus: Corpus,
    ids: Sequence[str],
    ratings: Ratings,
    scores: Scores,
    tokens_of: Mapping[str, int],
) -> Outcome:
    """Write `scores.parquet` and `selected.jsonl`. `tokens_of`: an example's content, all rated turns. Raises UserError if more rows are asked for than were rated."""
    config = ready.config
    tokens = np.array([tokens_of[name] for name in ratings.example_ids], dtype=np.int64)
    rows_of = {name: row for row, name in enumerate(ids)}
    corpus_rows = np.array([rows_of[name] for name in ratings.example_ids], dtype=np.int64)
    decisive = _decisive(config, scores)
    _write_scores(path / "scores.parquet", config, ratings, scores, tokens)
    chosen, baselines = _choose(config, corpus, ratings.example_ids, corpus_rows, decisive, tokens)
    _write_selected(path / "selected.jsonl", config, corpus, chosen, decisive, corpus_rows)
    return Outcome(chosen, decisive, tokens, corpus_rows, baselines)


def _decisive(config: SelectConfig, scores: Scores) -> Floats:
    if config.level == "token":
        return scores.token[:, 0, config.rating.token_prompt]
    return scores.sentence[:, 0] if config.level == "sentence" else scores.model


def _choose(
    config: SelectConfig,
    corpus: Corpus,
    ids: Sequence[str],
    corpus_rows: NDArray[np.int64],
    decisive: Floats,
    tokens: NDArray[np.int64],
) -> tuple[list[int], dict[str, list[int]]]:
    try:
        count = keep_count(len(ids), config.select.proportion, config.select.count)
    except ValueError as error:
        raise UserError(str(error)) from error
    orders = {
        "score": rank_by(decisive, ids),
        "random": rank_random(ids, config.seed),
        "longest": rank_by(tokens.astype(np.float64), ids),
    }
    baselines = {name: order[:count].tolist() for name, order in orders.items()}
    if config.select.diversity is None:
        return baselines[config.select.method], baselines
    from stitch_ray.selection.embedding import TextEmbedder

    embedder = TextEmbedder(config.select.diversity.encoder)

    def embed(positions: Sequence[int]) -> NDArray[np.float32]:
        rows = corpus.take(corpus_rows[list(positions)], ["messages", "context"])
        return embedder.embed(["\n".join(c.text for c in contents(messages_of(r), r["context"])) for r in rows])

    return choose_diverse(orders["score"].tolist(), count, embed, config.select.diversity.max_cosine), baselines


def _write_scores(
    path: Path, config: SelectConfig, ratings: Ratings, scores: Scores, tokens: NDArray[np.int64]
) -> None:
    columns = {
        "example_id": pa.array(ratings.example_ids),
        "token_score": pa.array(scores.token[:, 0, config.rating.token_prompt]),
        **{f"sentence_score.{m.name}": pa.array(scores.sentence[:, i]) for i, m in enumerate(config.models)},
        "model_score": pa.array(scores.model),
        "tokens": pa.array(tokens.astype(np.int32)),
    }
    with atomic_path(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def _write_selected(
    path: Path,
    config: SelectConfig,
    corpus: Corpus,
    chosen: Sequence[int],
    decisive: Floats,
    corpus_rows: NDArray[np.int64],
) -> None:
    """The input records unchanged, best first, each with `selection: {rank, score, level}`."""
    raws = corpus.take(corpus_rows[list(chosen)], ["raw"])
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for rank, (position, row) in enumerate(zip(chosen, raws, strict=True), start=1):
            record = json.loads(row["raw"])
            record["selection"] = {"rank": rank, "score": float(decisive[position]), "level": config.level}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

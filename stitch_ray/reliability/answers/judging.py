"""Labels and uncertainty signals of the answers of one batch, with the models that they take loaded once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from stitch_ray.config.sample_answers import SampleAnswersConfig
from stitch_ray.engines.base import Engine
from stitch_ray.reliability.answers.labels import Labelled, Labeller
from stitch_ray.reliability.answers.questions import Question
from stitch_ray.reliability.answers.sampling import Row
from stitch_ray.reliability.signals.compute import SignalItem, compute_signals, needs_engine
from stitch_ray.reliability.signals.equivalence import Equivalence, load_equivalence

Made = tuple[pa.Table, Mapping[str, int]]
"""Columns, row for row those of the answers (null: none), and what was counted on the way."""


class Judging:
    """Of the answers as their file has them, so that a resumed batch has the same numbers, down to their rounding."""

    def __init__(self, config: SampleAnswersConfig) -> None:
        self._config = config

    def labels(self, rows: Sequence[Row], questions: Mapping[str, Question]) -> Made:
        """Column `label`: how right each answer is, the best over the references of its question."""
        asked = [questions[row["example_id"]] for row in rows]
        items = [
            Labelled(question=one.question, answer=row["answer"], references=one.references, context=one.context)
            for row, one in zip(rows, asked, strict=True)
        ]
        found = self._labeller.label(items)
        return pa.table({"label": _column(found.label, pa.float32())}), found.counts

    def signals(self, rows: Sequence[Row], questions: Mapping[str, Question], engine: Callable[[], Engine]) -> Made:
        """A column a signal. `engine` is called, and loads a model, only if a signal takes it."""
        names, problems = self._config.signals.names, Counter[str]()
        items = [_item(row, questions[row["example_id"]]) for row in rows]
        found = compute_signals(
            names,
            items,
            engine=engine() if needs_engine(names, items) else None,
            equivalence=self._equivalence if {"self_consistency", "semantic_entropy"} & set(names) else None,
            problems=problems,
        )
        columns = {name: _column(values, pa.float64()) for name, values in found.items()}
        return pa.table(columns), dict(problems)

    @cached_property
    def _labeller(self) -> Labeller:
        return Labeller(self._config.labels)

    @cached_property
    def _equivalence(self) -> Equivalence:
        return load_equivalence(self._config.signals)


def _item(row: Row, question: Question) -> SignalItem:
    return SignalItem(
        answer_id=f"{row['example_id']}/{row['kind']}-{row['number']}",
        question_id=row["example_id"],
        turns=question.turns,
        answer=row["answer"],
        kind=row["kind"],
        token_ids=None if row["token_ids"] is None else tuple(row["token_ids"]),
        logprobs=row["logprobs"],
        entropies=row["entropies"],
        margins=row["margins"],
    )


def _column(values: NDArray[np.float64], kind: pa.DataType) -> pa.Array:
    """Null where a value is not finite."""
    return pa.array(values, kind, mask=~np.isfinite(values))

"""Scores and labels of answers: exact match, ROUGE-L and BERTScore against the gold answers, and the rule over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stitch_ray.errors import UserError
from stitch_ray.exclusion.labels import CORRECT, Label, Rule, label, rouge_l
from stitch_ray.exclusion.rows import Row

BertScores = Callable[[Sequence[str], Sequence[str]], Sequence[float]]
"""(predictions, gold answers) -> BERTScore F of each pair."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Agreement with one gold answer, all in [0, 1], and what the rule says."""

    exact: bool
    rouge_p: float
    rouge_r: float
    rouge_f: float
    bert_f: float | None
    label: Label


def score(rows: Sequence[Row], rule: Rule = Rule(), bert: BertScores | None = None) -> list[Scored]:
    """One a row: of the gold answer that makes it CORRECT, else of the one that it agrees with most (ROUGE-L F).

    `bert` None: the BERTScore F that the row brings, or none. Equal pairs of texts are scored once.
    """
    pairs = list(dict.fromkeys((row.prediction, gold) for row in rows for gold in row.gold))
    found: dict[tuple[str, str], float | None] = dict.fromkeys(pairs)
    if bert is not None:
        scores = bert([prediction for prediction, _ in pairs], [gold for _, gold in pairs])
        found = dict(zip(pairs, map(float, scores), strict=True))
    rouge = {(prediction, gold): rouge_l(gold, prediction) for prediction, gold in pairs}

    def against(row: Row, gold: str) -> Scored:
        pair = (row.prediction, gold)
        bert_f = row.bert_f if bert is None else found[pair]
        exact = row.prediction == gold
        return Scored(exact, *rouge[pair], bert_f, label(*rouge[pair], bert_f, exact, rule=rule))

    def best(row: Row) -> Scored:
        return max((against(row, gold) for gold in row.gold), key=lambda one: (one.label == CORRECT, one.rouge_f))

    return [best(row) for row in rows]


def bert_scores(encoder: str) -> BertScores:
    """BERTScore F with any encoder (Zhang et al. 2020). Raises UserError for one that cannot be loaded."""
    from stitch_ray.evaluation.bert_score import BertScorer

    scorer = BertScorer(encoder)
    return lambda predictions, golds: scorer.score(predictions, golds)[:, 2].tolist()


def check_bert(rows: Sequence[Row]) -> None:
    """Raises UserError if a row brings no BERTScore: nobody asked for the rule without it."""
    missing = next((row for row in rows if row.bert_f is None), None)
    if missing is not None:
        raise UserError(
            f"{missing.source}: row {missing.line} has no BERTScore F (column bert_f); give --encoder FOLDER to compute "
            "it, or --without-bert for the rule without it"
        )

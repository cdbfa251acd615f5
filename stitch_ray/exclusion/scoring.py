"""Scores and labels of answers: exact match, ROUGE-L and BERTScore against the gold answers, and the rule over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from stitch_ray.errors import UserError
from stitch_ray.evaluation.answers import RougeConvention
from stitch_ray.exclusion.labels import CORRECT, Label, Rule, label, rouge_l
from stitch_ray.exclusion.rows import Row

Triple = tuple[float, float, float]
"""Precision, recall, F."""
BertScores = Callable[[Sequence[str], Sequence[str]], Sequence[Triple]]
"""(predictions, gold answers) -> BERTScore of each pair."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Agreement with one gold answer, all in [0, 1], and what the rule says.

    `rouge_*`: ROUGE-L of convention rouge_101, `standard_rouge_*`: of rouge_score; see `labels.rouge_l`. `bert_*`:
    BERTScore, None where neither an encoder nor the file tells it.
    """

    exact: bool
    rouge_p: float
    rouge_r: float
    rouge_f: float
    standard_rouge_p: float
    standard_rouge_r: float
    standard_rouge_f: float
    bert_p: float | None
    bert_r: float | None
    bert_f: float | None
    label: Label


def score(rows: Sequence[Row], rule: Rule = Rule(), bert: BertScores | None = None) -> list[Scored]:
    """One a row: of the gold answer that makes it CORRECT, else of the one that it agrees with most (the rule's ROUGE-L F).

    `bert` None: the BERTScore that the row brings, or none. Equal pairs of texts are scored once.
    """
    pairs = list(dict.fromkeys((row.prediction, gold) for row in rows for gold in row.gold))
    found: dict[tuple[str, str], Triple] = {}
    if bert is not None:
        scores = bert([prediction for prediction, _ in pairs], [gold for _, gold in pairs])
        found = dict(zip(pairs, scores, strict=True))
    rouge = {
        (prediction, gold): {name: rouge_l(gold, prediction, name) for name in get_args(RougeConvention)}
        for prediction, gold in pairs
    }

    def against(row: Row, gold: str) -> Scored:
        pair = (row.prediction, gold)
        bert_prf = (row.bert_p, row.bert_r, row.bert_f) if bert is None else found[pair]
        exact = row.prediction == gold
        says = label(*rouge[pair][rule.convention], bert_prf[2], exact, rule=rule)
        return Scored(exact, *rouge[pair]["rouge_101"], *rouge[pair]["rouge_score"], *bert_prf, says)

    def best(row: Row) -> Scored:
        each = {gold: against(row, gold) for gold in row.gold}
        agreed = {gold: rouge[row.prediction, gold][rule.convention][2] for gold in each}
        return each[max(each, key=lambda gold: (each[gold].label == CORRECT, agreed[gold]))]

    return [best(row) for row in rows]


def bert_scores(encoder: str) -> BertScores:
    """BERTScore with any encoder (Zhang et al. 2020). Raises UserError for one that cannot be loaded."""
    from stitch_ray.evaluation.bert_score import BertScorer

    scorer = BertScorer(encoder)
    return lambda predictions, golds: [(float(p), float(r), float(f)) for p, r, f in scorer.score(predictions, golds)]


def check_bert(rows: Sequence[Row]) -> None:
    """Raises UserError if a row brings no BERTScore: nobody asked for the rule without it."""
    missing = next((row for row in rows if row.bert_f is None), None)
    if missing is not None:
        raise UserError(
            f"{missing.source}: row {missing.line} has no BERTScore F (column bert_f); give --encoder FOLDER to compute "
            "it, or --without-bert for the rule without it"
        )

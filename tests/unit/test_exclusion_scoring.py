"""Scores of answers against several gold answers: which one counts, and where BERTScore comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from stitch_ray.errors import UserError
from stitch_ray.exclusion.labels import CORRECT, WRONG, Rule
from stitch_ray.exclusion.rows import Row
from stitch_ray.exclusion.scoring import check_bert, score


def row(prediction: str, *gold: str, line: int = 1, **values: Any) -> Row:
    given = {"source": "a.jsonl", "line": line, "example_id": f"e{line}", "question": "Who?", "context": None}
    return Row(**given, gold=gold, prediction=prediction, **values)


def test_the_gold_answer_that_makes_it_correct_counts_even_if_another_shares_more_words() -> None:
    """By words the second is closer (F 2/3 against 1/2); BERTScore accepts the first alone."""

    def bert(predictions: Sequence[str], golds: Sequence[str]) -> list[tuple[float, float, float]]:
        return [(0.0, 0.0, 0.95 if gold == "the king now" else 0.1) for gold in golds]

    strict = Rule(rouge_p_or_r=1.0, rouge_f=1.0)
    (found,) = score([row("old king", "the king now", "king Olaf")], strict, bert)
    assert (found.label, found.bert_f) == (CORRECT, 0.95)


def test_of_gold_answers_that_all_make_it_wrong_the_closest_counts() -> None:
    (found,) = score([row("a b c d e f", "x y z", "a y z w v")])
    assert found.label == WRONG
    assert (found.rouge_p, found.rouge_r) == pytest.approx((1 / 5, 1 / 6))


def test_equal_pairs_are_scored_once_and_every_row_gets_its_own() -> None:
    seen: list[tuple[str, str]] = []

    def bert(predictions: Sequence[str], golds: Sequence[str]) -> list[tuple[float, float, float]]:
        seen.extend(zip(predictions, golds, strict=True))
        return [(0.1, 0.2, len(gold) / 100) for gold in golds]

    rows = [row("a", "bb"), row("a", "bb", "cccc", line=2), row("a", "bb", line=3)]
    found = score(rows, bert=bert)
    assert seen == [("a", "bb"), ("a", "cccc")]
    assert [one.bert_f for one in found] == [0.02, 0.02, 0.02]
    assert (found[0].bert_p, found[0].bert_r) == (0.1, 0.2)


def test_without_an_encoder_the_score_of_the_file_is_taken_and_with_one_it_is_not() -> None:
    given = row("a", "b", bert_p=0.1, bert_r=0.2, bert_f=0.95)
    assert [(one.bert_f, one.label) for one in score([given])] == [(0.95, CORRECT)]
    computed = score([given], bert=lambda predictions, golds: [(0.0, 0.0, 0.3)] * len(golds))
    assert [(one.bert_f, one.label) for one in computed] == [(0.3, WRONG)]
    bare = score([row("a", "b")])
    assert [(one.bert_f, one.label) for one in bare] == [(None, WRONG)]


def test_both_readings_of_rouge_are_kept_and_the_rule_uses_its_own() -> None:
    """Words of the published reading keep their comma."""
    (found,) = score([row("ada", "ada,")])
    assert (found.rouge_f, found.standard_rouge_f, found.exact, found.label) == (0.0, 1.0, False, WRONG)
    (usual,) = score([row("ada", "ada,")], Rule(convention="rouge_score"))
    assert usual.label == CORRECT


def test_only_the_very_text_is_exact() -> None:
    assert [one.exact for one in score([row("Ada", "Ada"), row("ada", "Ada"), row("Ada ", "Ada")])] == [
        True,
        False,
        False,
    ]


def test_a_row_without_bert_score_is_named_with_both_ways_out() -> None:
    scored = row("a", "b", bert_f=0.5)
    check_bert([scored])
    with pytest.raises(UserError, match=r"a\.jsonl: row 7 has no BERTScore F .*--encoder FOLDER.*--without-bert"):
        check_bert([scored, row("a", "b", line=7), row("a", "b", line=8)])

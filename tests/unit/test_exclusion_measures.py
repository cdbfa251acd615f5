"""What a refinement is worth: systems side by side, votes for the same budget, changes, and the validator's verdicts."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef, roc_auc_score

from stitch_ray.exclusion.measures import (
    Answering,
    Samples,
    Within,
    changes,
    likeliest,
    majority,
    surest,
    systems,
    verdicts,
    voted,
    votes,
    within_questions,
)


def way(name: str, right: list[int], answered: list[int] | None = None, calls: float = 1.0) -> Answering:
    flags = np.array(right, bool)
    given = np.ones(len(right), bool) if answered is None else np.array(answered, bool)
    return Answering(
        name=name, right=flags, answered=given, calls=np.full(len(right), calls), tokens=np.full(len(right), 7.0)
    )


def test_an_abstention_is_not_right_and_coverage_says_how_many_there_are() -> None:
    rows = systems([way("first", [1, 0, 0, 1]), way("refined", [1, 1, 0, 0], [1, 1, 0, 0], 2.5)])
    assert [(row.accuracy, row.coverage, row.selective, row.difference) for row in rows] == [
        (0.5, 1.0, 0.5, 0.0),
        (0.5, 0.5, 1.0, 0.0),
    ]
    assert (rows[1].calls, rows[1].tokens) == (2.5, 7.0)
    nothing = systems([way("none", [0, 0], [0, 0])])[0]
    assert nothing.selective is None


def test_differences_are_paired() -> None:
    drawn = np.random.default_rng(0)
    first = (drawn.random(300) < 0.5).astype(int).tolist()
    better = [1 if n % 10 == 0 else value for n, value in enumerate(first)]
    rows = systems([way("first", first), way("better", better)])
    one = rows[1]
    assert one.difference_low is not None
    assert one.difference_high is not None
    assert one.low is not None
    assert one.high is not None
    assert 0 < one.difference_low < one.difference < one.difference_high
    assert one.difference_high - one.difference_low < (one.high - one.low) / 1.5  # unpaired it would be wider


def test_votes_take_the_first_of_equals() -> None:
    one = Samples(("B", "the b", "a", "c"), (-3.0, -2.0, -1.0, -0.5), (False, False, True, False), (2, 3, 1, 1), 10)
    assert [majority(one, k) for k in (1, 2, 3, 4)] == [0, 0, 0, 0]
    assert majority(Samples(("a", "b"), (0.0, 0.0), (True, False), (1, 1), 0), 2) == 0
    assert [likeliest(one, k) for k in (1, 2, 3, 4)] == [0, 1, 2, 3]
    found = voted("likeliest of 3", [one], 3, likeliest)
    assert (found.right.tolist(), found.calls.tolist(), found.tokens.tolist()) == ([True], [3.0], [36.0])


def test_the_surest_are_answered_and_of_equals_the_first() -> None:
    kept = surest(way("vote", [1, 1, 0, 1, 0]), np.array([0.2, 0.9, 0.5, 0.5, 0.5]), 0.6)
    assert kept.name == "vote, surest 60%"
    assert kept.answered.tolist() == [False, True, True, True, False]
    assert kept.right.tolist() == [False, True, False, True, False]
    assert (kept.calls == 1.0).all()  # asked all the same


def test_how_sure_a_vote_is() -> None:
    samples = Samples(("The cat", "dog", "cat.", "bird"), (0.0,) * 4, (True,) * 4, (1,) * 4, 0)
    assert [votes(samples, k) for k in (1, 2, 3, 4)] == [1.0, 0.5, 2 / 3, 0.5]


def test_changes_from_the_first_answer_to_the_last() -> None:
    first = np.array([1, 1, 1, 0, 0, 0], bool)
    right = np.array([1, 0, 0, 1, 0, 0], bool)
    answered = np.array([1, 1, 0, 1, 1, 0], bool)
    found = changes(first, right, answered, np.array([1, 3, 3, 2, 1, 3.0]), np.array([0, 1, 2, 0, 0, 0.0]))
    assert (found.wrong_to_right, found.right_to_wrong, found.right_to_abstention) == (1, 1, 1)
    assert (found.wrong_to_abstention, found.kept) == (1, 2)
    assert found.repeat_rate == pytest.approx(3 / 7)
    assert changes(first, first, first, np.ones(6), np.zeros(6)).repeat_rate is None


def test_a_validator_that_only_tells_questions_apart_is_at_chance_within_them() -> None:
    groups = np.repeat(np.arange(4), 3)
    correct = np.array([1, 0, 1, 0, 0, 1, 1, 1, 1, 0, 0, 0], bool)  # the last two questions have one kind only
    by_question = np.array([0.9, 0.2, 0.99, 0.01])[groups]
    assert roc_auc_score(correct, by_question) > 0.8
    assert within_questions(by_question, correct, groups) == Within(0.5, 2)
    drawn = np.random.default_rng(5).random(12)
    expected = np.mean([roc_auc_score(correct[groups == g], drawn[groups == g]) for g in (0, 1)])
    assert within_questions(drawn, correct, groups).auroc == pytest.approx(expected)
    assert within_questions(drawn, correct | True, groups) == Within(None, 0)


def test_verdicts_are_those_of_scikit_learn() -> None:
    drawn = np.random.default_rng(2)
    correct = drawn.random(200) < 0.3
    probability = np.clip(drawn.normal(np.where(correct, 0.6, 0.4), 0.2), 0, 1)
    found = verdicts(probability, correct)
    says = probability >= 0.5
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(correct, says))
    assert found.mcc == pytest.approx(matthews_corrcoef(correct, says))
    assert found.auroc == pytest.approx(roc_auc_score(correct, probability))
    assert found.tp + found.fp + found.fn + found.tn == found.num == 200
    assert found.majority == max(correct.mean(), 1 - correct.mean())
    assert found.metacognition is not None


def test_a_validator_that_always_says_yes_is_the_majority_at_best() -> None:
    found = verdicts(np.ones(4), np.array([True, False, False, False]))
    assert (found.accuracy, found.majority, found.balanced_accuracy, found.mcc, found.auroc) == (
        0.25,
        0.75,
        0.5,
        None,
        0.5,
    )
    assert found.metacognition is None
    only = verdicts(np.ones(2), np.array([True, True]))
    assert (only.accuracy, only.balanced_accuracy, only.auroc) == (1.0, None, None)
    with pytest.raises(ValueError, match="nothing was judged"):
        verdicts(np.zeros(0), np.zeros(0, bool))

"""Fields of predictions and feedback: what is read, what is unscored or unlabelled, and what is refused with its name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from stitch_ray.data.quarantine import BadRow, Quarantined
from stitch_ray.errors import UserError
from stitch_ray.reliability.risk.rows import check_share, confidence_of, loss_of


@pytest.mark.parametrize(("value", "found"), [(0.25, 0.25), (1, 1.0), (-3.5, -3.5), (None, math.nan)])
def test_a_confidence_is_any_finite_number_and_null_is_unscored(value: Any, found: float) -> None:
    assert confidence_of({"score": value}, "score") == pytest.approx(found, nan_ok=True)


def test_a_field_that_is_not_there_is_unscored() -> None:
    assert math.isnan(confidence_of({}, "score"))


@pytest.mark.parametrize("value", [True, "0.5", math.inf, -math.inf, [0.5]])
def test_what_is_no_confidence_is_refused_by_name(value: Any) -> None:
    with pytest.raises(BadRow, match=r"score is .*, expected a finite number or null"):
        confidence_of({"score": value}, "score")


@pytest.mark.parametrize(
    ("correct", "label", "error", "quality"),
    [
        (True, None, 0.0, 0.0),
        (False, None, 1.0, 1.0),
        (None, 0.75, 0.0, 0.25),
        (None, 0.5, 0.0, 0.5),  # right from one half on
        (None, 0.25, 1.0, 0.75),
        (False, 0.75, 1.0, 0.25),  # each counts for what it is about
        (True, 0, 0.0, 1.0),
        (None, None, math.nan, math.nan),
    ],
)
def test_a_loss_is_that_of_the_label_or_of_the_verdict_and_either_stands_in_for_the_other(
    correct: bool | None, label: float | None, error: float, quality: float
) -> None:
    assert loss_of(correct, label, "error") == pytest.approx(error, nan_ok=True)
    assert loss_of(correct, label, "quality") == pytest.approx(quality, nan_ok=True)


@pytest.mark.parametrize(
    ("correct", "label", "problem"),
    [
        (1, None, "draft_correct is 1, expected true or false"),
        ("yes", None, "draft_correct is 'yes', expected true or false"),
        (None, 1.5, "draft_label is 1.5, expected a number between 0 and 1"),
        (None, math.nan, "draft_label is nan"),
        (True, True, "draft_label is True"),
    ],
)
def test_what_is_no_label_is_refused_by_name(correct: Any, label: Any, problem: str) -> None:
    with pytest.raises(BadRow, match=problem):
        loss_of(correct, label, "error", "draft_")


def bad(count: int) -> list[Quarantined]:
    return [Quarantined("a.jsonl", 3 + number, "no confidence") for number in range(count)]


def test_half_of_the_rows_may_be_unusable_and_not_one_more() -> None:
    check_share("predictions", 4, bad(4), ["a.jsonl"])
    with pytest.raises(
        UserError, match=r"predictions: 5 of 9 rows in a\.jsonl are unusable; the first: a\.jsonl:3: no conf"
    ):
        check_share("predictions", 4, bad(5), ["a.jsonl"])


def test_no_row_at_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"feedback: 0 of 0 rows in a\.jsonl, b\.jsonl are unusable$"):
        check_share("feedback", 0, [], ["a.jsonl", "b.jsonl"])

"""What replies are said to mean, and what is said to have changed."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from stitch_ray.client.words import find_target, percent, promise, word_diff

TARGETS = [
    {"task": None, "target_risk": 0.1, "delta": 0.1, "n_calibration": 1000},
    {"task": None, "target_risk": 0.05, "delta": 0.1, "n_calibration": 1000},
    {"task": "art", "target_risk": 0.2, "delta": 0.05, "n_calibration": 50},
]


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (1, "100 %"), (0.5, "50 %"), (0.1234, "12.3 %"), (0.0042, "0.42 %"), (0.99951, "99.95 %"),
     (0.999999, "above 99.99 %"), (0.000001, "below 0.01 %")],
)  # fmt: skip
def test_no_percentage_claims_a_certainty_that_is_none(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(
    ("task", "risk", "found"), [(None, None, 0.1), (None, 0.05, 0.05), ("other", None, 0.1), ("art", None, 0.2)]
)
def test_the_promise_is_that_of_the_task_else_that_for_all(task: str | None, risk: float | None, found: float) -> None:
    target = find_target({"targets": TARGETS}, task, risk)
    assert target is not None
    assert target["target_risk"] == found


def test_a_task_with_promises_of_its_own_has_no_others() -> None:
    assert find_target({"targets": TARGETS}, "art", 0.05) is None


def test_a_promise_says_how_sure_it_is() -> None:
    assert promise(TARGETS[2]) == (
        "at most 20 % of the answers given to questions of task 'art' are wrong, "
        "with probability 95 % over the 50 calibration answers"
    )


@example(before="a a", after="a")
@given(st.text(alphabet="ab \n", max_size=30), st.text(alphabet="ab \n", max_size=30))
def test_what_is_not_removed_is_the_new_text(before: str, after: str) -> None:
    runs = list(word_diff(before, after))
    assert "".join(text for kind, text in runs if kind != "removed") == after
    assert "".join(text for kind, text in runs if kind != "added").split() == before.split()


def test_only_the_words_that_differ_are_marked() -> None:
    assert list(word_diff("in the year 1884", "in the year 1880")) == [
        ("same", "in the year "),
        ("removed", "1884"),
        ("added", "1880"),
    ]

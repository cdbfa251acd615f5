"""A question keeps its side: whatever else is in the data, in every task, when the other share changes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch_ray.data.splits import split_of
from stitch_ray.records import Example, Turn, content_hash

GOLDEN = ["validation", "train", "validation", "train", "test", "train", "validation", "validation"]
GROUPS = [content_hash(number) for number in range(20_000)]


def sides(validation: float, test: float, salt: str = "salt") -> list[str]:
    return [split_of(group, validation, test, salt) for group in GROUPS]


@pytest.mark.parametrize(("validation", "test"), [(0.02, 0.0), (0.1, 0.15), (0.3, 0.3)])
def test_shares_are_met_within_sampling_error(validation: float, test: float) -> None:
    found = sides(validation, test)
    for name, share in (("validation", validation), ("test", test), ("train", 1 - validation - test)):
        error = (share * (1 - share) / len(GROUPS)) ** 0.5
        assert abs(found.count(name) / len(GROUPS) - share) <= 4 * error


def test_a_split_is_stable_over_versions_and_machines() -> None:
    assert [split_of(str(number), 0.3, 0.3, "stitch_ray") for number in range(8)] == GOLDEN


@given(st.text(), st.text())
def test_without_shares_everything_is_for_training(group: str, salt: str) -> None:
    assert split_of(group, 0, 0, salt) == "train"


def test_a_larger_share_takes_from_training_only() -> None:
    for small, large in ((sides(0.05, 0.1), sides(0.2, 0.1)), (sides(0.1, 0.05), sides(0.1, 0.2))):
        moved = {(before, after) for before, after in zip(small, large, strict=True) if before != after}
        assert moved in ({("train", "validation")}, {("train", "test")})


def test_another_salt_is_another_split() -> None:
    same = sum(a == b for a, b in zip(sides(0.25, 0.25, "a"), sides(0.25, 0.25, "b"), strict=True))
    assert abs(same / len(GROUPS) - 0.375) < 0.02  # .25² + .25² + .5²


def test_examples_with_one_question_are_on_one_side() -> None:
    def group(question: str, answer: str) -> str:
        turns = (Turn("user", question), Turn("assistant", answer))
        return Example(messages=turns, source="", line=1, raw="", task=answer).group_id

    assert group("Who wrote  Faust?", "Goethe") == group("who wrote Faust? ", "J. W. von Goethe")

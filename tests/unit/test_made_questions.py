"""The demo's questions: distinct, right, reproducible."""

from collections import Counter

from stitch_ray.data.made_questions import short_questions


def test_answers_are_right_and_questions_distinct() -> None:
    rows = short_questions(500, seed=3)
    assert len({row["question"] for row in rows}) == len({row["id"] for row in rows}) == 500
    for row in rows:
        words = row["question"].split()
        if row["task"] == "median":
            assert row["answer"] == sorted(words[2])[len(words[2]) // 2]
        else:
            assert row["answer"] == str(int(words[2]) % int(words[4]))
    assert 0.5 < Counter(row["task"] for row in rows)["median"] / 500 < 0.7


def test_a_larger_set_begins_with_the_smaller_one_and_seeds_differ() -> None:
    assert short_questions(50)[:20] == short_questions(20)
    assert short_questions(20, seed=1) != short_questions(20)

"""The demo's questions: distinct, right, reproducible."""

from collections import Counter

from stitch_ray.data import formats
from stitch_ray.data.made_questions import short_questions
from stitch_ray.data.readers import SourceRow


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


def test_rows_are_records_of_a_short_question_with_ids_of_their_seed() -> None:
    rows = short_questions(30, seed=4)
    assert [row["id"] for row in rows] == [f"short-4-{number:05d}" for number in range(30)]
    for row in rows:
        assert set(row) == {"id", "task", "question", "answer"}
        example = formats.convert(SourceRow("made", 1, "{}", row, None))
        assert (example.messages[0].content, example.references) == (row["question"], (row["answer"],))
        assert (example.task, example.own_id) == (row["task"], row["id"])
        assert len(row["answer"]) == 1


def test_a_larger_set_begins_with_the_smaller_one_and_seeds_differ() -> None:
    assert short_questions(50)[:20] == short_questions(20)
    assert short_questions(20, seed=1) != short_questions(20)

from collections import Counter
from datetime import date, timedelta

import pytest

from stitch_ray.data.synthetic import TASKS, instruction_corpus

ROWS = instruction_corpus(2000)


def test_same_seed_gives_same_rows_and_another_seed_others():
    assert instruction_corpus(50) == ROWS[:50]
    assert instruction_corpus(50, seed=1) != ROWS[:50]


def test_rows_are_alpaca_records_with_unique_ids():
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert set(row) == {"id", "task", "instruction", "input", "output", "quality", "defect"}
        assert row["instruction"].strip()
        assert row["output"].strip()


def test_one_row_in_four_is_bad_and_says_why():
    for start in range(0, len(ROWS), 4):
        assert Counter(row["quality"] for row in ROWS[start : start + 4]) == {"good": 3, "bad": 1}
    assert {row["defect"] for row in ROWS if row["quality"] == "good"} == {"none"}
    defects = Counter(row["defect"] for row in ROWS if row["quality"] == "bad")
    assert set(defects) == {"wrong", "truncated", "off_topic", "repeated"}
    assert min(defects.values()) > 50


def test_every_task_occurs_and_lengths_vary():
    assert {row["task"] for row in ROWS} == set(TASKS)
    lengths = [len(row["output"]) for row in ROWS if row["quality"] == "good"]
    assert min(lengths) < 5
    assert max(lengths) > 300


def test_most_questions_are_asked_once():
    assert len({(row["instruction"], row["input"]) for row in ROWS}) > 0.9 * len(ROWS)


def test_good_answers_are_right():
    for row in ROWS:
        if row["quality"] == "bad":
            continue
        question, answer = row["instruction"], row["output"]
        match row["task"]:
            case "arithmetic":
                left, right = answer.split(" = ")
                assert eval(left) == int(right)
                assert left in question
            case "sort_words":
                assert answer.split(", ") == sorted(row["input"].split(", "))
            case "long_sum":
                assert answer.endswith(f"is {sum(map(int, row['input'].split(', ')))}.")
            case "date_shift" if question.startswith("Which date"):
                days, start = question.removeprefix("Which date is ").rstrip("?").split(" days after ")
                assert date.fromisoformat(answer) == date.fromisoformat(start) + timedelta(int(days))


def test_bad_answers_differ_from_every_good_answer_to_the_same_question():
    good = {(row["instruction"], row["input"]): row["output"] for row in ROWS if row["quality"] == "good"}
    bad = [row for row in ROWS if row["quality"] == "bad"]
    assert not any(good.get((row["instruction"], row["input"])) == row["output"] for row in bad)


def test_a_negative_number_of_rows_is_refused():
    with pytest.raises(ValueError, match="negative"):
        instruction_corpus(-1)

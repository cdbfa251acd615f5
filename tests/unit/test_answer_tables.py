"""Files of answers: what is read, what is quarantined, which split, and one answer a question."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stitch_ray.config.reliability import AnswerSplitConfig
from stitch_ray.data.splits import place_of, split_among, split_of
from stitch_ray.errors import UserError
from stitch_ray.records import question_group
from stitch_ray.reliability.baselines import baseline_confidences
from stitch_ray.reliability.tables import answers_hash, one_a_question, read_answers, served


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return str(path)


def row(question: str = "q?", answer: str = "a", **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, "correct": True, **more}


def test_rows_become_answers_with_labels_splits_and_signals(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        [
            row("Née où?", "", label=0.25, correct=None, task="t", kind="sample", perplexity=2.0),
            row("b", "x", context="c", confidence=0.5),
            row("b", "y", context="c", correct=False),
            row("d", "z", correct=None),
        ],
    )
    answers = read_answers([file])
    by = {one["answer"]: one for one in answers.table.to_pylist()}
    assert len(answers) == answers.rows_in == 4
    assert (by[""]["label"], by[""]["correct"], by[""]["kind"], by[""]["task"]) == (0.25, False, "sample", "t")
    assert (by["x"]["label"], by["x"]["correct"], by["x"]["kind"]) == (1.0, True, "answer")
    assert (by["y"]["label"], by["z"]["label"], by["z"]["correct"]) == (0.0, None, None)
    assert by["x"]["group_id"] == by["y"]["group_id"] == question_group("b", "c") != question_group("b", None)
    assert by["x"]["split"] == by["y"]["split"]
    order = answers.column("answer").tolist()
    assert answers.signals["perplexity"][order.index("")] == 2.0
    assert np.isnan(answers.signals["perplexity"][order.index("x")])
    assert np.isnan(answers.column("label")[order.index("z")])
    assert set(answers.signals) == {"perplexity", "confidence"}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"answer": "a"}, "missing field 'question'"),
        ({"question": "  ", "answer": "a"}, "empty question"),
        ({"question": "q", "answer": "\ud800"}, "field 'answer' holds a lone surrogate"),
        ({"question": "q"}, "missing field 'answer'"),
        ({"question": "q", "answer": 3}, "field 'answer' is no text"),
        (row(label=1.5), "label 1.5 is not between 0 and 1"),
        (row(label=float("nan")), "expected a finite number"),
        (row(correct="yes"), "expected true or false"),
        (row(p_true=True), "p_true is True"),
        ("{broken", ""),
    ],
)
def test_a_row_that_cannot_be_used_is_quarantined_with_line_and_reason(tmp_path: Path, bad: Any, reason: str) -> None:
    answers = read_answers([write(tmp_path / "a.jsonl", [row(), bad])])
    assert len(answers) == 1
    (found,) = answers.quarantined
    assert found.line == 2
    assert reason in found.reason
    with pytest.raises(UserError, match="no usable row"):
        read_answers([write(tmp_path / "b.jsonl", [bad])])


def test_exact_repeats_are_one_answer_and_two_labels_for_one_id_are_refused(tmp_path: Path) -> None:
    answers = read_answers([write(tmp_path / "a.jsonl", [row(), row(), row(answer="b")])])
    assert (len(answers), answers.rows_in) == (2, 3)
    with pytest.raises(UserError, match="names two different answers"):
        read_answers([write(tmp_path / "b.jsonl", [row(), row(correct=False)])])


def test_the_order_of_rows_and_files_does_not_matter(tmp_path: Path) -> None:
    rows = [row(f"question {number}", "a") for number in range(20)]
    first = write(tmp_path / "a.jsonl", rows)
    second = [write(tmp_path / "b.jsonl", rows[10:][::-1]), write(tmp_path / "c.jsonl", rows[:10])]
    assert read_answers([first]).table.equals(read_answers(second).table)
    parquet = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    assert read_answers([str(parquet)]).table.equals(read_answers([first]).table)
    assert answers_hash([first]) != answers_hash([str(parquet)])


def test_splits_take_their_shares_on_the_axis_of_finetune() -> None:
    shares = AnswerSplitConfig().shares  # type: ignore[call-arg]
    groups = [question_group(f"question {number}", None) for number in range(20_000)]
    counts = Counter(split_among(group, shares, "salt") for group in groups)
    for name, share in shares.items():
        assert counts[name] / len(groups) == pytest.approx(share, abs=0.012)
    held_out = 1 - shares["train"]
    for group in groups[:2000]:
        trained_on = split_of(group, validation=0.02, test=held_out, salt="salt") != "test"
        assert trained_on == (split_among(group, shares, "salt") == "train")
    assert place_of(groups[0], "salt") != place_of(groups[0], "other")


def test_a_split_without_a_share_gets_nothing() -> None:
    shares = {"test": 0.0, "calibrate": 0.5, "train": 0.5, "stack": 0.0}
    names = {split_among(str(number), shares, "") for number in range(200)}
    assert names == {"calibrate", "train"}


def test_shares_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(ValueError, match=r"add up to 1, not 1\.1"):
        AnswerSplitConfig(train=0.5)  # type: ignore[call-arg]


def test_the_served_kind_is_greedy_or_the_only_one(tmp_path: Path) -> None:
    mixed = read_answers([write(tmp_path / "a.jsonl", [row(kind="greedy"), row(answer="b", kind="sample")])])
    assert mixed.take(served(mixed, None)).column("kind").tolist() == ["greedy"]
    assert mixed.take(served(mixed, "sample")).column("answer").tolist() == ["b"]
    with pytest.raises(UserError, match="no answer is of kind 'x'; there are greedy, sample"):
        served(mixed, "x")
    plain = read_answers([write(tmp_path / "b.jsonl", [row(), row(answer="b")])])
    assert served(plain, None).all()
    two = read_answers([write(tmp_path / "c.jsonl", [row(kind="x"), row(answer="b", kind="y")])])
    with pytest.raises(UserError, match="say which is given in use"):
        served(two, None)


def test_one_answer_of_every_question_is_chosen_without_its_label(tmp_path: Path) -> None:
    rows = [row(f"q{question}", f"a{answer}") for question in range(30) for answer in range(4)]
    answers = read_answers([write(tmp_path / "a.jsonl", rows)])
    chosen = answers.take(one_a_question(answers))
    assert sorted(chosen.column("question")) == sorted(f"q{question}" for question in range(30))
    assert len(set(chosen.column("answer"))) > 1
    flipped = read_answers([write(tmp_path / "b.jsonl", [{**one, "correct": False} for one in rows[::-1]])])
    assert chosen.column("answer_id").tolist() == flipped.take(one_a_question(flipped)).column("answer_id").tolist()


def test_baselines_point_the_right_way_and_chance_depends_on_the_id_alone(tmp_path: Path) -> None:
    rows = [row(f"q{n}", "word " * n, perplexity=float(n + 1), p_true=n / 10) for n in range(10)]
    answers = read_answers([write(tmp_path / "a.jsonl", rows)])
    found = baseline_confidences(answers)
    order = np.argsort([len(text) for text in answers.column("answer")])
    assert (np.diff(found["answer_length"][order]) < 0).all()
    assert (np.diff(found["perplexity"][order]) < 0).all()
    assert (np.diff(found["p_true"][order]) > 0).all()
    assert "semantic_entropy" not in found
    half = answers.take(np.arange(5))
    assert baseline_confidences(half)["random"].tolist() == found["random"][:5].tolist()
    assert baseline_confidences(half, seed=1)["random"].tolist() != found["random"][:5].tolist()
    assert ((found["random"] >= 0) & (found["random"] < 1)).all()


def test_split_is_refused_for_run_folders_and_missing_paths_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        read_answers([str(tmp_path / "absent.jsonl")])
    (tmp_path / "run").mkdir()
    pq.write_table(pa.table({"answer_id": ["a"]}), tmp_path / "run" / "answers.parquet")
    with pytest.raises(UserError, match="no finished run of sample-answers"):
        read_answers([str(tmp_path / "run")])

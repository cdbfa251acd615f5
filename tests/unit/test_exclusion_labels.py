"""The EXAR rule, the rows it is applied to, and how judgements agree."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from sklearn.metrics import accuracy_score, cohen_kappa_score

from stitch_ray.errors import UserError
from stitch_ray.exclusion.agreement import agreement
from stitch_ray.exclusion.labelling import label_files
from stitch_ray.exclusion.labels import CORRECT, WRONG, Label, Rule, label, read_label, rouge_l
from stitch_ray.exclusion.rows import read_rows

ROW = {"question": "Who?", "gold": "Ada", "prediction": "Ada", "bert_f": 1.0}


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((0, 0, 0, 0.0, True), CORRECT),
        ((0.6, 0.6, 0.6, 0.49, False), WRONG),  # the bounds themselves are not enough
        ((0.61, 0, 0, 0.0, False), CORRECT),
        ((0, 0.61, 0, 0.0, False), CORRECT),
        ((0, 0, 0.51, 0.5, False), CORRECT),
        ((0, 0, 0.51, 0.49, False), WRONG),
        ((0, 0, 0.5, 0.9, False), WRONG),
        ((0, 0, 0, 0.91, False), CORRECT),
        ((0, 0, 0.51, None, False), CORRECT),
        ((0, 0, 0.5, None, False), WRONG),
    ],
)
def test_the_rule(scores: tuple[float, float, float, float | None, bool], expected: Label) -> None:
    assert label(*scores) == expected


def test_rouge_has_the_gold_answer_where_the_package_has_the_hypothesis() -> None:
    # `rouge` 1.0.1: hypothesis "the cat sat", reference "the cat" -> p 2/3, r 1, f .7999999952
    assert rouge_l("the cat sat", "the cat") == pytest.approx((2 / 3, 1.0, 0.7999999952), abs=1e-10)
    assert rouge_l("the cat", "") == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "found"), [("CORRECT", CORRECT), (" wrong.\n", WRONG), ("INCORRECT", None), ("CORRECT WRONG", None)]
)
def test_a_label_is_one_word_and_no_other(text: str, found: Label | None) -> None:
    assert read_label(text) == found


def test_texts_that_look_like_nothing_are_texts_and_an_empty_prediction_is_wrong(tmp_path: Path) -> None:
    rows = [
        {**ROW, "gold": "None", "prediction": "None"},
        {**ROW, "question": "nan", "gold": "NaN", "prediction": "nan", "bert_f": 0.2},
        {**ROW, "prediction": "", "bert_f": 0.0},
        {**ROW, "prediction": None, "bert_f": 0.0},
    ]
    summary = label_files([lines(tmp_path / "a.jsonl", *rows)], tmp_path / "run")
    assert (summary.facts["rows_out"], summary.facts["rows_quarantined"]) == (4, 0)
    assert summary.facts["empty_predictions"] == 2
    table = pq.read_table(tmp_path / "run" / "labelled.parquet")
    assert table["label"].to_pylist() == [CORRECT, WRONG, WRONG, WRONG]


def test_any_gold_answer_will_do(tmp_path: Path) -> None:
    row = {**ROW, "gold": ["Grace Hopper", "Ada"], "bert_f": 0.1}
    label_files([lines(tmp_path / "a.jsonl", row)], tmp_path / "run")
    [found] = pq.read_table(tmp_path / "run" / "labelled.parquet").to_pylist()
    assert (found["label"], found["exact"]) == (CORRECT, True)


def test_the_usual_rouge_reads_an_answer_the_other_way_round(tmp_path: Path) -> None:
    # One of the answer's four words is the gold answer's only one: precision 1/4, recall 1; as published 1 and 1/4.
    source = lines(tmp_path / "a.jsonl", {**ROW, "gold": "ada", "prediction": "it was ada lovelace", "bert_f": 0.1})
    strict = Rule(convention="rouge_score", rouge_p_or_r=0.99)
    for rule in (Rule(), strict):
        label_files([source], tmp_path / "run", rule=rule, overwrite=True)
        [found] = pq.read_table(tmp_path / "run" / "labelled.parquet").to_pylist()
        assert found["label"] == CORRECT
        assert (found["rouge_p"], found["rouge_r"]) == (1.0, 0.25)
        assert (found["standard_rouge_p"], found["standard_rouge_r"], found["standard_rouge_f"]) == (0.25, 1.0, 0.4)
    # Words of the published convention keep their full stop: nothing is shared, while the usual one shares "ada".
    row = {**ROW, "gold": "ada,", "prediction": "ada", "bert_f": 0.1}
    for rule, expected in ((Rule(), WRONG), (Rule(convention="rouge_score"), CORRECT)):
        label_files([lines(tmp_path / "b.jsonl", row)], tmp_path / "run", rule=rule, overwrite=True)
        assert pq.read_table(tmp_path / "run" / "labelled.parquet")["label"].to_pylist() == [expected]


def test_precision_recall_and_f1_are_those_of_bertscore_only_together(tmp_path: Path) -> None:
    """As the published files name them; an f1 alone may be that of words."""
    published = {"question": "Who?", "gold": "Ada", "prediction": "Bob", "Precision": 0.1, "Recall": 0.2, "f1": 0.95}
    label_files([lines(tmp_path / "a.jsonl", published)], tmp_path / "run")
    [found] = pq.read_table(tmp_path / "run" / "labelled.parquet").to_pylist()
    assert (found["bert_p"], found["bert_r"], found["bert_f"], found["label"]) == (0.1, 0.2, 0.95, CORRECT)
    alone = {key: value for key, value in published.items() if key not in ("Precision", "Recall")}
    with pytest.raises(UserError, match="row 1 has no BERTScore F"):
        label_files([lines(tmp_path / "b.jsonl", alone)], tmp_path / "other")
    label_files([str(tmp_path / "b.jsonl")], tmp_path / "other", columns={"bert_f": "f1"})
    assert pq.read_table(tmp_path / "other" / "labelled.parquet")["label"].to_pylist() == [CORRECT]


def test_rows_that_cannot_be_used_are_kept_with_their_reason(tmp_path: Path) -> None:
    rows = [
        ROW,
        {**ROW, "question": " "},
        {**ROW, "gold": ""},
        {**ROW, "gold": []},
        {**ROW, "label": "maybe"},
        {**ROW, "bert_f": "high"},
        {**ROW, "prediction": True},
    ]
    label_files([lines(tmp_path / "a.jsonl", *rows)], tmp_path / "run")
    bad = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["line"], row["reason"]) for row in bad] == [
        (2, "empty question"),
        (3, "empty gold answer"),
        (4, "empty gold answer"),
        (5, "label is 'maybe', expected CORRECT or WRONG"),
        (6, "bert_f is 'high', expected a finite number"),
        (7, "prediction is of type bool, expected text"),
    ]


def test_missing_columns_are_named_before_anything_is_written(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", {"Q": "Who?", "gold": "Ada", "prediction": "Ada"})
    with pytest.raises(
        UserError, match=r"a.jsonl: has no column for the question .*--column question=NAME; it has Q, "
    ):
        label_files([source], tmp_path / "run")
    with pytest.raises(UserError, match=r"a.jsonl: has no column 'query' \(question\)"):
        label_files([source], tmp_path / "run", columns={"question": "query"})
    with pytest.raises(UserError, match="column answer: no such role"):
        read_rows([source], {"answer": "gold"})
    with pytest.raises(UserError, match=r"a.jsonl: row 1 has no BERTScore F"):
        label_files([source], tmp_path / "run", columns={"question": "Q"})
    assert not (tmp_path / "run").exists()


def test_labels_do_not_follow_the_order_of_rows(tmp_path: Path) -> None:
    drawn = random.Random(3)
    words = ["the", "old", "king", "of", "Holland", "."]
    rows = [
        {
            "example_id": str(number),
            "question": f"q{number % 9}",
            "gold": " ".join(drawn.choices(words, k=4)),
            "prediction": " ".join(drawn.choices(words, k=3)),
            "bert_f": drawn.random(),
        }
        for number in range(60)
    ]
    found = []
    for attempt in range(2):
        label_files([lines(tmp_path / f"{attempt}.jsonl", *rows)], tmp_path / f"run{attempt}")
        table = pq.read_table(tmp_path / f"run{attempt}" / "labelled.parquet").to_pylist()
        found.append({row["example_id"]: row["label"] for row in table})
        drawn.shuffle(rows)
    assert found[0] == found[1]
    assert set(found[0].values()) == {CORRECT, WRONG}


def test_agreement_is_that_of_scikit_learn() -> None:
    drawn = random.Random(0)
    first: list[Label | None] = [drawn.choice((CORRECT, WRONG, None)) for _ in range(200)]
    second: list[Label | None] = [one if drawn.random() < 0.7 else WRONG for one in first]
    ours = agreement(first, second)
    both = [(one, two) for one, two in zip(first, second, strict=True) if one and two]
    assert ours.num == len(both)
    assert ours.accuracy == pytest.approx(accuracy_score(*zip(*both, strict=True)))
    assert ours.kappa == pytest.approx(cohen_kappa_score(*zip(*both, strict=True)))
    assert agreement([None], [CORRECT]).accuracy is None
    assert agreement([CORRECT], [CORRECT]).kappa is None


def test_the_same_labels_are_not_made_twice_and_others_need_another_folder(tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", ROW)
    label_files([source], tmp_path / "run")
    before = (tmp_path / "run" / "labelled.parquet").stat().st_mtime_ns
    assert label_files([source], tmp_path / "run").facts["correct"] == 1
    assert (tmp_path / "run" / "labelled.parquet").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"made with other settings \(rule.bert\)"):
        label_files([source], tmp_path / "run", rule=Rule(bert=0.8))
    assert label_files([source], tmp_path / "run", rule=Rule(bert=0.8), overwrite=True).facts["correct"] == 1


def test_a_missing_encoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-encoder"):
        label_files([lines(tmp_path / "a.jsonl", ROW)], tmp_path / "run", encoder=str(tmp_path / "no-encoder"))
    assert not (tmp_path / "run").exists()

"""DATASET+: nothing is lost or counted twice, the order of rows changes nothing, and gold answers stay gold."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stitch_ray.config.exar import ExarMergeConfig
from stitch_ray.config.loading import validate
from stitch_ray.data.trained_on import write_trained_on
from stitch_ray.errors import UserError
from stitch_ray.exclusion.datasets import Answered, balanced, exar_records, merge, validator_records
from stitch_ray.exclusion.labelling import label_files
from stitch_ray.exclusion.labels import CORRECT, WRONG
from stitch_ray.exclusion.merging import estimate, pipeline, preflight
from stitch_ray.records import question_group
from stitch_ray.runs import RunFolder


def answered(question: str, prediction: str, label: Any = WRONG, **more: Any) -> Answered:
    values: dict[str, Any] = {"context": None, "gold": ("gold",), "temperature": 0.1, **more}
    group = question_group(question, None)
    return Answered(question=question, group_id=group, prediction=prediction, label=label, **values)


def test_an_answer_given_at_several_temperatures_is_one() -> None:
    rows = [
        answered("q", "a", temperature=0.8),
        answered("q", "a", temperature=0.1),
        answered("Q ", "a", temperature=0.1),
        answered("q", "b"),
        answered("other", "a"),
    ]
    found = merge(rows)
    assert {(one.answer.group_id, one.answer.prediction, one.num, one.temperatures) for one in found} == {
        (question_group("q", None), "a", 3, (0.1, 0.8)),
        (question_group("q", None), "b", 1, (0.1,)),
        (question_group("other", None), "a", 1, (0.1,)),
    }


def test_a_question_with_two_gold_answers_has_both() -> None:
    rows = [
        answered("q", "a", WRONG, gold=("x",)),
        answered("q", "a", CORRECT, gold=("a",)),
        answered("q", "b", WRONG, gold=("x",)),
    ]
    found = merge(rows)
    assert [(one.answer.prediction, one.answer.label, set(one.answer.gold)) for one in found] == [
        ("a", CORRECT, {"a", "x"}),
        ("b", WRONG, {"a", "x"}),
    ]
    assert exar_records(found) == [{"question": "q", "answer": list(found[0].answer.gold), "excluded": ["b"]}]


def test_people_who_disagree_count_as_nobody() -> None:
    rows = [answered("q", "a", human=CORRECT), answered("q", "a", human=WRONG), answered("q", "b", human=WRONG)]
    assert [one.answer.human for one in merge(rows)] == [None, WRONG]


@pytest.mark.parametrize("key", ["question_answer", "answer"])
def test_the_order_of_rows_changes_nothing(key: Any) -> None:
    drawn = random.Random(1)
    rows = [
        answered(f"q{drawn.randrange(5)}", drawn.choice("abc"), temperature=drawn.choice((0.1, 0.8)), bert_f=0.5)
        for _ in range(60)
    ]
    expected = merge(rows, key)
    for _ in range(5):
        drawn.shuffle(rows)
        assert merge(rows, key) == expected
    assert len(expected) == (3 if key == "answer" else len({(row.question, row.prediction) for row in rows}))


def test_balance_evens_out_both_labels() -> None:
    rows = merge([answered("q", str(n), CORRECT if n < 2 else WRONG) for n in range(8)])
    kept = balanced(rows, "downsample", 0)
    assert [one.answer.label for one in kept].count(CORRECT) == 2
    assert len(kept) == 4
    assert {one.answer_id for one in kept} != {one.answer_id for one in balanced(rows, "downsample", 1)}
    weighed = balanced(rows, "weights", 0)
    by_label = {label: sum(one.weight for one in weighed if one.answer.label == label) for label in (CORRECT, WRONG)}
    assert by_label == {CORRECT: pytest.approx(4), WRONG: pytest.approx(4)}
    assert balanced(rows[:1], "weights", 0) == rows[:1]


def test_what_the_validator_learns_from() -> None:
    rows = merge([answered("q", "a", WRONG), answered("q", " ", WRONG), answered("p", "gold", CORRECT)])
    without = validator_records(rows, gold=False)
    assert sorted((one["question"], one["answer"], one["verdict"]) for one in without) == [
        ("p", "gold", CORRECT),
        ("q", "a", WRONG),
    ]
    more = [one for one in validator_records(rows, gold=True) if one not in without]
    assert more == [{"question": "q", "answer": "gold", "verdict": CORRECT}]


def test_gold_is_never_excluded_nor_overwritten() -> None:
    rows = merge([answered("q", "gold ", WRONG), answered("q", "b", WRONG), answered("q", "c", CORRECT)])
    assert exar_records(rows) == [{"question": "q", "answer": ["gold"], "excluded": ["b"]}]


def labelled(folder: Path, num: int = 40) -> Path:
    rows = [
        {"question": f"q{n}", "gold": "g", "prediction": prediction, "bert_f": 0.1}
        for n in range(num)
        for prediction in ("g", "wrong", "wrong")
    ]
    source = folder / "answers.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    label_files([str(source)], folder / "labelled")
    return folder / "labelled"


def run(config: ExarMergeConfig, folder: Path) -> Any:
    ready = preflight.check(config)
    return pipeline.run(ready, RunFolder.open(folder, "exar-merge", {}, ready.work)).facts


def test_only_the_train_split_is_learned_from(tmp_path: Path) -> None:
    config = validate(ExarMergeConfig, {"answers": [str(labelled(tmp_path))], "split": {"test": 0.3}}, "")
    facts = run(config, tmp_path / "run")
    assert (facts["rows_in"], facts["rows_out"], facts["records_written"]) == (120, 120, 80)
    table = pq.read_table(tmp_path / "run" / "dataset_plus.parquet").to_pylist()
    held_out = {row["question"] for row in table if row["split"] == "test"}
    assert 4 < len(held_out) < 20
    for name in ("validator.jsonl", "exar.jsonl"):
        records = [json.loads(line) for line in (tmp_path / "run" / name).read_text().splitlines()]
        assert {row["question"] for row in records} == {f"q{n}" for n in range(40)} - held_out
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert len({row["answer_id"] for row in answers}) == 80
    assert sum(row["correct"] for row in answers) == 40


def test_answers_to_questions_that_a_model_learned_from_are_dropped(tmp_path: Path) -> None:
    source = labelled(tmp_path)
    (tmp_path / "model").mkdir()
    write_trained_on(tmp_path / "model", [question_group(f"q{n}", None) for n in range(10)])
    config = validate(ExarMergeConfig, {"answers": [str(source)], "held_out_from": [str(tmp_path / "model")]}, "")
    facts = run(config, tmp_path / "run")
    assert facts["rows_dropped"] == {"answers to questions that a model learned from": 30}
    assert "drop   30 answers to questions that a model learned from" in estimate.describe(preflight.check(config))
    without = config.model_copy(update={"held_out_from": [str(tmp_path)]})
    with pytest.raises(UserError, match="does not say what it was trained on"):
        preflight.check(without)
    with pytest.raises(UserError, match="is no finished run of exar label"):
        preflight.check(config.model_copy(update={"answers": [str(tmp_path / "model")]}))

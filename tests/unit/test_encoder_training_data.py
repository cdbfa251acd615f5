"""What the encoder learns from: questions held out whole, classes in balance, the same for every order and worker count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stitch_ray.config.train_scorer import ScorerTrainingConfig, TrainScorerConfig
from stitch_ray.errors import UserError
from stitch_ray.reliability.scorer.train_data import TrainingRow, class_weights, prepare
from stitch_ray.reliability.scorer.training import finetune_config
from stitch_ray.training.dataset import TokenDataset
from stitch_ray.training.job import run_plan

ROWS = [
    TrainingRow(f"q{question}/a{answer}", f"group-{question}", (2, 4 + question % 50, 3, 5 + answer, 3), 3, label)
    for question in range(60)
    for answer, label in enumerate((1.0, 0.3, 0.0, 0.1))
]


def settings(**training: Any) -> ScorerTrainingConfig:
    return ScorerTrainingConfig.model_validate(training)


def config(**training: Any) -> TrainScorerConfig:
    return TrainScorerConfig.model_validate({"answers": ["none"], "encoder": {"path": "none"}, "training": training})


def opened(folder: Path) -> tuple[TokenDataset, TokenDataset]:
    return TokenDataset.open(folder / "train.arrow"), TokenDataset.open(folder / "validation.arrow")


def test_a_question_is_held_out_with_all_its_answers(tmp_path: Path) -> None:
    prepare(tmp_path / "data", ROWS, settings(validation=0.3))
    questions = [{name.partition("/")[0] for name in part.example_ids} for part in opened(tmp_path / "data")]
    assert not questions[0] & questions[1]
    assert len(questions[0] | questions[1]) == 60
    assert 8 <= len(questions[1]) <= 28
    assert [len(part) for part in opened(tmp_path / "data")] == [4 * len(part) for part in questions]


def test_neither_order_nor_interruption_changes_the_data(tmp_path: Path) -> None:
    prepare(tmp_path / "one", ROWS, settings())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.arrow").write_bytes(b"left by a command that was killed")
    prepare(tmp_path / "other", [ROWS[i] for i in np.random.default_rng(0).permutation(len(ROWS))], settings())
    for file in ("train.arrow", "validation.arrow", "data.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_finished_data_is_taken_as_it_is(tmp_path: Path) -> None:
    facts = prepare(tmp_path / "data", ROWS, settings())
    before = (tmp_path / "data" / "train.arrow").stat().st_mtime_ns
    assert prepare(tmp_path / "data", [], settings()) == facts
    assert (tmp_path / "data" / "train.arrow").stat().st_mtime_ns == before


def test_right_and_wrong_answers_weigh_the_same_in_sum(tmp_path: Path) -> None:
    facts = prepare(tmp_path / "data", ROWS, settings())
    train, validation = opened(tmp_path / "data")
    right = train.labels >= 0.5
    assert train.loss_weights[right].sum() == pytest.approx(train.loss_weights[~right].sum())
    assert train.loss_weights.sum() == pytest.approx(len(train))
    assert facts["weights"] == pytest.approx({"right": 2.0, "wrong": 2 / 3})
    # Those of the training answers, so that both losses are of one kind.
    assert set(validation.loss_weights) == set(train.loss_weights)


def test_without_balance_every_answer_has_weight_1(tmp_path: Path) -> None:
    prepare(tmp_path / "data", ROWS, settings(balance=False))
    assert all(set(part.loss_weights) == {1.0} for part in opened(tmp_path / "data"))


@pytest.mark.parametrize(("label", "kind", "other"), [(0.9, "right", "wrong"), (0.0, "wrong", "right")])
def test_a_single_class_is_trained_on_without_weights_and_said(
    tmp_path: Path, label: float, kind: str, other: str
) -> None:
    rows = [TrainingRow(row.answer_id, row.group_id, row.ids, row.second, label) for row in ROWS]
    facts = prepare(tmp_path / "data", rows, settings())
    assert facts["weights"] == {"right": 1.0, "wrong": 1.0}
    assert f"are {kind}: it has seen no {other} one" in facts["notes"][0]


def test_weights_of_a_single_answer() -> None:
    assert class_weights(np.array([0.5])) == {"right": 1.0, "wrong": 1.0}
    assert class_weights(np.array([0.5, 0.49, 0.2])) == {"right": 1.5, "wrong": 0.75}


def test_no_question_for_validation_is_said(tmp_path: Path) -> None:
    facts = prepare(tmp_path / "data", ROWS[:4], settings(validation=1e-9))
    assert facts["validation_answers"] == 0
    assert "No question was held out" in facts["notes"][-1]


def test_nothing_left_to_train_on_is_an_error_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="of 4 answers to train on 4 are for validation and none is left"):
        prepare(tmp_path / "data", ROWS[:4], settings(validation=1 - 1e-9))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("label", [float("nan"), -0.1, 1.5])
def test_a_label_outside_0_to_1_is_refused_with_its_answer(tmp_path: Path, label: float) -> None:
    rows = [*ROWS, TrainingRow("bad", "group", (2, 3), 0, label)]
    with pytest.raises(UserError, match="the label of bad is"):
        prepare(tmp_path / "data", rows, settings())


def test_workers_share_a_step_without_changing_it(tmp_path: Path) -> None:
    """The same forwards in the same steps, so that the weights are the same as well but for rounding."""
    prepare(tmp_path / "data", ROWS, settings())
    train, _ = opened(tmp_path / "data")
    plans = [
        run_plan(finetune_config(config(batch=32, workers=workers)), train.lengths, train.task_ids)
        for workers in (1, 2, 4)
    ]
    steps = [[plan.step(number) for number in range(plan.total_steps)] for plan in plans]
    assert steps[0] == steps[1] == steps[2]
    assert {sum(map(len, step)) for step in steps[0][:6]} == {32}
    assert max(len(micro) for step in steps[0] for micro in step) == 8


@pytest.mark.parametrize(
    ("batch", "workers", "gpus", "examples", "accumulation"),
    [(32, 1, 0, 8, 4), (32, 1, 1, 32, 1), (24, 3, 0, 8, 1), (20, 2, 0, 5, 2), (1, 1, 0, 1, 1), (7, 1, 0, 7, 1)],
)
def test_forwards_divide_the_batch(batch: int, workers: int, gpus: int, examples: int, accumulation: int) -> None:
    found = finetune_config(config(batch=batch, workers=workers, resources={"num_gpus": gpus}))
    assert (found.batch.examples, found.batch.accumulation) == (examples, accumulation)
    assert found.micro_batches * examples == batch


def test_short_inputs_need_fewer_forwards() -> None:
    found = [finetune_config(config(batch=64), longest).batch.examples for longest in (512, 100, 64, 10, 5000)]
    assert found == [8, 32, 64, 64, 1]


def test_a_batch_that_workers_cannot_share_is_refused_with_one_that_they_can() -> None:
    with pytest.raises(UserError, match=r"training\.batch: 32 answers .* 3 workers; set it to 33"):
        finetune_config(config(batch=32, workers=3))


def test_settings_mean_what_they_mean_in_finetune() -> None:
    chosen = config(learning_rate=1e-4, warmup=0.2, weight_decay=0.1, eval_every=7, epochs=2, early_stopping=None)
    found = finetune_config(chosen)
    assert (found.optimizer.learning_rate, found.optimizer.warmup, found.optimizer.weight_decay) == (1e-4, 0.2, 0.1)
    assert found.optimizer.schedule == "linear"
    assert (found.eval.every, found.checkpoint.every, found.epochs) == (7, 7, 2)
    assert found.early_stopping is None
    assert finetune_config(config()).early_stopping is not None
    assert (found.packing, found.loss, found.method) == (False, "token_mean", "full")

"""Weights of the tasks in a step: those of the configuration, or CoBa's over what is measured for it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.training.coba import CoBa
from stitch_ray.training.weighing import TaskWeigher

MODEL: Any = object()
FIRST = np.array([2.0, 1.0])


class Validation:
    """Losses on a straight line, the first task falling faster; notes what was measured."""

    def __init__(self) -> None:
        self.sampled: list[tuple[int, int]] = []
        self.whole = 0

    def loss(self, model: Any) -> Any:
        assert model is MODEL
        self.whole += 1
        return SimpleNamespace(tasks=FIRST)

    def sample(self, model: Any, step: int, examples: int) -> np.ndarray:
        assert model is MODEL
        self.sampled.append((step, examples))
        return losses(step)


def losses(step: int) -> np.ndarray:
    return FIRST * [1 - 0.05 * step, 1 - 0.01 * step]


def weigher(**changes: Any) -> tuple[TaskWeigher, Validation]:
    tasks = [{"name": "a", "data": "a.json"}, {"name": "b", "data": "b.json"}]
    config = FinetuneConfig.model_validate({"model": {"path": "m"}, "tasks": tasks, **changes})
    validation = Validation()
    return TaskWeigher(config, validation), validation  # type: ignore[arg-type]


COBA = {"loss": "coba", "coba": {"warmup": 3, "history": 6, "tau": 5, "examples": 4}}


def coba() -> CoBa:
    found = CoBa(2, warmup=3, history=6, tau=5, interval=1)
    found.start(FIRST.tolist())
    return found


def test_fixed_weights_are_those_of_the_configuration_and_nothing_is_measured() -> None:
    tasks = [{"name": "a", "data": "a.json", "weight": 3.0}, {"name": "b", "data": "b.json"}]
    fixed, validation = weigher(tasks=tasks)
    fixed.start(MODEL)
    assert [fixed.weights(MODEL, step).tolist() for step in (0, 1, 50)] == [[3.0, 1.0]] * 3
    assert (validation.whole, validation.sampled, fixed.state_dict()) == (0, [], {})
    fixed.load_state_dict({"anything": 1})
    assert fixed.weights(MODEL, 0).tolist() == [3.0, 1.0]


def test_coba_weighs_by_what_is_sampled_before_every_step_but_the_first() -> None:
    found, validation = weigher(**COBA)
    found.start(MODEL)
    assert found.weights(MODEL, 0).tolist() == [0.5, 0.5]
    assert (validation.whole, validation.sampled) == (1, [])
    expected = coba()
    for step in range(1, 9):
        weights = found.weights(MODEL, step)
        assert weights.tolist() == pytest.approx(expected.update(step, losses(step).tolist()), abs=1e-6)
    assert validation.sampled == [(step, 4) for step in range(1, 9)]
    assert weights[0] != weights[1]


def test_a_weigher_that_was_stopped_goes_on_as_if_it_had_not_been() -> None:
    whole, _ = weigher(**COBA)
    whole.start(MODEL)
    for step in range(6):
        whole.weights(MODEL, step)
    resumed, validation = weigher(**COBA)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict(), allow_nan=False)))
    for step in range(6, 10):
        assert resumed.weights(MODEL, step).tolist() == whole.weights(MODEL, step).tolist()
    assert validation.whole == 0

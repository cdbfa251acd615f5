"""The learning rate of every step."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch_ray.config.finetune import OptimizerConfig
from stitch_ray.training.schedule import learning_rate, warmup_steps


def optimizer(**values: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"learning_rate": 1.0, "warmup": 0} | values)


def rates(total_steps: int, **values: object) -> list[float]:
    return [learning_rate(step, total_steps, optimizer(**values)) for step in range(total_steps)]


def test_linear_values() -> None:
    expected = [0.25, 0.5, 0.75, 1, 0.85, 0.7, 0.55]
    assert rates(7, schedule="linear", warmup=4, min_learning_rate=0.4) == pytest.approx(expected)


def test_cosine_values() -> None:
    quarter = (1 + math.sqrt(0.5)) / 2
    assert rates(5, schedule="cosine", warmup=2) == pytest.approx([0.5, 1, quarter, 0.5, 1 - quarter], abs=1e-12)


def test_constant_values() -> None:
    assert rates(5, schedule="constant", warmup=2, min_learning_rate=0.1) == [0.5, 1, 1, 1, 1]


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert rates(2, schedule="linear") == [1, 0.5]


@pytest.mark.parametrize(
    ("warmup", "total_steps", "steps"),
    [(0, 10, 0), (0.03, 10, 1), (0.03, 100, 3), (0.07, 100, 7), (0.5, 5, 3), (1, 100, 1), (7, 100, 7), (7, 5, 7)],
)
def test_warmup_is_a_share_below_one_and_steps_from_one_on(warmup: float, total_steps: int, steps: int) -> None:
    assert warmup_steps(total_steps, optimizer(warmup=warmup)) == steps


def test_a_run_shorter_than_its_warmup_only_rises() -> None:
    assert rates(3, warmup=6) == pytest.approx([1 / 6, 2 / 6, 3 / 6])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_a_run_of_one_step_learns_at_the_peak(schedule: str) -> None:
    assert rates(1, schedule=schedule, warmup=0.03) == [1]
    assert rates(1, schedule=schedule) == [1]


@given(
    st.sampled_from(["cosine", "linear"]),
    st.integers(2, 300),
    st.one_of(st.floats(0, 0.9), st.integers(1, 300)),
    st.floats(1e-6, 1e-1),
    st.floats(0, 1),
)
def test_rises_to_the_peak_and_falls_to_the_end(
    schedule: str, total_steps: int, warmup: float, peak: float, end_share: float
) -> None:
    end = peak * end_share
    config = optimizer(learning_rate=peak, schedule=schedule, warmup=warmup, min_learning_rate=end)
    steps = warmup_steps(total_steps, config)
    values = [learning_rate(step, total_steps, config) for step in range(total_steps + 3)]
    top = max(steps - 1, 0)
    if top < total_steps - 1:
        assert values[top] == peak
        assert values[total_steps - 1] >= end
        assert values[total_steps:] == [end] * 3
        assert all(a < b for a, b in itertools.pairwise(values[: top + 1]))
        assert all(a >= b - 1e-15 for a, b in itertools.pairwise(values[top:]))
    assert all(0 < value <= peak * (1 + 1e-12) for value in values[: total_steps - 1])

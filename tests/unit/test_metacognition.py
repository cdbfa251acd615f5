"""meta-d': an ideal observer's is its d', and noise in the confidences alone lowers it."""

from __future__ import annotations

import numpy as np
import pytest

from stitch_ray.reliability.metacognition import metacognition


def observer(d_prime: float, noise: float, num: int = 100_000) -> tuple[np.ndarray, np.ndarray]:
    """P(CORRECT) of an equal-variance observer with criterion .2 whose confidences have further noise."""
    drawn = np.random.default_rng(0)
    right = drawn.random(num) < 0.6
    evidence = drawn.normal(np.where(right, d_prime / 2, -d_prime / 2)) - 0.2
    says = evidence >= 0
    noisy = evidence + drawn.normal(0, 1, num) * noise
    sure = np.where(says == (noisy >= 0), np.abs(noisy), 0.0)
    half = 0.5 * (1 - np.exp(-sure))
    return np.where(says, 0.5 + half, np.minimum(0.5 - half, 0.5 - 1e-9)), right


@pytest.mark.parametrize("d_prime", [0.7, 1.0, 2.0])
def test_an_ideal_observer_knows_what_it_knows(d_prime: float) -> None:
    found = metacognition(*observer(d_prime, 0.0))
    assert found is not None
    assert found.d_prime == pytest.approx(d_prime, abs=0.03)
    assert found.criterion == pytest.approx(0.2, abs=0.02)
    assert found.m_ratio == pytest.approx(1.0, abs=0.06)


def test_noise_in_the_confidences_leaves_the_verdicts_and_lowers_meta_d() -> None:
    clear, noisy = metacognition(*observer(1.5, 0.0)), metacognition(*observer(1.5, 1.0))
    assert clear is not None
    assert noisy is not None
    assert noisy.d_prime == clear.d_prime
    assert noisy.m_ratio is not None
    assert noisy.m_ratio < 0.75


def test_a_validator_at_chance_has_none_of_either() -> None:
    drawn = np.random.default_rng(1)
    found = metacognition(drawn.random(6000), drawn.random(6000) < 0.5)
    assert found is not None
    assert abs(found.d_prime) < 0.08
    assert abs(found.meta_d_prime) < 0.2
    assert found.m_ratio is None  # of a d' of 0.02, by which nothing can be divided


@pytest.mark.parametrize(
    ("probability", "correct"),
    [
        ([0.9, 0.8, 0.1, 0.2], [True] * 4),
        ([0.9, 0.8, 0.7, 0.6], [True, True, False, False]),  # one verdict only
        ([1.0, 1.0, 0.0, 0.0], [True, False, True, False]),  # one level of confidence
    ],
)
def test_nothing_is_made_up_where_it_cannot_be_told(probability: list[float], correct: list[bool]) -> None:
    assert metacognition(probability, correct) is None


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        metacognition([0.5], [True, False])
    with pytest.raises(ValueError, match="at least 2"):
        metacognition([0.5], [True], ratings=1)

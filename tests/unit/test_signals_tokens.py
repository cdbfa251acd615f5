"""Signals of an answer's own tokens, against LM-Polygraph's definitions written out (Fadeeva et al. 2023)."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch_ray.config.reliability import SIGNAL_NAMES
from stitch_ray.reliability.signals.registry import FROM_PROMPTS, FROM_SAMPLES, FROM_TOKENS, SIGN
from stitch_ray.reliability.signals.tokens import needed_statistics, token_signals

pytestmark = pytest.mark.numeric

LOGPROBS = st.lists(st.floats(-30, 0), min_size=1, max_size=20)


def maximum_sequence_probability(log_likelihoods):
    """Uncertainty of LM-Polygraph's MaximumSequenceProbability."""
    total = 0.0
    for one in log_likelihoods:
        total += one
    return -total


def log_perplexity(log_likelihoods):
    """Uncertainty of LM-Polygraph's Perplexity: the logarithm of what is called so elsewhere."""
    return maximum_sequence_probability(log_likelihoods) / len(log_likelihoods)


@settings(deadline=None)
@given(LOGPROBS)
def test_probability_and_perplexity_follow_lm_polygraph(logprobs):
    found = token_signals(logprobs, None, None)
    assert found["sequence_log_probability"] == pytest.approx(-maximum_sequence_probability(logprobs))
    assert math.log(found["perplexity"]) == pytest.approx(log_perplexity(logprobs), abs=1e-9)


def test_an_answer_computed_by_hand():
    """Two tokens from known distributions over three tokens."""
    distributions = np.array([[0.7, 0.2, 0.1], [0.25, 0.25, 0.5]])
    entropies = [-sum(p * math.log(p) for p in row) for row in distributions]
    found = token_signals([math.log(0.2), math.log(0.5)], entropies, [0.5, 0.25])
    assert found == pytest.approx(
        {
            "sequence_log_probability": math.log(0.1),
            "perplexity": math.sqrt(10),
            "mean_token_entropy": (0.801819 + 1.039721) / 2,
            "max_token_entropy": 1.039721,
            "mean_token_margin": 0.375,
        },
        abs=1e-5,
    )


def test_an_answer_without_tokens_is_unscored_and_not_the_surest():
    for empty in ((), [], None):
        assert all(math.isnan(value) for value in token_signals(empty, empty, empty).values())


def test_what_is_not_known_is_unscored_and_leaves_the_rest():
    found = token_signals([-1.0], None, [0.5])
    assert math.isnan(found["mean_token_entropy"])
    assert math.isnan(found["max_token_entropy"])
    assert found["mean_token_margin"] == 0.5


def test_an_impossible_token_makes_an_infinite_perplexity_and_raises_nothing():
    assert token_signals([-math.inf, 0.0], None, None)["perplexity"] == math.inf
    assert math.isfinite(token_signals([-2000.0], None, None)["perplexity"])


def test_every_signal_has_a_sign_and_a_family():
    assert set(SIGN) == set(SIGNAL_NAMES)
    assert FROM_TOKENS | FROM_SAMPLES | FROM_PROMPTS | {"answer_length"} == set(SIGNAL_NAMES)
    assert needed_statistics(SIGNAL_NAMES) == {"logprobs", "entropies", "margins"}
    assert needed_statistics(["perplexity", "p_true"]) == {"logprobs"}
    assert set(token_signals([-1.0], [1.0], [1.0])) == FROM_TOKENS

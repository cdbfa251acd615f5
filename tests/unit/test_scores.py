"""Scores against the golden numbers and against a literal, slow reading of the formulas."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch_ray.selection import scores

pytestmark = pytest.mark.numeric

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "selectit.json").read_text())
LOGITS = np.array(GOLDEN["rating_logits"])


@pytest.mark.parametrize("mode", ["paper", "repo"])
def test_all_three_levels_reproduce_the_golden_numbers(mode: scores.Mode) -> None:
    expected = GOLDEN["expected"][mode]
    sentence = scores.sentence_score(LOGITS, GOLDEN["alpha"], mode)
    np.testing.assert_allclose(scores.token_score(LOGITS, mode), expected["token"], atol=1e-6)
    np.testing.assert_allclose(sentence, expected["sentence"], atol=1e-6)
    by_size = scores.model_score(sentence, GOLDEN["parameters"])
    np.testing.assert_allclose(by_size, expected["model_by_parameters"], atol=1e-6)
    by_position = scores.weighted_model_score(sentence, scores.REPO_MODEL_WEIGHTS)
    np.testing.assert_allclose(by_position, expected["model_by_reference_weights"], atol=1e-6)


def test_figure_of_the_paper() -> None:
    """The method figure rates P' = (.05, .10, .50, .25, .10) with 1.13 and combines (1.59, 2.13, 1.89) to 1.90."""
    logits = np.log([[0.05, 0.10, 0.50, 0.25, 0.10]])
    assert scores.token_score(logits)[0] == pytest.approx(1.125)
    assert scores.model_score([1.59, 2.13, 1.89], [7, 13, 70]) == pytest.approx(1.90, abs=5e-3)


@given(st.lists(st.floats(-1e4, 1e4), min_size=5, max_size=5), st.floats(-1e3, 1e3))
def test_a_constant_added_to_the_logits_changes_nothing_and_nothing_underflows(row: list[float], shift: float) -> None:
    base = scores.token_score([row])
    assert np.isfinite(base).all()
    assert 0 <= base[0] <= 5
    assert scores.token_score([[z + shift for z in row]])[0] == pytest.approx(base[0], abs=1e-6)


def test_token_score_equals_the_sum_of_differences_of_equation_3() -> None:
    p = scores.rating_probabilities(LOGITS)
    best = p.argmax(-1)
    top = p.max(-1)
    slow = (best + 1) / 4 * np.abs(p - top[..., None]).sum(-1)
    np.testing.assert_allclose(scores.token_score(LOGITS), slow, atol=1e-12)


def test_lowest_rating_wins_ties() -> None:
    assert scores.token_score([[1.0, 1.0, 0.0]])[0] == pytest.approx(
        1 * np.subtract(*np.exp([1.0, 0.0])) / (2 * np.e + 1) / 2
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_not_finite_is_an_error_not_a_score(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        scores.token_score([[1.0, bad, 0.0]])


def test_repo_mode_is_refused_where_the_published_code_has_no_meaning() -> None:
    with pytest.raises(ValueError, match="3 and 5"):
        scores.token_score(LOGITS[0, 0, :3], "repo")


def test_weights_must_match_the_models() -> None:
    with pytest.raises(ValueError, match="2 weights for 3 models"):
        scores.model_score([1.0, 2.0, 3.0], [7, 13])
    with pytest.raises(ValueError, match="positive"):
        scores.model_score([1.0], [0])

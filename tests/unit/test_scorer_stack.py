"""Weighing encoder and signals, and the probability made of the result."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from stitch_ray.config.reliability import AnswerSplitConfig
from stitch_ray.errors import UserError
from stitch_ray.records import ANSWER_SCHEMA
from stitch_ray.reliability.metrics import auroc
from stitch_ray.reliability.scorer.logistic import ENCODER, LogisticStack, feature_matrix
from stitch_ray.reliability.scorer.stack import fit_isotonic, fit_scorer, fit_stack
from stitch_ray.reliability.tables import Answers

pytestmark = pytest.mark.numeric


def made_features(rows: int = 600, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(rows, 2): a logit that knows half of it, and a perplexity-like signal that knows the rest; and correct, (rows,)."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, rows))
    correct = rng.random(rows) < expit(1.5 * a - 1.2 * b + 0.3)
    return np.stack([2 * a + 1, np.exp(0.3 * b) * 4], 1), correct


def test_weights_are_those_of_a_penalised_fit_written_out_by_hand() -> None:
    features, correct = made_features(200)
    fitted = fit_stack(features, (ENCODER, "perplexity"), correct).stack
    z = (features - features.mean(0)) / features.std(0)

    def loss(weights: np.ndarray) -> float:
        logits = z @ weights[:2] + weights[2]
        return float(np.logaddexp(0, np.where(correct, -logits, logits)).sum() + weights[:2] @ weights[:2] / 2)

    expected = minimize(loss, np.zeros(3), tol=1e-12).x
    assert [*fitted.coef, fitted.intercept] == pytest.approx(expected, abs=1e-4)
    assert fitted.apply(features) == pytest.approx(z @ expected[:2] + expected[2], abs=1e-3)


def test_the_stack_ranks_better_than_its_parts_and_orients_them() -> None:
    features, correct = made_features()
    unseen, truth = made_features(seed=1)
    fitted = fit_stack(features, (ENCODER, "perplexity"), correct).stack
    wrong = 1.0 - truth
    assert auroc(fitted.apply(unseen), wrong) > max(auroc(unseen[:, 0], wrong), auroc(-unseen[:, 1], wrong)) + 0.03
    assert fitted.coef[0] > 0 > fitted.coef[1]


def test_the_encoder_alone_is_left_as_it_is() -> None:
    logits = np.array([-3.0, np.nan, 0.25, np.inf])
    fitted = fit_stack(logits[:, None], (ENCODER,), np.zeros(4, bool))
    assert fitted.stack.apply(logits[:, None]).tolist()[::2] == [-3.0, 0.25]
    assert np.isnan(fitted.stack.apply(logits[:, None])[1::2]).all()


def test_rows_without_a_signal_are_left_out_and_counted() -> None:
    features, correct = made_features(300)
    holes = features.copy()
    holes[::10, 1] = np.nan
    holes[5, 0] = np.inf
    fitted = fit_stack(holes, (ENCODER, "perplexity"), correct)
    kept = np.isfinite(holes).all(1)
    assert fitted.stack == fit_stack(features[kept], (ENCODER, "perplexity"), correct[kept]).stack
    assert fitted.answers == kept.sum()
    assert fitted.notes == ("31 of 300 answers of the stack split lack encoder, perplexity",)
    assert np.isnan(fitted.stack.apply(holes)).tolist() == (~kept).tolist()


def test_a_constant_signal_weighs_nothing_and_is_not_needed() -> None:
    features, correct = made_features()
    with_constant = np.insert(features, 1, 0.1 + 0.2, axis=1)
    fitted = fit_stack(with_constant, (ENCODER, "p_true", "perplexity"), correct)
    assert fitted.stack.coef[1] == 0
    assert "p_true is the same" in fitted.notes[0]
    assert fitted.stack.needed == {ENCODER, "perplexity"}
    with_constant[:, 1] = np.nan
    alone = fit_stack(features, (ENCODER, "perplexity"), correct).stack
    assert fitted.stack.apply(with_constant) == pytest.approx(alone.apply(features), abs=1e-12)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda features, _correct: features.__setitem__((slice(None), 1), np.nan), "perplexity is missing from every"),
        (lambda features, _correct: features.__setitem__(slice(None), 3.0), "are the same for every"),
        (
            lambda _features, correct: correct.__setitem__(slice(None), True),
            "split stack: 50 usable answers, 50 right and 0",
        ),
        (lambda features, _correct: features.__setitem__((slice(0, 25), 1), np.nan), None),
    ],
)
def test_what_no_stack_can_be_made_of_is_refused(change: Any, complaint: str | None) -> None:
    features, correct = made_features(50)
    change(features, correct)
    if complaint is None:
        correct[25:] = False
        complaint = "25 usable answers, 0 right and 25 wrong, and 25 lack a score"
    with pytest.raises(UserError, match=complaint):
        fit_stack(features, (ENCODER, "perplexity"), correct)


def test_the_numbers_repeat_bit_by_bit() -> None:
    features, correct = made_features()
    assert fit_stack(features, ("a", "b"), correct, seed=1) == fit_stack(features.copy(), ("a", "b"), correct, seed=1)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3)), min_size=1, max_size=20), st.data())
def test_a_rows_score_is_the_same_alone_and_among_others(rows: list[tuple[float, float]], data: st.DataObject) -> None:
    stack = LogisticStack(("a", "b"), (0.1, -3.0), (1.7, 0.3), (0.7, -1.3), 0.2)
    features = np.array(rows)
    row = data.draw(st.integers(0, len(rows) - 1))
    assert stack.apply(features)[row] == stack.apply(features[row : row + 1])[0]


def test_features_that_are_not_there_are_columns_of_nan() -> None:
    found = feature_matrix((ENCODER, "p_true", "perplexity"), 2, None, {"perplexity": np.array([1.0, 2.0])})
    assert np.isnan(found[:, :2]).all()
    assert found[:, 2].tolist() == [1.0, 2.0]


def test_isotonic_is_monotone_leaves_out_unscored_rows_and_wants_both_classes() -> None:
    rng = np.random.default_rng(0)
    log_odds = rng.normal(size=400)
    correct = rng.random(400) < expit(2 * log_odds)
    log_odds[::7] = np.nan
    found = fit_isotonic(log_odds, correct)
    assert found == fit_isotonic(log_odds[np.isfinite(log_odds)], correct[np.isfinite(log_odds)])
    assert (np.diff(found.apply(np.linspace(-3, 3, 100))) >= 0).all()
    with pytest.raises(
        UserError, match=r"split isotonic: 342 usable answers, 0 right and 342 wrong, and 58 lack a score"
    ):
        fit_isotonic(log_odds, np.zeros(400, bool))


def made_answers(rows: int = 900, **signals: np.ndarray) -> Answers:
    _, correct = made_features(rows)
    table = [
        {
            "answer_id": f"a{row}",
            "group_id": f"g{row}",
            "split": ("stack", "isotonic", "calibrate")[row % 3],
            "question": "who?",
            "answer": "Bach",
            "correct": bool(correct[row]),
            "label": float(correct[row]),
        }
        for row in range(rows)
    ]
    split = AnswerSplitConfig()
    return Answers(pa.Table.from_pylist(table, ANSWER_SCHEMA), signals, split, "model-1", rows, (), {"max_tokens": 4})


FIT: dict[str, Any] = {"loss": "bce", "max_length": None}


def test_each_step_is_fitted_on_its_own_split(tmp_path: Any) -> None:
    features, correct = made_features(900)
    answers = made_answers(perplexity=features[:, 1])
    found = fit_scorer(tmp_path, answers, None, signals=("perplexity",), **FIT)
    stack = fit_stack(features[::3, 1:], ("perplexity",), correct[::3])
    assert found.stack == stack.stack
    assert found.isotonic == fit_isotonic(stack.stack.apply(features[1::3, 1:]), correct[1::3])
    assert (found.num_stack, found.num_isotonic, found.loss) == (300, 300, None)
    assert (found.answers_from, found.answering) == ("model-1", {"max_tokens": 4})
    scores = found.combine(None, answers.signals, 900)
    assert np.isnan(scores.encoder).all()
    assert scores.confidence.mean() == pytest.approx(correct.mean(), abs=0.05)


def test_a_signal_that_no_answer_has_is_refused(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="p_true is in none of the answers"):
        fit_scorer(tmp_path, made_answers(), None, signals=("p_true",), **FIT)

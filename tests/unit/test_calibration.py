"""Thresholds: what is promised with how many labels, equality with slow and independent readings, and odd input."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from stitch_ray.reliability.calibration import (
    UNIFORM_GRID,
    Threshold,
    learn_then_test,
    learn_then_test_policies,
    minimal_accepted,
    p_values,
    promising_start,
    quantile_grid,
    sgr,
    share_interval,
    upper_bound,
)
from stitch_ray.reliability.probability import Isotonic, Platt

pytestmark = pytest.mark.numeric

RNG = np.random.default_rng


def draw(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences that are the true probabilities of being right, and errors."""
    rng = RNG(seed)
    p = rng.beta(1.2, 0.5, n)
    return p, (rng.random(n) > p).astype(float)


@pytest.mark.parametrize(
    ("risk", "delta", "needed"),
    [
        (0.05, 0.1, 45), (0.05, 0.05, 59), (0.05, 0.01, 90),
        (0.02, 0.1, 114), (0.02, 0.05, 149), (0.02, 0.01, 228),
        (0.01, 0.1, 230), (0.01, 0.05, 299), (0.01, 0.01, 459),
        (0.10, 0.1, 22), (0.10, 0.05, 29), (0.10, 0.01, 44),
    ],
)  # fmt: skip
def test_fewest_labels_that_can_show_anything(risk: float, delta: float, needed: int) -> None:
    """ceil(ln delta / ln(1 - r)): that many without an error pass, one fewer does not, whichever test."""
    assert minimal_accepted(risk, delta) == needed
    for count, value in ((needed, 1.0), (needed - 1, None)):
        found = learn_then_test(np.ones(count), np.zeros(count), risk, delta, grid=[1.0])
        assert found.value == value
        assert (p_values(count, 0, risk, "hoeffding_bentkus") <= delta) == (value is not None)


def test_too_few_answers_abstain_on_everything_and_say_how_many_are_needed() -> None:
    found = learn_then_test(np.full(10, 0.9), np.zeros(10), 0.1, 0.1)
    assert found == Threshold(None, 0.1, 0.1, 10, 0, None, 0.0, None, "learn_then_test", found.reason)
    assert found.reason == "needs at least 22 accepted calibration answers without an error; there are 10"
    assert "at least" in str(sgr(np.full(10, 0.9), np.zeros(10), 0.1, 0.1).reason)


def test_answers_that_are_all_wrong_abstain_and_say_why() -> None:
    found = learn_then_test(np.linspace(0, 1, 300), np.ones(300), 0.1, 0.1)
    assert (found.value, found.num_accepted, found.coverage) == (None, 0, 0.0)
    assert "no evidence" in str(found.reason)


def test_answers_that_are_all_right_are_all_given() -> None:
    assert learn_then_test(np.linspace(0, 1, 300), np.zeros(300), 0.1, 0.1).coverage == 1.0
    assert sgr(np.linspace(0, 1, 300), np.zeros(300), 0.1, 0.1).coverage > 0.9


def test_ties_are_accepted_together_or_not_at_all() -> None:
    """Half of the equally confident answers are wrong: no threshold may give only the right ones."""
    confidence = np.r_[np.full(100, 0.9), np.full(100, 0.5)]
    errors = np.r_[np.zeros(100), np.tile([0, 1], 50)]
    assert learn_then_test(confidence, errors, 0.1, 0.1).num_accepted == 100
    assert learn_then_test(confidence, errors, 0.1, 0.1, grid=[0.9]).num_accepted == 100  # accepted: >=, not >
    assert learn_then_test(np.full(200, 0.5), errors, 0.1, 0.1).value is None


def test_unscored_answers_are_never_accepted_and_stay_in_the_coverage() -> None:
    confidence, errors = draw(400)
    base = learn_then_test(confidence, errors, 0.1, 0.1)
    more = learn_then_test(np.r_[confidence, np.full(100, np.nan)], np.r_[errors, np.zeros(100)], 0.1, 0.1)
    assert (more.value, more.num_accepted, more.num_calibration) == (base.value, base.num_accepted, 500)
    assert more.coverage == pytest.approx(base.coverage * 0.8)
    nothing = learn_then_test(np.full(100, np.nan), np.zeros(100), 0.1, 0.1)
    assert (nothing.value, nothing.reason) == (
        None,
        "needs at least 22 accepted calibration answers without an error; there are 0",
    )
    assert sgr(np.full(100, np.nan), np.zeros(100), 0.1, 0.1).value is None
    assert sgr(np.r_[confidence, np.nan], np.r_[errors, 0], 0.1, 0.1).num_calibration == 401


def test_fixed_sequence_stops_at_the_first_failure_even_if_a_later_threshold_would_pass() -> None:
    accepted = np.zeros((3, 400), bool)
    accepted[0, :50] = accepted[1, :100] = True
    accepted[2] = True
    losses = np.zeros((3, 400))
    losses[1:, 50:80] = 1
    assert (p_values(accepted.sum(1), (accepted * losses).sum(1), 0.1, "binomial") <= 0.1).tolist() == [
        True,
        False,
        True,
    ]
    assert learn_then_test_policies(accepted, losses, 0.1, 0.1).policy == 0


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.1, 0.2]), st.sampled_from([0.05, 0.1]), st.booleans())
def test_thresholds_equal_a_slow_reading_of_the_procedure_and_the_case_of_policies(
    seed: int, risk: float, delta: float, bounded: bool
) -> None:
    rng = RNG(seed)
    n = int(rng.integers(1, 200))
    confidence = np.round(rng.beta(2, 1, n), 2)
    confidence[rng.random(n) < 0.05] = np.nan
    errors = (rng.random(n) > np.nan_to_num(confidence) ** 0.3).astype(float) * (rng.random(n) if bounded else 1)
    test = "hoeffding_bentkus" if bounded else "binomial"
    grid = np.unique(np.round(rng.random(20), 2))
    slow = None
    for threshold in sorted(grid, reverse=True):
        given = confidence >= threshold
        k, total = int(given.sum()), errors[given].sum()
        if k < math.log(delta) / math.log(1 - risk):
            continue
        if bounded:
            m = min(total / k, risk)
            entropy = (m * math.log(m / risk) if m else 0) + (1 - m) * math.log((1 - m) / (1 - risk))
            p = min(math.exp(-k * entropy), math.e * binom.cdf(math.ceil(total - 1e-9), k, risk))
        else:
            p = binom.cdf(total, k, risk)
        if p > delta:
            break
        slow = threshold
    found = learn_then_test(confidence, errors, risk, delta, grid=grid, test=test)
    assert found.value == slow
    thresholds = sorted(grid, reverse=True)
    accepted = np.array([confidence >= t for t in thresholds])
    choice = learn_then_test_policies(accepted, np.tile(errors, (len(grid), 1)), risk, delta, test=test)
    assert (None if choice.policy is None else thresholds[choice.policy]) == found.value
    assert (choice.coverage, choice.reason) == (found.coverage, found.reason)


def test_order_of_rows_and_of_the_grid_do_not_matter() -> None:
    confidence, errors = draw(500)
    order = RNG(1).permutation(500)
    a = learn_then_test(confidence, errors, 0.1, 0.1, grid=UNIFORM_GRID)
    assert learn_then_test(confidence[order], errors[order], 0.1, 0.1, grid=UNIFORM_GRID[::-1]) == a
    assert sgr(confidence[order], errors[order], 0.1, 0.1) == sgr(confidence, errors, 0.1, 0.1)


def test_a_promise_that_asks_less_gives_more() -> None:
    confidence, errors = draw(1000)
    coverage = [learn_then_test(confidence, errors, risk, 0.1).coverage for risk in (0.05, 0.1, 0.2, 0.3)]
    assert coverage == sorted(coverage)
    surer = [learn_then_test(confidence, errors, 0.1, delta).coverage for delta in (0.001, 0.01, 0.1, 0.5)]
    assert surer == sorted(surer)


def test_quantiles_of_another_split_as_grid() -> None:
    grid = quantile_grid([0.1, 0.2, 0.3, np.nan, 0.4], 4)
    assert grid.tolist() == [0.4, 0.3, 0.2, 0.1]
    assert quantile_grid([0.5, 0.5, 0.5], 10).tolist() == [0.5]
    confidence, errors = draw(1000)
    logits = np.log(confidence / (1 - confidence))
    other, _ = draw(500, seed=9)
    found = learn_then_test(logits, errors, 0.1, 0.1, grid=quantile_grid(np.log(other / (1 - other)), 100))
    assert found.coverage > 0.4
    with pytest.raises(ValueError, match=r"quantile_grid"):
        learn_then_test(logits, errors, 0.1, 0.1)
    with pytest.raises(ValueError, match="NaN"):
        quantile_grid([np.nan], 4)


def test_testing_can_begin_where_another_split_promises_most() -> None:
    thresholds = np.array([0.9, 0.6, 0.3])
    confidence = np.r_[np.full(25, 0.95), np.full(200, 0.7), np.full(200, 0.4)]
    errors = np.r_[1, np.zeros(224), np.ones(150), np.zeros(50)]
    accepted = confidence >= thresholds[:, None]
    losses = np.tile(errors, (3, 1))
    assert promising_start(accepted, losses, 425, 0.1) == 1
    assert promising_start(accepted, np.ones_like(losses), 425, 0.1) is None
    assert learn_then_test(confidence, errors, 0.1, 0.1, grid=thresholds).value is None  # one error of 25: the end
    assert learn_then_test(confidence, errors, 0.1, 0.1, grid=thresholds, start=0.6).value == 0.6
    with pytest.raises(ValueError, match="at or below"):
        learn_then_test(confidence, errors, 0.1, 0.1, grid=thresholds, start=0.1)
    with pytest.raises(ValueError, match="policies"):
        promising_start([True], [0.0], 10, 0.1)


def test_thresholds_agree_with_mapie() -> None:
    """MAPIE 1.6.0, fixed sequence, on a grid without the thresholds that accept too few: it would stop there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mapie.risk_control import BinaryClassificationController, precision
    for seed in range(3):
        confidence, errors = draw(1000, seed)
        grid = np.array([t for t in UNIFORM_GRID if (confidence >= t).sum() >= 22])
        controller = BinaryClassificationController(
            predict_function=lambda x: np.c_[1 - x[:, 0], x[:, 0]],
            risk=precision,
            target_level=0.9,
            confidence_level=0.9,
            fwer_method="fixed_sequence",
            list_predict_params=grid[::-1],
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            controller.calibrate(confidence[:, None], 1 - errors.astype(int))
        theirs = float(np.min(controller.valid_predict_params))
        exact = learn_then_test(confidence, errors, 0.1, 0.1)
        assert exact.value == pytest.approx(theirs)
        bounded = learn_then_test(confidence, errors, 0.1, 0.1, test="hoeffding_bentkus")
        assert 0 < bounded.coverage <= exact.coverage


def test_intervals_of_a_share() -> None:
    """Clopper and Pearson: 0 of 22 has the upper bound .1 at delta .1 (.9994), and the two-sided figures of 10 of 100."""
    assert upper_bound(0, 22, 0.1) < 0.1 < upper_bound(0, 21, 0.1)
    assert upper_bound(5, 5, 0.1) == 1.0
    assert share_interval(10, 100) == pytest.approx((0.0490, 0.1762), abs=1e-4)
    assert share_interval(0, 10)[0] == 0.0
    assert all(math.isnan(bound) for bound in share_interval(0, 0))


@pytest.mark.parametrize(
    ("confidence", "errors", "message"),
    [
        ([0.5], [2.0], r"\[0, 1\]"),
        ([0.5], [np.nan], r"\[0, 1\]"),
        ([0.5, 0.1], [0.0], "as many"),
        ([], [], "at least one"),
        ([np.inf], [0.0], "infinite"),
    ],
)
def test_input_that_means_nothing_is_an_error(confidence: list[float], errors: list[float], message: str) -> None:
    for method in (learn_then_test, sgr):
        with pytest.raises(ValueError, match=message):
            method(confidence, errors, 0.1, 0.1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        learn_then_test([0.5], [0.0], 0.0, 0.1)
    with pytest.raises(ValueError, match="0 or 1"):
        sgr([0.5], [0.5], 0.1, 0.1)


@given(st.integers(0, 2**32 - 1))
def test_maps_to_probabilities_are_monotone_survive_json_and_equal_scikit_learn(seed: int) -> None:
    from sklearn.isotonic import IsotonicRegression

    rng = RNG(seed)
    n = int(rng.integers(1, 60))
    score = np.round(rng.normal(size=n), 1)
    correct = (rng.random(n) < 1 / (1 + np.exp(-score))).astype(float)
    probe = np.sort(rng.normal(size=50) * 3)
    isotonic = Isotonic.fit(score, correct)
    expected = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(score, correct).predict(probe)
    np.testing.assert_allclose(isotonic.apply(probe), expected, atol=1e-12)
    for fitted, kind in ((isotonic, Isotonic), (Platt.fit(score, correct), Platt)):
        values = fitted.apply(probe)
        assert (np.diff(values) >= -1e-12).all()
        assert ((values >= 0) & (values <= 1)).all()
        assert kind.from_dict(fitted.to_dict()) == fitted
        assert np.isnan(fitted.apply([np.nan]))[0]


def test_one_class_or_one_score_gives_a_constant_that_says_so() -> None:
    for kind in (Isotonic, Platt):
        assert kind.fit([1.0, 1.0, 1.0], [0, 1, 1]).is_constant
        np.testing.assert_allclose(Isotonic.fit([1.0, 1.0, 1.0], [0, 1, 1]).apply([0, 5]), 2 / 3)
        assert np.isfinite(kind.fit([0.0, 1.0], [0, 1]).apply([-9.0, 9.0])).all()
    assert Isotonic.fit([0.1, 0.5, 0.9], [1, 1, 1]).is_constant
    assert not Isotonic.fit([0.1, 0.9], [0, 1]).is_constant
    assert Platt.fit([0.9, 0.1], [0, 1]).slope == pytest.approx(
        0
    )  # a score that points the wrong way is not turned round


def test_platt_agrees_with_scikit_learn() -> None:
    """scikit-learn's sigmoid calibration smooths labels in the same way (Platt 1999)."""
    from sklearn.calibration import _SigmoidCalibration

    confidence, errors = draw(300)
    ours, theirs = Platt.fit(confidence, 1 - errors), _SigmoidCalibration().fit(confidence, 1 - errors)
    assert (ours.slope, ours.intercept) == pytest.approx((-theirs.a_, -theirs.b_), rel=1e-3)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"x": [1, 0], "y": [0, 1]}, "must increase"),
        ({"x": [0, 1], "y": [1, 0]}, "must not fall"),
        ({"x": [0], "y": [0, 1]}, "1 scores and 2 probabilities"),
        ({"x": [], "y": []}, "and some"),
        ({"x": [0], "y": [2]}, r"isotonic\.y must lie in \[0, 1\]"),
        ({"x": ["a"], "y": [0]}, "x must be a list of numbers"),
        ({"x": [0, 1]}, "y must be a list of numbers"),
    ],
)
def test_numbers_that_are_no_monotone_map_are_refused(values: dict[str, list[float]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Isotonic.from_dict(values)


def test_a_falling_map_and_unscored_answers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"platt\.slope must not be negative"):
        Platt.from_dict({"slope": -1, "intercept": 0})
    with pytest.raises(ValueError, match="must be finite"):
        Isotonic.fit([np.nan], [1])

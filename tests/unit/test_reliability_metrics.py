"""Metrics against golden vectors, other libraries, slow readings of the definitions, and what must never change them."""

import json
import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mapie.metrics.calibration import expected_calibration_error
from mapie.metrics.uncertainty import auarc
from numpy.typing import NDArray
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    log_loss,
    roc_auc_score,
)

from stitch_ray.reliability import metrics

pytestmark = pytest.mark.numeric

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "metrics.json").read_text())
Floats = NDArray[np.float64]

RANKING: dict[str, Callable[[Floats, Floats], float]] = {
    "aurc": metrics.aurc,
    "e_aurc": metrics.e_aurc,
    "augrc": metrics.augrc,
    "auacc": metrics.auacc,
    "prr": metrics.prr,
    "prr_50": lambda c, r: metrics.prr(c, r, max_rejection=0.5),
    "risk_at_coverage": lambda c, r: metrics.risk_at_coverage(c, r, 0.4),
    "coverage_at_risk": lambda c, r: metrics.coverage_at_risk(c, r, 0.3)[0],
}
BINARY_RANKING = {**RANKING, "auroc": metrics.auroc, "aupr_error": metrics.aupr_error}

quick = settings(deadline=None, max_examples=40)

# Few levels, so that ties are common.
_pairs = st.lists(st.tuples(st.integers(-3, 3), st.integers(0, 4)), min_size=1, max_size=25)
soft = _pairs.map(lambda rows: (np.array([c for c, _ in rows], float), np.array([r / 4 for _, r in rows])))
hard = _pairs.map(lambda rows: (np.array([c for c, _ in rows], float), np.array([float(r > 2) for _, r in rows])))


def _expected(value: float | None) -> object:
    return pytest.approx(math.nan if value is None else value, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("vector", GOLDEN["vectors"], ids=lambda v: f"{v['confidence']}-{v['residual']}")
def test_golden_vectors(vector: dict) -> None:
    c, r = vector["confidence"], vector["residual"]
    for name in ("aurc", "e_aurc", "augrc", "auacc", "prr"):
        assert RANKING[name](c, r) == _expected(vector[name]), name
    assert metrics.aurc(-np.array(r), r) == _expected(vector["aurc_oracle"])
    assert metrics.risk_at_coverage(c, r, 0.5) == _expected(vector["risk_at_coverage_0.5"])
    coverage, threshold = metrics.coverage_at_risk(c, r, 0.2)
    assert coverage == _expected(vector["coverage_at_risk_0.2"])
    expected = vector["threshold_at_risk_0.2"]
    assert threshold == (math.inf if expected is None else expected)


def test_auacc_is_not_the_one_of_stitch_which_changes_with_the_scale_of_the_scores() -> None:
    golden = GOLDEN["stitch"]
    c, r = np.array(golden["scores"]), 1 - np.array(golden["em"])
    assert metrics.auroc(c, r) == pytest.approx(golden["auroc"], abs=1e-12)
    assert metrics.aurc(c, r) == pytest.approx(golden["aurc_mean"], abs=1e-12)
    curve = metrics.risk_coverage_curve(c, r)
    np.testing.assert_allclose(1 - curve.risk, golden["accuracy_at_coverage"], atol=1e-12)
    np.testing.assert_allclose(curve.coverage, np.arange(1, 11) / 10)
    assert metrics.coverage_at_risk(c, r, 1 - 0.8) == (golden["coverage_at_acc_0.8"], 0.5)
    assert metrics.auacc(c, r) == metrics.auacc(c / 2, r) == pytest.approx(1 - golden["aurc_mean"])
    assert golden["reference_auacc"] != golden["reference_auacc_scores_halved"]


@quick
@given(hard, st.randoms(use_true_random=False))
def test_no_metric_depends_on_the_order_of_the_rows(data: tuple[Floats, Floats], random: object) -> None:
    c, r = data
    order = np.array(random.sample(range(len(c)), len(c)))  # type: ignore[attr-defined]
    for name, metric in BINARY_RANKING.items():
        assert metric(c[order], r[order]) == pytest.approx(metric(c, r), abs=1e-12, nan_ok=True), name


@quick
@given(soft)
def test_a_strictly_monotone_transform_of_the_confidence_changes_no_ranking_metric(data: tuple[Floats, Floats]) -> None:
    c, r = data
    for name, metric in RANKING.items():
        assert metric(np.exp(3 * c) - 7, r) == pytest.approx(metric(c, r), abs=1e-12, nan_ok=True), name


@quick
@given(hard)
def test_augrc_follows_from_auroc_and_accuracy(data: tuple[Floats, Floats]) -> None:
    """Traub et al. 2024, with ties."""
    c, r = data
    auroc, error = metrics.auroc(c, r), r.mean()
    assume(not math.isnan(auroc))
    assert metrics.augrc(c, r) == pytest.approx((1 - auroc) * error * (1 - error) + error**2 / 2, abs=1e-12)


@quick
@given(soft)
def test_identities_and_bounds(data: tuple[Floats, Floats]) -> None:
    c, r = data
    aurc, oracle = metrics.aurc(c, r), metrics.aurc(-r, r)
    assert metrics.auacc(c, r) + aurc == pytest.approx(1)
    assert metrics.e_aurc(c, r) >= -1e-12
    assert metrics.e_aurc(-r, r) == 0
    if len(set(r)) > 1:
        assert metrics.prr(c, r) == pytest.approx((r.mean() - aurc) / (r.mean() - oracle))
        assert metrics.prr(c, r) <= 1 + 1e-12
    else:
        assert math.isnan(metrics.prr(c, r))
    assert metrics.risk_at_coverage(c, r, 1) == pytest.approx(r.mean())
    assert metrics.aurc(np.zeros(len(r)), r) == pytest.approx(r.mean())


@settings(deadline=None, max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2)), min_size=2, max_size=5))
def test_ties_stand_for_the_mean_over_random_orders(rows: list[tuple[int, int]]) -> None:
    c, r = np.array([c for c, _ in rows], float), np.array([r / 2 for _, r in rows])
    orders = [np.array(order) for order in permutations(range(len(c)))]
    orders = [order for order in orders if (np.diff(c[order]) <= 0).all()]
    strict = -np.arange(len(c), dtype=float)
    for name in ("aurc", "e_aurc", "augrc", "auacc", "prr", "prr_50", "risk_at_coverage"):
        over_orders = np.mean([RANKING[name](strict, r[order]) for order in orders])
        assert RANKING[name](c, r) == pytest.approx(over_orders, abs=1e-12, nan_ok=True), name


@quick
@given(hard)
def test_agreement_with_scikit_learn(data: tuple[Floats, Floats]) -> None:
    c, r = data
    if 0 < r.mean() < 1:
        assert metrics.auroc(c, r) == pytest.approx(roc_auc_score(1 - r, c), abs=1e-12)
    else:
        assert math.isnan(metrics.auroc(c, r))
    if r.any():
        assert metrics.aupr_error(c, r) == pytest.approx(average_precision_score(r, -c), abs=1e-12)
    else:
        assert math.isnan(metrics.aupr_error(c, r))


@quick
@given(hard)
def test_probability_metrics_agree_with_scikit_learn_and_mapie(data: tuple[Floats, Floats]) -> None:
    c, r = data
    p, correct = 1 / (1 + np.exp(-c)), 1 - r
    assert metrics.brier(p, correct) == pytest.approx(brier_score_loss(correct, p, labels=[0, 1], pos_label=1))
    assert metrics.nll(p, correct) == pytest.approx(log_loss(correct, p, labels=[0, 1]))
    # MAPIE counts edges where others count bins.
    assert metrics.ece(p, correct) == pytest.approx(expected_calibration_error(correct, p, num_bins=16), abs=1e-12)
    assert metrics.accuracy(p, correct) == pytest.approx(accuracy_score(correct, p >= 0.5))
    if 0 < r.mean() < 1:
        assert metrics.balanced_accuracy(p, correct) == pytest.approx(balanced_accuracy_score(correct, p >= 0.5))
    else:
        assert math.isnan(metrics.balanced_accuracy(p, correct))


def test_auacc_is_the_accuracy_rejection_area_of_mapie_where_nothing_ties() -> None:
    generator = np.random.default_rng(0)
    c, r = generator.normal(size=500), (generator.random(500) < 0.3).astype(float)
    assert metrics.auacc(c, r) == pytest.approx(auarc(1 - r, c), abs=1e-12)


def test_ece_by_hand() -> None:
    p, correct = [0.0, 0.1, 0.5, 0.6, 1.0], [0, 1, 0, 1, 1]
    # Bins (0, .5] with 0 and (.5, 1]: |(0 + .1 + .5) - 1| + |(.6 + 1) - 2|, over 5.
    assert metrics.ece(p, correct, bins=2) == pytest.approx(0.8 / 5)
    # Of equal mass: 0, .1, .5 against .6, 1, which here is the same.
    assert metrics.equal_mass_ece(p, correct, bins=2) == pytest.approx(0.8 / 5)


def test_bins_of_equal_mass_hold_about_as_many_answers_each() -> None:
    generator = np.random.default_rng(0)
    p, correct = generator.random(50), generator.integers(0, 2, size=50)
    bins = np.array_split(np.argsort(p), 7)
    expected = sum(abs((p[rows] - correct[rows]).sum()) for rows in bins) / 50
    assert metrics.equal_mass_ece(p, correct, bins=7) == pytest.approx(expected)


def test_equal_probabilities_share_a_bin_of_equal_mass() -> None:
    p, correct = np.full(6, 0.5), np.array([0, 0, 0, 1, 1, 1])
    assert metrics.equal_mass_ece(p, correct, bins=3) == metrics.equal_mass_ece(p, correct[::-1], bins=3) == 0


def test_nll_of_a_certain_mistake_is_finite() -> None:
    assert metrics.nll([1.0], [0]) == pytest.approx(-math.log(1e-6))


def test_coverage_at_risk_looks_past_stricter_thresholds_that_fail() -> None:
    assert metrics.coverage_at_risk([5, 4, 3, 2, 1], [1, 0, 0, 0, 1], 0.25) == (0.8, 2.0)


def test_a_risk_that_is_met_exactly_counts_in_spite_of_rounding() -> None:
    assert (0.1 + 0.2 + 0) / 3 > 0.1
    assert metrics.coverage_at_risk([3, 2, 1], [0.1, 0.2, 0], 0.1) == (1.0, 1.0)


def test_curve_has_one_point_a_distinct_confidence_strictest_first() -> None:
    curve = metrics.risk_coverage_curve([0.2, 0.9, 0.2, 0.5], [1, 0, 0, 1])
    np.testing.assert_allclose(curve.threshold, [0.9, 0.5, 0.2])
    np.testing.assert_allclose(curve.coverage, [0.25, 0.5, 1])
    np.testing.assert_allclose(curve.risk, [0, 0.5, 0.5])
    np.testing.assert_allclose(curve.generalized_risk, [0, 0.25, 0.5])


def test_rejection_ratio_up_to_half_looks_only_at_the_kept_half() -> None:
    c, r = np.arange(8.0, 0, -1), np.array([1, 0, 0, 0, 0, 0, 0, 1.0])
    kept = [1 - r[:k].mean() for k in (5, 6, 7, 8)]
    best = [1 - np.sort(r)[:k].mean() for k in (5, 6, 7, 8)]
    mean = 1 - r.mean()
    assert metrics.prr(c, r, max_rejection=0.5) == pytest.approx((np.mean(kept) - mean) / (np.mean(best) - mean))


@pytest.mark.parametrize("metric", list(BINARY_RANKING.values()), ids=list(BINARY_RANKING))
@pytest.mark.parametrize(
    ("confidence", "residual", "message"),
    [
        ([0.1, math.nan], [0, 1], "confidence is nan at 1"),
        ([math.inf, 0.1], [0, 1], "confidence is inf at 0"),
        ([-math.inf, 0.1], [0, 1], "confidence is -inf at 0"),
        ([0.1, 0.2], [0, math.nan], "residual is nan at 1"),
        ([0.1, 0.2], [math.inf, 0], "residual is inf at 0"),
        ([0.1, 0.2], [0, 2], "residual is 2.0 at 1"),
        ([0.1, 0.2], [-1, 0], "residual is -1.0 at 0"),
        ([0.1, 0.2], [0], "confidence has 2 values and residual 1"),
        ([], [], "confidence must be a row of at least one"),
        ([[0.1]], [[0]], "confidence must be a row"),
    ],
)
def test_bad_input_is_an_error_that_names_it(
    metric: Callable[..., float], confidence: list, residual: list, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        metric(confidence, residual)


@pytest.mark.parametrize("metric", [metrics.ece, metrics.equal_mass_ece, metrics.brier, metrics.nll, metrics.accuracy])
def test_a_probability_outside_0_to_1_is_an_error(metric: Callable[..., float]) -> None:
    with pytest.raises(ValueError, match=r"probability is 1.5 at 1; it must lie in \[0, 1\]"):
        metric([0.5, 1.5], [0, 1])
    with pytest.raises(ValueError, match="probability is nan at 0"):
        metric([math.nan, 0.5], [0, 1])


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.aupr_error])
def test_what_needs_right_and_wrong_refuses_degrees(metric: Callable[..., float]) -> None:
    with pytest.raises(ValueError, match=r"residual is 0.5 at 1; this metric needs 0 or 1"):
        metric([0.1, 0.2], [0, 0.5])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.prr([1, 2], [0, 1], max_rejection=0), "max_rejection"),
        (lambda: metrics.risk_at_coverage([1, 2], [0, 1], 1.1), "coverage"),
        (lambda: metrics.ece([0.1], [0], bins=0), "bins"),
        (lambda: metrics.equal_mass_ece([0.1], [0], bins=0), "bins"),
    ],
)
def test_options_out_of_range_are_errors(call: Callable[[], float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_extreme_confidences_neither_overflow_nor_warn() -> None:
    with np.errstate(all="raise"):
        assert metrics.auroc([1.7e308, -1.7e308], [0, 1]) == 1
        assert metrics.auroc([0.0, -0.0], [0, 1]) == 0.5  # a tie

"""Scores side by side: what is measured on which answers, how wide the intervals are, and what is said about it."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stitch_ray.reliability import bootstrap as bootstrapping
from stitch_ray.reliability import metrics
from stitch_ray.reliability.bootstrap import Ranking, percentile_interval, probability_metrics, ranking_metrics
from stitch_ray.reliability.evaluation import Evaluation, Interval, evaluate, paired_difference

Floats = NDArray[np.float64]
OF_ALL = ["auroc", "aurc", "e_aurc", "augrc", "auacc", "prr", "prr_50"]
OF_PROBABILITIES = ["brier", "ece", "accuracy", "balanced_accuracy"]


def answers(count: int = 200, seed: int = 0, signal: float = 1.0) -> tuple[Floats, Floats]:
    """Confidences in (0, 1) that know something of the residuals, a third of which are 1."""
    generator = np.random.default_rng(seed)
    residual = (generator.random(count) < 1 / 3).astype(float)
    return 1 / (1 + np.exp(signal * (residual - 0.5) - generator.normal(size=count))), residual


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=15).filter(
        lambda rows: any(count for *_, count in rows)
    ),
    st.booleans(),
)
def test_metrics_of_a_resample_are_those_of_the_repeated_answers(rows: list[tuple[int, int, int]], soft: bool) -> None:
    p = np.array([c / 5 for c, _, _ in rows])
    r = np.array([r / 4 if soft else float(r > 2) for _, r, _ in rows])
    counts = np.array([[1] * len(rows), [count for *_, count in rows]])
    values = ranking_metrics(Ranking.of(p), Ranking.of(-r), r, counts, (0.1, 0.25))
    values |= probability_metrics(p, r, counts, 7)
    for resample, count in enumerate(counts):
        c, residual = np.repeat(p, count), np.repeat(r, count)
        expected = {name: getattr(metrics, name)(c, residual) for name in ("aurc", "e_aurc", "augrc", "auacc", "prr")}
        expected["prr_50"] = metrics.prr(c, residual, max_rejection=0.5)
        expected |= {f"coverage_at_risk_{x:g}": metrics.coverage_at_risk(c, residual, x)[0] for x in (0.1, 0.25)}
        expected |= {"brier": metrics.brier(c, 1 - residual), "ece": metrics.ece(c, 1 - residual, bins=7)}
        if np.isin(r, (0, 1)).all():
            expected["auroc"] = metrics.auroc(c, residual)
            expected["accuracy"] = metrics.accuracy(c, 1 - residual)
            expected["balanced_accuracy"] = metrics.balanced_accuracy(c, 1 - residual)
        assert expected.keys() == values.keys()
        for name, value in expected.items():
            assert values[name][resample] == pytest.approx(value, abs=1e-9, nan_ok=True), name


def test_every_score_has_its_metrics_on_the_same_answers() -> None:
    p, r = answers()
    found = evaluate({"scorer": p, "length": -p}, r, probabilities=["scorer"], bootstrap=50, risks=(0.05, 0.3))
    at_risk = ["coverage_at_risk_0.05", "coverage_at_risk_0.3"]
    assert [row.name for row in found.rows] == ["scorer", "length"]
    assert list(found.row("scorer").metrics) == OF_ALL + OF_PROBABILITIES + at_risk
    assert list(found.row("length").metrics) == OF_ALL + at_risk
    scorer = found.row("scorer").metrics
    assert scorer["auroc"].value == metrics.auroc(p, r)
    assert scorer["prr_50"].value == metrics.prr(p, r, max_rejection=0.5)
    assert scorer["brier"].value == metrics.brier(p, 1 - r)
    assert scorer["coverage_at_risk_0.3"].value == metrics.coverage_at_risk(p, r, 0.3)[0]
    assert found.row("length").metrics["auroc"].value == pytest.approx(1 - metrics.auroc(p, r))
    assert all(cell.low <= cell.value <= cell.high for cell in scorer.values() if cell is not scorer["ece"])
    with pytest.raises(KeyError, match="other"):
        found.row("other")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_an_answer_without_a_finite_score_is_left_out_counted_and_said(value: float) -> None:
    p, r = answers()
    q = p.copy()
    q[:30] = value
    found = evaluate({"all": p, "some": q}, r, bootstrap=20)
    assert [(row.scored, row.unscored) for row in found.rows] == [(200, 0), (170, 30)]
    alone = evaluate({"some": p[30:]}, r[30:], bootstrap=0)
    for key, cell in found.row("some").metrics.items():
        assert cell.value == alone.row("some").metrics[key].value
    assert [note for note in found.notes if "30 of 200 answers are unscored" in note]
    assert "! some: 30 of 200 answers are unscored" in found.table()


def test_a_score_that_scored_nothing_has_no_figures() -> None:
    p, r = answers()
    found = evaluate({"p_true": np.full(200, math.nan), "x": p}, r, probabilities=["p_true"], bootstrap=20)
    assert all(math.isnan(cell.value) for cell in found.row("p_true").metrics.values())
    assert "p_true: no answer is scored" in found.notes


def test_intervals_are_the_same_again_and_for_equal_scores() -> None:
    p, r = answers()
    first = evaluate({"a": p, "b": p * 0.5}, r, bootstrap=100, seed=3)
    assert first == evaluate({"a": p, "b": p * 0.5}, r, bootstrap=100, seed=3)
    assert first.row("a").metrics == first.row("b").metrics
    other = evaluate({"a": p}, r, bootstrap=100, seed=4)
    assert other.row("a").metrics["auroc"] != first.row("a").metrics["auroc"]


def test_intervals_do_not_depend_on_how_many_resamples_are_held_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    p, r = answers(50)
    whole = evaluate({"a": p}, r, bootstrap=40, probabilities=["a"])
    monkeypatch.setattr(bootstrapping, "_CELLS", 150)
    parts = evaluate({"a": p}, r, bootstrap=40, probabilities=["a"])
    for key, cell in whole.row("a").metrics.items():
        other = parts.row("a").metrics[key]
        assert (other.low, other.high) == pytest.approx((cell.low, cell.high), abs=1e-12)


def test_95_percent_intervals_hold_the_truth_about_as_often() -> None:
    truth = metrics.auroc(*answers(200_000, seed=99))
    held = 0
    for seed in range(150):
        p, r = answers(120, seed=seed)
        cell = evaluate({"a": p}, r, bootstrap=200, seed=seed, risks=()).row("a").metrics["auroc"]
        held += cell.low <= truth <= cell.high
    assert 0.88 <= held / 150 <= 0.99  # .95 within about 3 standard errors, and the bootstrap is a little short


def test_interval_leaves_out_2_5_percent_on_either_side() -> None:
    values = np.random.default_rng(0).permutation(np.arange(1001.0))
    assert percentile_interval(np.append(values, math.nan)) == pytest.approx((25, 975))
    assert all(math.isnan(end) for end in percentile_interval(np.full(3, math.nan)))


def test_answers_to_one_question_are_not_independent() -> None:
    """Every answer four times says no more than once; resampling answers would think so."""
    p, r = answers(100)
    once = evaluate({"a": p}, r, bootstrap=300)
    questions = np.array([f"q{i:03}" for i in range(100)], dtype=object)
    repeated = {"a": np.repeat(p, 4)}
    by_question = evaluate(repeated, np.repeat(r, 4), groups=np.repeat(questions, 4), bootstrap=300)
    by_answer = evaluate(repeated, np.repeat(r, 4), bootstrap=300)
    honest = once.row("a").metrics["auroc"]
    assert by_question.row("a").metrics["auroc"].low == pytest.approx(honest.low)
    assert by_question.row("a").metrics["auroc"].high == pytest.approx(honest.high)
    narrow = by_answer.row("a").metrics["auroc"]
    assert narrow.high - narrow.low < 0.7 * (honest.high - honest.low)
    assert (by_question.answers, by_question.questions) == (400, 100)


def test_questions_of_the_scored_answers_are_those_resampled() -> None:
    """A score of a few questions with many answers each knows little, whatever the questions it has not scored."""
    p, r = answers(110)
    groups = np.r_[np.arange(100), np.repeat(np.arange(100, 110), 10)]
    many, residual = np.r_[p[:100], np.repeat(p[100:], 10)], np.r_[r[:100], np.repeat(r[100:], 10)]
    some = np.where(groups < 100, math.nan, many)
    cell = evaluate({"some": some}, residual, groups=groups, bootstrap=300).row("some").metrics["aurc"]
    honest = evaluate({"few": p[100:]}, r[100:], bootstrap=300).row("few").metrics["aurc"]
    assert cell.high - cell.low > 0.7 * (honest.high - honest.low)


def test_difference_of_two_scores_is_paired() -> None:
    p, r = answers(300)
    q = p + np.random.default_rng(1).normal(scale=0.02, size=300)
    difference = paired_difference(p, q, r, "auroc", bootstrap=300)
    assert difference.value == metrics.auroc(p, r) - metrics.auroc(q, r)
    alone = evaluate({"p": p}, r, bootstrap=300).row("p").metrics["auroc"]
    assert difference.high - difference.low < 0.3 * (alone.high - alone.low)
    assert paired_difference(p, p, r, "aurc", bootstrap=50) == Interval(0, 0, 0)
    better = paired_difference(-r, p, r, "auroc", bootstrap=100)
    assert 0 < better.low < better.value < better.high


def test_difference_is_over_the_answers_that_both_have_scored() -> None:
    p, r = answers(100)
    q, s = p[::-1].copy(), p.copy()
    q[:20], s[90:] = math.nan, math.nan
    both = slice(20, 90)
    expected = metrics.brier(s[both], 1 - r[both]) - metrics.brier(q[both], 1 - r[both])
    groups = np.arange(100) // 2
    assert paired_difference(s, q, r, "brier", groups=groups, bootstrap=20).value == expected
    at_risk = paired_difference(s, q, r, "coverage_at_risk_0.25", bootstrap=20).value
    assert at_risk == (
        metrics.coverage_at_risk(s[both], r[both], 0.25)[0] - metrics.coverage_at_risk(q[both], r[both], 0.25)[0]
    )
    with pytest.raises(ValueError, match="no answer is scored by both"):
        paired_difference(np.full(100, math.nan), p, r, "auroc")
    with pytest.raises(ValueError, match="'auc' is unknown; there are auroc, "):
        paired_difference(p, s, r, "auc")


@pytest.mark.parametrize(("residual", "word"), [(0.0, "right"), (1.0, "wrong")])
def test_one_class_leaves_out_what_needs_two_and_says_so(residual: float, word: str) -> None:
    p, _ = answers(40)
    found = evaluate({"a": p}, np.full(40, residual), probabilities=["a"], bootstrap=30)
    cells = found.row("a").metrics
    for key in ("auroc", "prr", "balanced_accuracy"):
        assert math.isnan(cells[key].value)
        assert found.as_dict()["rows"][0]["metrics"][key] == {"value": None, "low": None, "high": None}
    assert cells["aurc"].value == residual
    assert [note for note in found.notes if f"all 40 answers are {word}: AUROC" in note]


def test_resamples_without_a_wrong_answer_are_said_and_left_out() -> None:
    p, _ = answers(40)
    r = np.zeros(40)
    r[0] = 1
    found = evaluate({"a": p}, r, bootstrap=200)
    cell = found.row("a").metrics["auroc"]
    assert not math.isnan(cell.low)
    assert [note for note in found.notes if "not defined in up to" in note]
    assert "only 1 wrong answers of 40: all figures are rough, whatever their intervals say" in found.notes


def test_qualities_between_right_and_wrong_have_risks_but_no_auroc() -> None:
    p, _ = answers(60)
    r = np.random.default_rng(2).random(60)
    found = evaluate({"a": p}, r, probabilities=["a"], bootstrap=30)
    cells = found.row("a").metrics
    assert math.isnan(cells["auroc"].value)
    assert math.isnan(cells["accuracy"].value)
    assert cells["aurc"].value == metrics.aurc(p, r)
    assert cells["brier"].value == metrics.brier(p, 1 - r)
    assert [note for note in found.notes if "no AUROC" in note]


def test_a_constant_score_is_said_to_order_nothing() -> None:
    p, r = answers()
    found = evaluate({"a": p, "same": np.zeros(200)}, r, bootstrap=0)
    assert found.notes == ["same: equal for all answers, so it orders nothing"]
    assert found.row("same").metrics["auroc"] == Interval(0.5)


@pytest.mark.parametrize("groups", [None, ["q"] * 5])
def test_one_unit_has_no_interval_instead_of_one_without_width(groups: list[str] | None) -> None:
    count = 1 if groups is None else 5
    p, r = answers(5)
    found = evaluate({"a": p[:count]}, r[:count], groups=groups, bootstrap=50)
    assert math.isnan(found.row("a").metrics["aurc"].low)
    assert [note for note in found.notes if "no intervals" in note]


def test_an_evaluation_comes_back_from_json() -> None:
    p, r = answers(30)
    found = evaluate({"a": p, "b": np.full(30, math.nan)}, r, groups=np.arange(30) // 3, bootstrap=20)
    text = json.dumps(found.as_dict(), allow_nan=False)
    again = Evaluation.from_dict(json.loads(text))
    assert again.as_dict() == found.as_dict()
    assert again.row("a") == found.row("a")
    assert math.isnan(again.row("b").metrics["auroc"].value)
    assert again.table() == found.table()


def test_table_fits_140_columns_and_leaves_no_score_out() -> None:
    p, r = answers()
    names = ["sequence_log_probability", "stack", "random"]
    found = evaluate(dict.fromkeys(names, p), r, probabilities=["stack"], bootstrap=50)
    lines = found.table().split("\n")
    assert max(map(len, lines)) <= 140
    assert [line.split()[0] for line in lines[1:5]] == ["score", *names]
    assert lines[1].split()[1:] == [
        *("AUROC", "AURC", "E-AURC", "AUGRC", "AUACC", "PRR", "PRR50", "Brier", "ECE"),
        *("cov@.05", "%", "cov@.1", "%", "cov@.2", "%"),
    ]
    cell = found.row("stack").metrics["auroc"]
    assert f"{cell.value:.3f} [{cell.low:.3f},{cell.high:.3f}]".replace("0.", ".") in lines[3]
    assert "ECE over 15 bins" in lines[0]
    risks = [0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]
    wide = evaluate(dict.fromkeys(names, p), r, bootstrap=50, risks=risks).table()
    assert max(map(len, wide.split("\n"))) <= 140
    assert all(f"cov@{risk:g}".replace("0.", ".") in wide for risk in risks)
    assert wide.count("\nstack ") == 2


@pytest.mark.parametrize(
    ("confidences", "residual", "options", "message"),
    [
        ({"a": [0.1, 0.2]}, [0.0, math.nan], {}, "residual is nan at 1"),
        ({"a": [0.1, 0.2]}, [0.0, 3.0], {}, "residual is 3.0 at 1"),
        ({"a": []}, [], {}, "residual"),
        ({"a": [0.1]}, [0.0, 1.0], {}, r"confidences\['a'\] has shape \(1,\) for 2 residuals"),
        ({"a": [0.1, 1.2]}, [0.0, 1.0], {"probabilities": ["a"]}, r"confidences\['a'\] .* not in \[0, 1\]"),
        ({"a": [0.1, 0.2]}, [0.0, 1.0], {"probabilities": ["b"]}, "probabilities names b"),
        ({"a": [0.1, 0.2]}, [0.0, 1.0], {"groups": ["q"]}, "groups has shape"),
    ],
)
def test_bad_input_is_an_error_that_names_it(confidences: dict, residual: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(confidences, residual, **options)

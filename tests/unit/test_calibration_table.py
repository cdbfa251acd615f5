"""Operating points of a policy from the questions it was made of."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from stitch_ray.reliability.metrics import risk_coverage_curve
from stitch_ray.reliability.policy import Fingerprints
from stitch_ray.reliability.risk.calibration_table import CALIBRATION, CALIBRATION_SCHEMA, operating_points, read, write
from stitch_ray.reliability.risk.questions import Material, Questions


def material(calibrate: Questions) -> Material:
    empty = calibrate.take(np.zeros(len(calibrate), np.bool_))
    return Material(
        isotonic=calibrate.take(np.arange(len(calibrate)) < 2),
        calibrate=calibrate,
        test=empty,
        fingerprints=Fingerprints(),
        splits={},
        rows_in=len(calibrate),
        rows_out=len(calibrate),
        dropped={},
        quarantined=(),
    )


def questions(n: int = 200, *, final: bool = False) -> Questions:
    rng = np.random.default_rng(0)
    draft, second = rng.random((2, n)).round(2)
    loss, second_loss = (rng.random(n) > draft).astype(float), (rng.random(n) > second).astype(float)
    tasks = np.array(["a" if row % 4 else None for row in range(n)], object)
    return Questions(tasks, draft, loss, second if final else None, second_loss if final else None)


def test_points_of_one_stage_are_those_of_the_risk_coverage_curve(tmp_path: Path) -> None:
    given = questions()
    write(tmp_path / CALIBRATION, material(given))
    table = read(tmp_path / "policy.json")
    assert table is not None
    assert table.schema == CALIBRATION_SCHEMA
    assert table["final_confidence"].null_count == table.num_rows == 202
    curve = risk_coverage_curve(given.draft, given.draft_loss)
    at = [5, 40, len(curve.threshold) - 1]
    points = operating_points(table, thresholds=curve.threshold[at])
    assert points.num == 200
    assert points.thresholds == pytest.approx(curve.threshold[at])
    assert points.coverage == pytest.approx(curve.coverage[at])
    assert points.risk == pytest.approx(curve.risk[at])
    every = operating_points(table)
    assert every.coverage[-1] == 1
    assert list(every.thresholds) == sorted(every.thresholds, reverse=True)


def test_points_of_a_cascade_replay_both_stages(tmp_path: Path) -> None:
    given = questions(final=True)
    assert given.final is not None
    assert given.final_loss is not None
    write(tmp_path / CALIBRATION, material(given))
    table = read(tmp_path)
    assert table is not None
    points = operating_points(table, thresholds=[0.9, 0.5])
    for tau, coverage, risk in zip(points.thresholds, points.coverage, points.risk, strict=True):
        first = given.draft >= tau
        second = ~first & (given.final >= tau)
        assert coverage == pytest.approx((first | second).mean())
        lost = given.draft_loss[first].sum() + given.final_loss[second].sum()
        assert risk == pytest.approx(lost / (first | second).sum())


def test_unscored_answers_count_and_unlabelled_ones_do_not(tmp_path: Path) -> None:
    draft, loss = np.array([0.9, np.nan, 0.5, 0.7]), np.array([0.0, 1.0, 1.0, np.nan])
    write(tmp_path / CALIBRATION, material(Questions(np.array([None] * 4, object), draft, loss)))
    table = read(tmp_path)
    assert table is not None
    points = operating_points(table, thresholds=[0.95, 0.8, 0.1])
    assert points.num == 3
    assert points.coverage == pytest.approx([0, 1 / 3, 2 / 3])
    assert points.risk[0] is None
    assert points.risk[1:] == pytest.approx([0, 0.5])


def test_one_task_alone_and_a_policy_without_a_table(tmp_path: Path) -> None:
    assert read(tmp_path / "policy.json") is None
    given = questions()
    write(tmp_path / CALIBRATION, material(given))
    table = read(tmp_path)
    assert table is not None
    assert operating_points(table, task="a", thresholds=[0.5]).num == 150
    with pytest.raises(ValueError, match="no labelled calibration question of task 'b'"):
        operating_points(table, task="b")
    assert not math.isnan(operating_points(table, task="a").coverage[0])

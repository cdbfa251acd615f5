"""Which point of the curve a threshold stands for."""

import pytest

from serve_apps.page_curve import Point, plot, point_at, points_of

CURVE = {"thresholds": [0.5, 0.9, 0.7], "coverage": [1.0, 0.2, 0.6], "risk": [0.3, None, 0.1], "num": 10}


def test_points_go_from_strict_to_lenient_whatever_order_they_come_in() -> None:
    assert [point.threshold for point in points_of(CURVE)] == [0.9, 0.7, 0.5]


@pytest.mark.parametrize(
    ("threshold", "coverage"), [(0.0, 1.0), (0.5, 1.0), (0.51, 0.6), (0.7, 0.6), (0.9, 0.2), (0.91, 0.0)]
)
def test_a_threshold_does_what_the_next_stricter_one_does(threshold: float, coverage: float) -> None:
    assert point_at(points_of(CURVE), threshold).coverage == coverage


def test_beyond_all_points_nothing_is_answered() -> None:
    assert point_at(points_of(CURVE), 0.95) == Point(0.95, 0.0, None)
    assert "<svg" in plot([], Point(1.0, 0.0, None), None, None)

"""Which point of the curve a threshold stands for, and what tiles and plot show of it."""

from __future__ import annotations

import pytest

from serve_apps.page_curve import HEIGHT, WIDTH, Point, numbers, plot, point_at, points_of
from tests.page import Page

CURVE = {"thresholds": [0.5, 0.9, 0.7], "coverage": [1.0, 0.2, 0.6], "risk": [0.3, None, 0.1], "num": 10}
POINTS = points_of(CURVE)


def test_points_go_from_strict_to_lenient_whatever_order_they_come_in() -> None:
    assert [Point(0.9, 0.2, None), Point(0.7, 0.6, 0.1), Point(0.5, 1.0, 0.3)] == POINTS


def test_columns_of_different_lengths_are_no_curve() -> None:
    with pytest.raises(ValueError, match="shorter"):
        points_of({**CURVE, "risk": [0.1]})


@pytest.mark.parametrize(
    ("threshold", "coverage"), [(0.0, 1.0), (0.5, 1.0), (0.51, 0.6), (0.7, 0.6), (0.9, 0.2), (0.91, 0.0)]
)
def test_a_threshold_does_what_the_next_stricter_one_does(threshold: float, coverage: float) -> None:
    assert point_at(POINTS, threshold).coverage == coverage


def test_a_threshold_that_a_slider_rounded_is_the_point_it_was_set_to() -> None:
    assert point_at([Point(0.1 + 0.2, 0.4, 0.1)], 0.30000000000000016).coverage == 0.4


def test_beyond_all_points_nothing_is_answered() -> None:
    assert point_at(POINTS, 0.95) == point_at([], 0.95) == Point(0.95, 0.0, None)


# Tiles


def tiles(point: Point, active: float | None) -> tuple[dict[str | None, str], str]:
    """Value by name, and all that is said."""
    page = Page(numbers(point, active, 1200))
    names = [attributes["data-value"] for tag, attributes in page.tags if tag == "b"]
    return dict(zip(names, page.words[::2], strict=True)), page.text


def test_the_tiles_tell_threshold_coverage_and_risk_and_where_the_server_is() -> None:
    values, text = tiles(Point(0.7, 0.625, 0.081), 0.75)
    assert values == {"threshold": "0.700", "coverage": "62.5 %", "risk": "8.1 %"}
    assert "threshold (the server uses 0.750)" in text
    assert "of 1,200 calibration questions answered" in text


def test_a_server_that_abstains_on_everything_and_a_risk_of_nothing_are_said_as_such() -> None:
    values, text = tiles(Point(0.99, 0.0, None), None)
    assert (values["coverage"], values["risk"]) == ("0 %", "–")
    assert "threshold (abstains on everything)" in text


# Plot


def drawn(*arguments: object) -> Page:
    return Page(plot(*arguments))  # type: ignore[arg-type]


def of(page: Page, tag: str, kind: str) -> list[dict[str, str | None]]:
    return [attributes for name, attributes in page.tags if name == tag and attributes.get("class") == kind]


def where(attributes: dict[str, str | None]) -> tuple[float, float]:
    return float(str(attributes["cx"])), float(str(attributes["cy"]))


def test_the_curve_goes_through_the_points_that_answer_something() -> None:
    page = drawn(POINTS, POINTS[1], POINTS[2], 0.1)
    [curve] = of(page, "polyline", "curve")
    line = [tuple(map(float, pair.split(","))) for pair in str(curve["points"]).split()]
    assert len(line) == 2
    assert line[0][0] < line[1][0]  # more is answered
    assert line[0][1] > line[1][1]  # and more of it is wrong: y grows downwards
    assert where(of(page, "circle", "chosen")[0]) == line[0]
    assert where(of(page, "circle", "active")[0]) == line[1]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in line)
    assert "2 thresholds" in str(next(attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"))


def test_the_promise_is_a_line_at_its_risk() -> None:
    page = drawn(POINTS, POINTS[1], None, 0.1)
    [line] = of(page, "line", "target")
    assert line["y1"] == line["y2"] == of(page, "circle", "chosen")[0]["cy"]  # the point has this very risk
    assert "promised: at most 10 %" in page.text
    without = drawn(POINTS, POINTS[1], None, None)
    assert of(without, "line", "target") == []
    assert "promised" not in without.text


def test_a_place_where_nothing_is_answered_has_no_mark() -> None:
    page = drawn(POINTS, Point(0.95, 0.0, None), None, 0.1)
    assert of(page, "circle", "chosen") == of(page, "circle", "active") == []
    empty = drawn([], Point(1.0, 0.0, None), None, None)
    assert [attributes["points"] for attributes in of(empty, "polyline", "curve")] == [""]


@pytest.mark.parametrize(
    ("risk", "promised", "top"), [(0.0, None, "2 %"), (0.03, None, "5 %"), (0.03, 0.2, "20 %"), (1.0, 0.1, "100 %")]
)
def test_the_scale_reaches_over_the_highest_risk_and_the_promise(risk: float, promised: float | None, top: str) -> None:
    page = drawn([Point(0.5, 1.0, risk)], Point(0.5, 1.0, risk), None, promised)
    shares = [word for word in page.words if word.endswith("%") and not word.startswith("promised")]
    assert shares[:5] == ["0 %", "25 %", "50 %", "75 %", "100 %"]  # of the questions, on the other axis
    assert (shares[5], shares[7]) == ("0 %", top)
    assert where(of(page, "circle", "chosen")[0])[1] >= 0

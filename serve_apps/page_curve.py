"""What a threshold would have done on the calibration answers: its numbers, and the risk-coverage plot as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from stitch_ray.client.words import percent

WIDTH, HEIGHT = 560, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 28, 14, 48


@dataclass(frozen=True, slots=True)
class Point:
    """risk None: nothing is answered."""

    threshold: float
    coverage: float
    risk: float | None


def points_of(curve: Mapping[str, Any]) -> list[Point]:
    """The points of `GET /v1/policy/curve`, strictest first."""
    rows = zip(curve["thresholds"], curve["coverage"], curve["risk"], strict=True)
    return sorted((Point(*row) for row in rows), key=lambda point: -point.threshold)


def point_at(points: Sequence[Point], threshold: float) -> Point:
    """The most lenient of the points that are at least as strict as `threshold`; beyond all of them nothing is answered.

    Between two neighbouring confidences a threshold does what the upper one does.
    """
    stricter = [point for point in points if point.threshold >= threshold - 1e-12]
    return stricter[-1] if stricter else Point(threshold, 0.0, None)


def numbers(point: Point, active: float | None, num: int) -> str:
    """The tiles under the slider."""
    told = "–" if point.risk is None else percent(point.risk)
    where = "abstains on everything" if active is None else f"the server uses {active:.3f}"
    tiles = [
        (f"{point.threshold:.3f}", f"threshold ({where})", "threshold"),
        (percent(point.coverage), f"of {num:,} calibration questions answered", "coverage"),
        (told, "of those answers wrong", "risk"),
    ]
    cells = "".join(
        f'<div><b data-value="{name}">{escape(value)}</b><span>{escape(text)}</span></div>'
        for value, text, name in tiles
    )
    return f'<div class="sr-tiles" role="status">{cells}</div>'


def plot(points: Sequence[Point], chosen: Point, active: Point | None, target_risk: float | None) -> str:
    """Risk over coverage; the dot is where the server works, the ring where the slider is, dashes are the promise."""
    shown = [point for point in points if point.risk is not None]
    highest = max([*(point.risk or 0.0 for point in shown), target_risk or 0.0, 0.01])
    top = next(step for step in (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0) if step >= highest - 1e-9)

    def x(coverage: float) -> float:
        return round(_LEFT + coverage * (WIDTH - _LEFT - _RIGHT), 1)

    def y(risk: float) -> float:
        return round(HEIGHT - _BOTTOM - risk / top * (HEIGHT - _TOP - _BOTTOM), 1)

    parts = [*_axes(x, y, top)]
    if target_risk is not None:
        parts.append(f'<line class="target" x1="{x(0)}" x2="{x(1)}" y1="{y(target_risk)}" y2="{y(target_risk)}"/>')
        parts.append(
            f'<text class="note" x="{x(0) + 6}" y="{y(target_risk) - 6}">promised: at most {percent(target_risk)}</text>'
        )
    line = " ".join(f"{x(point.coverage)},{y(point.risk or 0.0)}" for point in shown)
    parts.append(f'<polyline class="curve" points="{line}"/>')
    for point, kind, radius in ((active, "active", 5.5), (chosen, "chosen", 9)):
        if point is not None and point.risk is not None:
            parts.append(f'<circle class="{kind}" cx="{x(point.coverage)}" cy="{y(point.risk)}" r="{radius}"/>')
    says = f"Share of wrong answers over share of questions answered; {len(shown)} thresholds."
    legend = '<p class="sr-soft"><i class="dot"></i>the server now <i class="ring"></i>the slider</p>'
    return (
        f'<figure class="sr-plot"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(says)}">'
        f"{''.join(parts)}</svg>{legend}</figure>"
    )


def _axes(x: Any, y: Any, top: float) -> list[str]:
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts.append(f'<line class="grid" x1="{x(share)}" x2="{x(share)}" y1="{y(0)}" y2="{y(top)}"/>')
        parts.append(f'<text x="{x(share)}" y="{y(0) + 18}" text-anchor="middle">{percent(share)}</text>')
    for share in (0, top / 2, top):
        parts.append(f'<line class="grid" x1="{x(0)}" x2="{x(1)}" y1="{y(share)}" y2="{y(share)}"/>')
        parts.append(f'<text x="{x(0) - 6}" y="{y(share) + 4}" text-anchor="end">{percent(share)}</text>')
    parts.append(f'<text x="{x(0.5)}" y="{HEIGHT - 6}" text-anchor="middle">questions answered (coverage)</text>')
    middle = y(top / 2)
    parts.append(
        f'<text x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">answers wrong (risk)</text>'
    )
    return parts

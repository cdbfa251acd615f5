"""Curves of a validator's P(CORRECT), for the reports of `exar judge` and `exar evaluate`."""

from __future__ import annotations

from stitch_ray.report import reliability_figures
from stitch_ray.report.figures import Floats
from stitch_ray.report.risk_curves import oracle_curve, risk_curve


def validator_figures(probability: Floats, right: Floats, what: str) -> list[tuple[str, str, str]]:
    """Risk and coverage, and reliability, of P(CORRECT) (n,) where `right` (n,) is 0 or 1; none if all are the same."""
    if not 0 < right.sum() < len(right):
        return []
    return [
        (
            "Risk and coverage",
            f"{what.capitalize()} by falling P(CORRECT): share of wrong ones among those given.",
            reliability_figures.risk_coverage(
                {"validator": risk_curve(probability, 1 - right)},
                "Risk by coverage",
                oracle=oracle_curve(1 - right),
                chance=float(1 - right.mean()),
            ),
        ),
        (
            "Reliability",
            f"Share of right {what} by P(CORRECT).",
            reliability_figures.reliability_diagram(probability, right, "Reliability of the validator"),
        ),
    ]

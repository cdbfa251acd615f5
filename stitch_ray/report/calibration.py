"""`report.html` of a `calibrate` run: what is promised, at which threshold, and whether fresh answers bore it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from stitch_ray.report import policy_figures, reliability, reliability_figures, risk_curves
from stitch_ray.report.html import goal, number, percent, render
from stitch_ray.report.reliability import EvaluationFacts, RunFacts, SplitFacts, in_words
from stitch_ray.report.scorer import probability_figures
from stitch_ray.runs import write_text

Floats = NDArray[np.float64]


class CheckFacts(TypedDict, total=False):
    """One promise on the test split. `risk` = wrong / answered with its 95 % interval; NaN where nothing is answered."""

    total: int
    answered: int
    wrong: float
    """Sum of the losses of the answers given."""
    risk: float
    low: float
    high: float
    held: bool | None
    """Whether risk <= target_risk; None where nothing is answered."""


class StagesFacts(TypedDict):
    """Questions of a cascade by where they ended, on the test split or else the calibration split."""

    draft: int
    refined: int
    abstained: int


class TargetFacts(TypedDict, total=False):
    """One promise. Needed: target_risk, delta, threshold."""

    task: str | None
    target_risk: float
    delta: float
    threshold: float | None
    """None: abstains on everything."""
    n_calibration: int
    num_accepted: int
    empirical_risk: float | None
    coverage: float | None
    """Share of the calibration answers at or above the threshold; None where only answered questions are known."""
    p_value: float | None
    method: str
    reason: str
    """Why there is no threshold."""
    needed: int | None
    """Accepted calibration answers without an error that would at least be needed."""
    test: CheckFacts
    stages: StagesFacts


class CurveFacts(TypedDict):
    """Risk against coverage, strictest threshold first; arrays of one length."""

    coverage: Floats
    risk: Floats
    threshold: Floats


class ScoredFacts(TypedDict, total=False):
    """The n answers of the test split. For a cascade: of the answer on which the decision is taken."""

    confidence: Floats
    """(n,) in [0, 1], NaN = unscored."""
    correct: NDArray[Any]
    """(n,) bool, or losses turned into 1 - loss."""


class MonitorFacts(TypedDict, total=False):
    """Labels that came back, in their order: wealth of the bet against `risk <= target`. Needed: wealth, alpha."""

    target_risk: float
    alpha: float
    wealth: Floats
    """(labels,) after every label; an alarm from 1 / alpha on."""
    labels: int
    wrong: float
    alarm: bool
    alarm_at: int | None
    """Label, counted from 1, at which the wealth first reached 1 / alpha."""


class PolicyFacts(TypedDict, total=False):
    """Of `policy.json`. `created_from`: the version that feedback updated."""

    version: str
    created_from: str | None
    fingerprints: Mapping[str, Any]
    joint_delta: float | None


class CalibrationFacts(RunFacts, total=False):
    """Facts of a `calibrate` run. All but `targets` may be missing: what is missing leaves its section out."""

    targets: Sequence[TargetFacts]
    """The default first."""
    policy: PolicyFacts
    route: str
    """none, dialogue, revise or exclude."""
    loss: str
    """error or quality."""
    splits: Mapping[str, SplitFacts]
    curve: CurveFacts
    """Of the calibration split."""
    test: ScoredFacts
    evaluation: EvaluationFacts
    """On the test split."""
    monitor: MonitorFacts
    caveats: Sequence[str]


def write_report(path: Path, facts: CalibrationFacts) -> None:
    """Write the report of a run to the file `path`."""
    targets = [_target(target, facts) for target in facts["targets"]]
    page = render(
        "calibration.html.jinja",
        **reliability.frame(path, facts, _notes(facts)),
        facts=facts,
        policy=facts.get("policy", {}),
        headline=_headline(facts["targets"][0], facts),
        tiles=_tiles(facts),
        targets=targets,
        checked=[target for target in targets if target["test"] is not None],
        curves=_curves(facts),
        splits=reliability.split_rows(facts.get("splits")),
        tables=reliability.score_tables(facts.get("evaluation")),
        stages=_stages(facts["targets"]),
        pictures=_pictures(facts),
        monitor=_monitor(facts.get("monitor")),
        caveats=list(facts.get("caveats", ())),
    )
    write_text(path, page)


# Sentences


def _of(target: TargetFacts) -> str:
    return f"answers given to task {target['task']}" if target.get("task") else "answers given"


def _promise(target: TargetFacts, facts: CalibrationFacts) -> str:
    sure = goal(1 - target["delta"])
    if facts.get("loss") == "quality":
        what = f"the mean loss (1 less the label) of the {_of(target)} is at most {target['target_risk']:g}"
    else:
        what = f"of the {_of(target)}, at most {goal(target['target_risk'])} are wrong"
    return f"{what[0].upper()}{what[1:]}, with probability {sure} over the calibration data."


def _headline(target: TargetFacts, facts: CalibrationFacts) -> str:
    if target["threshold"] is not None:
        return _promise(target, facts).rstrip(".")
    return f"No threshold keeps the risk at {goal(target['target_risk'])}: every question gets an abstention"


def _why_not(target: TargetFacts) -> str:
    """Why everything gets an abstention, and what would help."""
    text = target.get("reason") or "no threshold passed the test"
    text = text[0].upper() + text[1:].rstrip(".") + "."
    needed, accepted = target.get("needed"), target.get("n_calibration")
    if needed is not None and accepted is not None and accepted < needed:
        text += (
            f" At this risk and probability at least {number(needed)} calibration answers are needed even if none of "
            f"them is wrong; there are {number(accepted)}."
        )
    return text


def _verdict(target: TargetFacts, check: CheckFacts) -> str:
    if not check.get("answered"):
        return "nothing answered"
    if check.get("held"):
        return "held"
    return "exceeded, within chance" if _risk(check)[1] <= target["target_risk"] else "exceeded"


# Parts of the page


def _tiles(facts: CalibrationFacts) -> list[tuple[str, str]]:
    target = facts["targets"][0]
    check = target.get("test", {})
    tiles = [
        ("threshold", "none" if target["threshold"] is None else number(target["threshold"], 3)),
        ("answered, calibration", percent(target.get("coverage"))),
        ("calibration answers", number(target["n_calibration"])) if "n_calibration" in target else None,
        ("wrong among these answered", percent(target.get("empirical_risk"))),
    ]
    if check.get("total"):
        tiles += [
            ("answered, test", percent(check.get("answered", 0) / check["total"])),
            ("wrong among these", percent(check.get("risk")) if check.get("answered") else "–"),
        ]
    return [tile for tile in tiles if tile is not None]


def _notes(facts: CalibrationFacts) -> list[str]:
    notes = []
    for target in facts["targets"]:
        if target["threshold"] is None:
            name = _label(target)
            notes.append(f"{name[0].upper()}{name[1:]}: abstains on everything. {_why_not(target)}")
        check = target.get("test")
        if check and check.get("answered") and check.get("held") is False:
            notes.append(_exceeded(target, check))
    monitor = facts.get("monitor")
    if monitor is not None and monitor.get("alarm"):
        at = monitor.get("alarm_at")
        where = f" after {number(at)} labels" if at else ""
        notes.append(f"The labels that came back raised an alarm{where}: the promise is no longer plausible.")
    return [*notes, *reliability.evaluation_notes(facts.get("evaluation"))]


def _exceeded(target: TargetFacts, check: CheckFacts) -> str:
    """That the promise was not kept on the test split, and what that may mean as far as the interval tells."""
    risk, low, _ = _risk(check)
    text = (
        f"On the test split {percent(risk)} of the answers given were wrong, more than the promised "
        f"{goal(target['target_risk'])}."
    )
    if low <= target["target_risk"]:
        return f"{text} The interval holds the promised risk: so few answers can show that by chance."
    if low > target["target_risk"]:
        return (
            f"{text} The whole interval lies above: the test answers are not like the calibration answers, or this is "
            f"one of the draws ({goal(target['delta'])}) in which the promise fails."
        )
    return text


def _target(target: TargetFacts, facts: CalibrationFacts) -> dict[str, Any]:
    """A promise as the template shows it."""
    check = target.get("test")
    return {
        **dict.fromkeys(("n_calibration", "num_accepted", "empirical_risk", "coverage", "p_value", "method", "task")),
        **target,
        "promise": _promise(target, facts),
        "why_not": None if target["threshold"] is not None else _why_not(target),
        "test": check
        and {
            **dict.fromkeys(("total", "wrong")),
            **check,
            "answered": check.get("answered", 0),
            "shown_risk": in_words(*_risk(check), share=True),
            "verdict": _verdict(target, check),
        },
    }


def _risk(check: CheckFacts) -> tuple[float, float, float]:
    return reliability.interval({**check, "value": check.get("risk")})


def _label(target: TargetFacts) -> str:
    risk = f"risk {goal(target['target_risk'])}"
    return f"{target['task']}, {risk}" if target.get("task") else risk


def _curves(facts: CalibrationFacts) -> list[tuple[str, str, str]]:
    """Risk against coverage with the thresholds for all tasks: of the calibration split, and of the test split."""
    every = [target for target in facts["targets"] if not target.get("task")]
    goals = [target["target_risk"] for target in every]
    found = []
    curve = facts.get("curve")
    if curve is not None and len(curve["coverage"]):
        title = "Calibration split"
        coverage, risk = np.asarray(curve["coverage"], np.float64), np.asarray(curve["risk"], np.float64)
        figure = reliability_figures.risk_coverage(
            {"calibration": (coverage, risk)},
            title,
            chance=float(risk[-1]),
            targets=goals,
            marks=[
                (share, _label(one)) for one in every if one["threshold"] is not None and (share := one.get("coverage"))
            ],
        )
        caption = "Orange: the risk that is allowed. Upright: the threshold, left of where the lines cross by a margin."
        found.append((title, caption, figure))
    test = facts.get("test")
    if test is not None and np.isfinite(np.asarray(test["confidence"], np.float64)).any():
        title = "Test split"
        confidence, residual = np.asarray(test["confidence"], np.float64), 1 - np.asarray(test["correct"], np.float64)
        cascade = facts.get("route", "none") != "none"
        drawn = every[:1] if cascade else every  # at another threshold other answers are decided on
        scored = float(np.isfinite(confidence).mean())  # an unscored answer is never given, but it counts
        coverage, risk = risk_curves.risk_curve(confidence, residual)
        band = risk_curves.risk_band(confidence, residual)
        figure = reliability_figures.risk_coverage(
            {"test": (scored * coverage, risk)},
            title,
            oracle=risk_curves.oracle_curve(residual),
            chance=float(residual.mean()),
            targets=[target["target_risk"] for target in drawn],
            marks=[(float((confidence >= value).mean()), _label(one)) for one, value in _thresholds(drawn)],
            band=None if band is None else (scored * band[0], band[1], band[2]),
        )
        caption = "Answers that no choice was made on. Shaded: 95% band."
        if cascade:
            caption += " Of two answers to a question the one that the first promise decides on."
        found.append((title, caption, figure))
    return found


def _thresholds(targets: Sequence[TargetFacts]) -> list[tuple[TargetFacts, float]]:
    """The promises for all tasks that have a threshold."""
    return [(one, one["threshold"]) for one in targets if one["threshold"] is not None and not one.get("task")]


def _pictures(facts: CalibrationFacts) -> list[tuple[str, str, str]]:
    test = facts.get("test")
    if test is None or not np.isfinite(np.asarray(test["confidence"], np.float64)).any():
        return []
    confidence = np.asarray(test["confidence"], np.float64)
    shown = [(value, _label(one)) for one, value in _thresholds(facts["targets"])]
    return probability_figures(confidence, np.asarray(test["correct"], np.float64), None, shown)


def _stages(targets: Sequence[TargetFacts]) -> str | None:
    rows = [
        (_label(target), target["stages"]["draft"], target["stages"]["refined"], target["stages"]["abstained"])
        for target in targets
        if "stages" in target
    ]
    return policy_figures.stages(rows, "Where questions end") if rows else None


def _monitor(monitor: MonitorFacts | None) -> dict[str, Any] | None:
    if monitor is None:
        return None
    values = np.asarray(monitor["wealth"], np.float64)
    alarm = monitor.get("alarm", bool((values >= 1 / monitor["alpha"]).any()))
    return {
        "labels": monitor.get("labels", len(values)),
        "wrong": monitor.get("wrong"),
        "alpha": monitor["alpha"],
        "target_risk": monitor.get("target_risk"),
        "alarm": alarm,
        "alarm_at": monitor.get("alarm_at"),
        "figure": policy_figures.wealth(values, monitor["alpha"], "Wealth against the promise")
        if len(values)
        else None,
    }

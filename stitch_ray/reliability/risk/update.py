"""A policy renewed by labels that came back, and a watch on whether its promise is still plausible.

Only the fresh labels are tested. Those of the first calibration chose the threshold that is active: to test it, or its
neighbours, on them again would count their luck twice, and what an update is wanted for is that they may no longer
speak for what is asked now. The price is that a promise from few labels gives few answers.

Labels of answered questions are draws of what lies at or above the active threshold and say nothing of what lies below
it, so thresholds from the active one upwards are tested. All are tested only if withheld answers were labelled just as
answered ones were. For a cascade a higher threshold would have sent other questions to the second stage, whose answers
nobody has seen: there only the active one is tested; another needs predictions of both stages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stitch_ray.errors import UserError
from stitch_ray.reliability.calibration import Test, learn_then_test, minimal_accepted, promising_start
from stitch_ray.reliability.monitor import RiskMonitor
from stitch_ray.reliability.policy import Policy, Target
from stitch_ray.reliability.risk.feedback import Feedback, Label

ALPHA = 0.05
"""Probability that a monitor of a promise that is kept ever raises an alarm."""

_UNLIKELY = 3.0


@dataclass(frozen=True, slots=True)
class Renewal:
    """A promise before and after. `kept`: there were too few labels to test it, so it is as it was.

    `wealth` after every label of an answered question; `still`: share of those that the new threshold still answers.
    """

    before: Target
    after: Target
    kept: bool
    labels: int
    still: float | None
    monitor: RiskMonitor
    wealth: tuple[float, ...]
    note: str


def renew(policy: Policy, feedback: Feedback, size: int, work_hash: str) -> tuple[Policy, list[Renewal]]:
    """The new policy, created from the version of the old one (the old one itself where no promise could be tested),
    and what became of every promise. `size`: thresholds tried. Raises UserError for confidences outside [0, 1]."""
    test: Test = "binomial" if policy.created_from.get("loss", "error") == "error" else "hoeffding_bentkus"
    renewals = []
    for target in policy.targets:
        mine = [label for label in feedback.labels if label.target == target]
        renewals.append(_renew(target, mine, policy.has_route, size, test))
    if all(renewal.kept for renewal in renewals):
        return policy, renewals
    created = {**policy.created_from, "work_hash": work_hash, "policy": policy.version}
    return Policy(tuple(renewal.after for renewal in renewals), policy.fingerprints, created, policy.scale), renewals


def _renew(target: Target, labels: Sequence[Label], has_route: bool, size: int, test: Test) -> Renewal:
    answered = [label for label in labels if label.answered]
    monitor, wealth = RiskMonitor(target.target_risk, ALPHA).follow(label.loss for label in answered)
    whole, doubt = _is_whole(target, labels)
    tested = list(labels) if whole else answered
    needed = minimal_accepted(target.target_risk, target.delta)
    if len(tested) < needed or (has_route and target.threshold is None):
        note = f"kept as it was: {len(tested)} labels, and at least {needed} without an error can show anything"
        if has_route and len(tested) >= needed:
            note = "kept as it was: to answer again, a cascade needs predictions of both stages"
        return Renewal(target, target, True, len(labels), None, monitor, tuple(wealth), note)
    confidence = np.array([label.confidence for label in tested])
    if (confidence < 0).any() or (confidence > 1).any():
        raise UserError("feedback: thresholds between 0 and 1 are tried, and some confidences are not; calibrate anew")
    lowest = 0.0 if whole or target.threshold is None else target.threshold
    grid = lowest + (1 - lowest) * np.arange(size) / size
    if target.threshold is not None:
        grid = np.array([target.threshold]) if has_route else np.append(grid, target.threshold)
    losses = np.array([label.loss for label in tested])
    found = learn_then_test(
        confidence,
        losses,
        target.target_risk,
        target.delta,
        grid=grid,
        start=_start(confidence, grid, target),
        test=test,
    )
    after = Target.of(target.task, found)
    if not whole:
        after = replace(after, coverage=None if found.value is not None else 0.0)
    still = None
    if answered:
        still = sum(found.value is not None and one.confidence >= found.value for one in answered) / len(answered)
    tried = "the active threshold" if has_route else "all thresholds" if whole else "thresholds from the active one on"
    note = doubt or f"{tried} tested"
    return Renewal(target, after, False, len(labels), still, monitor, tuple(wealth), note)


def _start(confidence: NDArray[np.float64], grid: NDArray[np.float64], target: Target) -> float | None:
    """The threshold to begin with, from confidences alone: the loss they announce stands in for the labels."""
    thresholds = np.unique(grid)[::-1]
    announced = np.tile(1 - np.nan_to_num(confidence), (len(thresholds), 1))
    position = promising_start(confidence >= thresholds[:, None], announced, len(confidence), target.target_risk)
    return None if position is None else float(thresholds[position])


def _is_whole(target: Target, labels: Sequence[Label]) -> tuple[bool, str]:
    """Whether withheld answers were labelled as answered ones were, and else why that is doubted.

    Their share among the labels must not be far (3 standard errors) below the share that calibration found: then
    answered questions were labelled more often, and lenient thresholds would look better than they are.
    """
    withheld = sum(not label.answered for label in labels)
    if not withheld:
        return False, ""
    if target.threshold is None:
        return True, ""
    if target.coverage is None:
        return False, "thresholds below the active one not tested: what share is withheld is not known"
    share = 1 - target.coverage
    error = math.sqrt(share * (1 - share) * (1 / len(labels) + 1 / max(target.n_calibration, 1)))
    if withheld / len(labels) >= share - _UNLIKELY * error:
        return True, ""
    return False, (
        f"thresholds below the active one not tested: {withheld / len(labels):.0%} of the labels are of withheld answers "
        f"where about {share:.0%} are withheld, so answered questions were labelled more often"
    )

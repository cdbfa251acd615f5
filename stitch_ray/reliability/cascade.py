"""What is done with an answer: give it, refine it, or abstain. The one place where that is decided.

Calibration replays these decisions for every threshold, and the predictor takes them question by question; a promise
holds only if both do the same. All is pure: confidences in, decision out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stitch_ray.reliability.calibration import (
    Test,
    Threshold,
    as_threshold,
    from_start,
    learn_then_test_policies,
)
from stitch_ray.reliability.policy import Policy
from stitch_ray.reliability.stage_scale import Stage

Floats = NDArray[np.float64]
Action = Literal["answer", "escalate", "abstain"]
Reason = Literal["confident", "refined", "unsure", "scorer_unavailable"]


@dataclass(frozen=True, slots=True)
class Decision:
    """`confidence` is that of the answer of `stage`, on which the decision was taken; None: unscored.

    escalate: refine the answer and decide again with its confidence.
    """

    action: Action
    stage: Stage
    confidence: float | None
    reason: Reason


def decide(
    policy: Policy,
    *,
    draft: float | None,
    final: float | None = None,
    has_route: bool,
    task: str | None = None,
    target_risk: float | None = None,
) -> Decision:
    """The decision on a draft, or with `final` on the refined answer.

    draft, final: confidences, as `Policy.confidence` makes them of scores. An answer that could not be scored has NaN, a draft also None; `final` None: not refined
    yet. An unscored draft escalates where there is a route and is never given. Where the policy abstains on everything,
    nothing is refined in vain.

    Raises UnknownTarget, and ValueError if there is a route and the policy was calibrated without one, or the other way
    round: either is another policy, about which nothing is promised.
    """
    if has_route != policy.has_route:
        has, was = ("a route", "without one") if has_route else ("no route", "with one")
        raise ValueError(f"there is {has}, and the policy was calibrated {was}: it promises nothing here")
    if final is not None:
        if not has_route:
            raise ValueError("a refined answer needs a route")
        if policy.accepts(draft, stage="draft", task=task, target_risk=target_risk):
            raise ValueError("the draft is to be given; there is nothing to refine")
        if policy.accepts(final, stage="refined", task=task, target_risk=target_risk):
            return Decision("answer", "refined", final, "refined")
        return _abstained("refined", final)
    if policy.accepts(draft, stage="draft", task=task, target_risk=target_risk):
        return Decision("answer", "draft", draft, "confident")
    if has_route and policy.target(task, target_risk).threshold is not None:
        confidence = None if _unscored(draft) else draft
        return Decision("escalate", "draft", confidence, "scorer_unavailable" if confidence is None else "unsure")
    return _abstained("draft", draft)


def replay(
    draft_confidence: ArrayLike,
    draft_loss: ArrayLike,
    final_confidence: ArrayLike,
    final_loss: ArrayLike,
    thresholds: ArrayLike,
) -> tuple[NDArray[np.bool_], Floats]:
    """What each threshold would have done with every question: accepted, losses, both (thresholds, n).

    Confidences and losses of both stages: (n,), NaN = unscored. The loss is that of the answer that is given, 0 where
    there is none. It is `decide` on arrays.
    """
    first, second = np.asarray(draft_confidence, np.float64), np.asarray(final_confidence, np.float64)
    tau = np.asarray(thresholds, np.float64)[:, None]
    at_draft = first >= tau
    refined = ~at_draft & (second >= tau)
    losses = np.where(at_draft, np.asarray(draft_loss, np.float64), np.where(refined, final_loss, 0.0))
    return at_draft | refined, losses


def cascade_threshold(
    draft_confidence: ArrayLike,
    draft_loss: ArrayLike,
    final_confidence: ArrayLike,
    final_loss: ArrayLike,
    risk: float,
    delta: float,
    *,
    grid: ArrayLike,
    start: float | None = None,
    test: Test | None = None,
) -> Threshold:
    """The lowest threshold whose whole cascade passes fixed-sequence testing.

    Every calibration question has passed both stages, whatever its draft's confidence: what a threshold from drafts
    alone leaves out is that a second look at a noisy score lets wrong answers pass which the first had held back.
    `grid`: thresholds in any order, chosen without these labels, as is `start`, above which none is tested.
    """
    thresholds = from_start(np.unique(np.asarray(grid, np.float64))[::-1], start)
    accepted, losses = replay(draft_confidence, draft_loss, final_confidence, final_loss, thresholds)
    return as_threshold(learn_then_test_policies(accepted, losses, risk, delta, test=test), thresholds)


def _abstained(stage: Stage, confidence: float | None) -> Decision:
    if _unscored(confidence):
        return Decision("abstain", stage, None, "scorer_unavailable")
    return Decision("abstain", stage, confidence, "unsure")


def _unscored(confidence: float | None) -> bool:
    return confidence is None or math.isnan(confidence)

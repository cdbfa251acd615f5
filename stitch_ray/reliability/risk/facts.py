"""What is told of a policy: facts for its report and for `metrics.json`, and what must be known to trust it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stitch_ray.config.calibrate import CalibrateConfig
from stitch_ray.reliability.calibration import quantile_grid
from stitch_ray.reliability.cascade import replay
from stitch_ray.reliability.evaluation import Evaluation, evaluate
from stitch_ray.reliability.metrics import risk_coverage_curve
from stitch_ray.reliability.policy import Policy
from stitch_ray.reliability.risk.promises import decisions
from stitch_ray.reliability.risk.questions import Floats, Material, Questions
from stitch_ray.reliability.risk.update import ALPHA, Renewal
from stitch_ray.report.calibration import CurveFacts, MonitorFacts, PolicyFacts, ScoredFacts

SCORER, GIVEN, DECIDED = "scorer", "confidence", "decision"
"""Names of the confidence among the rows of an evaluation: of a scorer, of the files, of the answer decided on."""

_CASCADE_POINTS = 200
_JSON_POINTS = 500
_WITHOUT = ("manifest", "config", "quarantined", "run")


def policy_facts(policy: Policy) -> PolicyFacts:
    marks = policy.fingerprints
    return {
        "version": policy.version,
        "created_from": policy.created_from.get("policy"),
        "fingerprints": {
            "primary": marks.primary,
            "auxiliaries": None if marks.auxiliaries is None else list(marks.auxiliaries),
            "scorer": marks.scorer,
            "route": marks.route,
        },
        "joint_delta": policy.joint_delta,
    }


def curve(questions: Questions) -> CurveFacts | None:
    """Risk against coverage of all questions, strict to lenient; of a cascade every threshold is replayed."""
    scored = ~np.isnan(questions.highest)
    if not scored.any():
        return None
    if questions.final is None or questions.final_loss is None:
        found = risk_coverage_curve(questions.draft[scored], questions.draft_loss[scored])
        return {"coverage": found.coverage * scored.mean(), "risk": found.risk, "threshold": found.threshold}
    thresholds = quantile_grid(questions.highest, _CASCADE_POINTS)
    stages = (questions.draft, questions.draft_loss, questions.final, questions.final_loss)
    accepted, losses = replay(*stages, thresholds)
    count = accepted.sum(1)
    return {"coverage": count / len(questions), "risk": losses.sum(1) / count, "threshold": thresholds}


def tested(policy: Policy, questions: Questions) -> tuple[Floats, Floats]:
    """Confidence and loss of every test answer, of a cascade of the one that the default promise decides on, both (n,)."""
    if questions.final is None or questions.final_loss is None:
        return questions.draft, questions.draft_loss
    refined = np.array([one.stage == "refined" for one in decisions(policy, policy.targets[0], questions)], np.bool_)
    return (
        np.where(refined, questions.final, questions.draft),
        np.where(refined, questions.final_loss, questions.draft_loss),
    )


def scored_facts(policy: Policy, questions: Questions) -> ScoredFacts:
    confidence, loss = tested(policy, questions)
    return {"confidence": confidence, "correct": 1 - loss}


def measure(policy: Policy, material: Material, config: CalibrateConfig) -> Evaluation:
    """The confidence that decides beside its parts and baselines, on the test split."""
    confidence, loss = tested(policy, material.test)
    name = DECIDED if policy.has_route else SCORER if config.scorer else GIVEN
    known = confidence[~np.isnan(confidence)]
    return evaluate(
        {name: confidence, **material.test_scores},
        loss,
        probabilities=(name,) if ((known >= 0) & (known <= 1)).all() else (),
        bootstrap=config.evaluation.bootstrap,
        risks=config.evaluation.risks,
        ece_bins=config.evaluation.ece_bins,
        seed=config.seed,
    )


def monitor_facts(renewal: Renewal) -> MonitorFacts:
    return {
        "target_risk": renewal.before.target_risk,
        "alpha": ALPHA,
        "wealth": np.array(renewal.wealth),
        "labels": renewal.monitor.labels,
        "wrong": renewal.monitor.total,
        "alarm": renewal.monitor.alarm,
        "alarm_at": renewal.monitor.alarm_at,
    }


def caveats(policy: Policy) -> list[str]:
    """What the promise rests on."""
    found = [
        "The promise holds for questions and answers like those it was calibrated on: one mixture of tasks, one prompt, "
        "one version of the model. Where they change, calibrate again.",
        "Another scorer, route or prompt needs a new calibration; the policy is refused for one that it does not know.",
        "A promise is made before the labels are seen: to try several target risks on these labels and keep the best is "
        "not covered. List them all as targets instead.",
        "Labels that come back from use show whether the promise still holds: calibrate with policy and feedback.",
    ]
    marks = policy.fingerprints
    unknown = [name for name in ("primary", "auxiliaries", "scorer") if getattr(marks, name) is None]
    if unknown:
        found.append(
            f"The calibration data do not tell what they are of ({', '.join(unknown)}), so nothing can refuse another."
        )
    return found


def update_caveats(renewals: Sequence[Renewal]) -> list[str]:
    found = [
        "The new promise rests on the fresh labels alone. It holds if whether an answer gets a label does not depend on "
        "whether it is right: complaints are no such labels.",
    ]
    if any(not renewal.kept and renewal.after.coverage is None for renewal in renewals):
        found.append("Coverage is not known where only answered questions came back with a label.")
    if any(renewal.note == "all thresholds tested" for renewal in renewals):
        found.append(
            "Thresholds below the active one were tested as well. That holds if withheld answers were labelled just as "
            "those that were given."
        )
    return found


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as JSON values: NaN is null, long curves are thinned. Without what other files of the run say."""
    return {name: _plain(value) for name, value in facts.items() if name not in _WITHOUT}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        if {"coverage", "risk", "threshold"} == set(value) and isinstance(value["risk"], np.ndarray):
            kept = np.unique(np.linspace(0, len(value["risk"]) - 1, _JSON_POINTS).round().astype(int))
            return {name: _plain(column[kept]) for name, column in value.items()}
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray):
        return [_plain(inner) for inner in value.tolist()]
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

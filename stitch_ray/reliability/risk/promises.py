"""From calibration data to promises, and from promises to what they did on questions that nothing was chosen by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from stitch_ray.config.calibrate import CalibrateConfig, TargetConfig
from stitch_ray.errors import UserError
from stitch_ray.reliability.calibration import (
    UNIFORM_GRID,
    Test,
    learn_then_test,
    minimal_accepted,
    promising_start,
    quantile_grid,
    sgr,
    share_interval,
)
from stitch_ray.reliability.cascade import Decision, cascade_threshold, decide, replay
from stitch_ray.reliability.metrics import ROUNDING
from stitch_ray.reliability.policy import Policy, Target
from stitch_ray.reliability.risk.questions import Floats, Material, Questions
from stitch_ray.report.calibration import CheckFacts, StagesFacts, TargetFacts

_RESAMPLES = 1000


def calibrate(material: Material, config: CalibrateConfig) -> tuple[tuple[Target, ...], list[str]]:
    """The promises, in the order of the configuration, and notes about how they were found.

    Raises UserError if there is no question of a target's task, or confidences that no grid is known for.
    """
    notes: list[str] = []
    targets = tuple(_calibrate(material, config, target, notes) for target in config.targets)
    return targets, list(dict.fromkeys(notes))


def _calibrate(material: Material, config: CalibrateConfig, target: TargetConfig, notes: list[str]) -> Target:
    own = frozenset(other.task for other in config.targets if other.task is not None)
    seen = material.calibrate.of_target(target.task, own)
    if not len(seen):
        known = ", ".join(sorted({str(name) for name in material.calibrate.tasks if name is not None})) or "none"
        whose = f"task {target.task!r}" if target.task else "tasks without a promise of their own"
        raise UserError(f"targets: no calibration question is of {whose}; tasks in the data are: {known}")
    if config.method == "sgr":
        return Target.of(target.task, sgr(seen.draft, seen.draft_loss, target.risk, target.delta))
    grid = _grid(material, target.task, own, config.grid, notes)
    start = _start(material.isotonic.of_target(target.task, own), seen, grid, target.risk)
    test: Test = "binomial" if config.loss == "error" else "hoeffding_bentkus"
    if seen.final is None or seen.final_loss is None:
        found = learn_then_test(
            seen.draft, seen.draft_loss, target.risk, target.delta, grid=grid, start=start, test=test
        )
    else:
        stages = (seen.draft, seen.draft_loss, seen.final, seen.final_loss)
        found = cascade_threshold(*stages, target.risk, target.delta, grid=grid, start=start, test=test)
    return Target.of(target.task, found)


def _grid(material: Material, task: str | None, own: frozenset[str], size: int, notes: list[str]) -> Floats:
    """Thresholds that know nothing of the calibration labels: quantiles of the isotonic split, of the task if it has
    any, else a uniform grid, which only suits confidences in [0, 1]."""
    for part in (material.isotonic.of_target(task, own), material.isotonic):
        if not np.isnan(part.highest).all():
            return quantile_grid(part.highest, size)
    scores = material.calibrate.highest
    if (scores < 0).any() or (scores > 1).any():
        raise UserError(
            "split.isotonic: thresholds to try are quantiles of that split, and it holds no answer with a confidence; "
            "give it a share, or confidences between 0 and 1"
        )
    notes.append("The isotonic split holds no scored answer, so the thresholds tried are 0, 0.01, ... 0.99.")
    return np.asarray(UNIFORM_GRID)


def _start(isotonic: Questions, seen: Questions, grid: Floats, risk: float) -> float | None:
    """The threshold to begin with, as the labelled answers of the isotonic split recommend it; None: they do not.

    Without any, confidences of the calibration answers stand in for labels they have not shown: 1 - confidence is the
    loss that they announce. It recommends well if they are probabilities, and is no risk if they are not.
    """
    known = isotonic.take(~np.isnan(isotonic.draft_loss))
    if len(known):
        losses = (known.draft_loss, known.draft_loss if known.final_loss is None else known.final_loss)
    else:
        known = seen
        losses = (1 - seen.draft, 1 - (seen.draft if seen.final is None else seen.final))
        if (known.highest < 0).any() or (known.highest > 1).any():
            return None
    final = known.draft if known.final is None else known.final
    accepted, costs = replay(known.draft, losses[0], final, losses[1], grid)
    position = promising_start(accepted, costs, len(seen), risk)
    return None if position is None else float(grid[position])


def decisions(policy: Policy, target: Target, questions: Questions) -> list[Decision]:
    """The decision on every question under one promise, by the code that decides in use."""
    alone = Policy((target,), policy.fingerprints, policy.created_from)
    finals = [None] * len(questions) if questions.final is None else questions.final.tolist()
    taken = []
    for draft, final in zip(questions.draft.tolist(), finals, strict=True):
        decision = decide(alone, draft=draft, has_route=alone.has_route, task=target.task)
        if decision.action == "escalate":
            decision = decide(alone, draft=draft, final=final, has_route=True, task=target.task)
        taken.append(decision)
    return taken


def target_facts(policy: Policy, target: Target, material: Material, seed: int) -> TargetFacts:
    """A promise with what it did on the test split."""
    own = frozenset(other.task for other in policy.targets if other.task is not None)
    tested = material.test.of_target(target.task, own)
    counted = tested if len(tested) else material.calibrate.of_target(target.task, own)
    facts = promise_facts(target)
    if len(tested):
        facts["test"] = _check(decisions(policy, target, tested), tested, target.target_risk, seed)
    if policy.has_route:
        taken = decisions(policy, target, counted)
        stages = Counter("abstained" if one.action != "answer" else one.stage for one in taken)
        facts["stages"] = StagesFacts(draft=stages["draft"], refined=stages["refined"], abstained=stages["abstained"])
    return facts


def promise_facts(target: Target) -> TargetFacts:
    facts: TargetFacts = {
        "task": target.task,
        "target_risk": target.target_risk,
        "delta": target.delta,
        "threshold": target.threshold,
        "n_calibration": target.n_calibration,
        "num_accepted": target.num_accepted,
        "empirical_risk": target.empirical_risk,
        "p_value": target.p_value,
        "method": target.method,
        "needed": minimal_accepted(target.target_risk, target.delta),
    }
    if target.coverage is not None:
        facts["coverage"] = target.coverage
    if target.reason is not None:
        facts["reason"] = target.reason
    return facts


def answered_losses(taken: Sequence[Decision], questions: Questions) -> Floats:
    """Losses of the answers that were given, in the order of the questions."""
    given = np.array([one.action == "answer" for one in taken], np.bool_)
    refined = np.array([one.stage == "refined" for one in taken], np.bool_)
    loss = (
        questions.draft_loss
        if questions.final_loss is None
        else np.where(refined, questions.final_loss, questions.draft_loss)
    )
    found: Floats = loss[given]
    return found


def _check(taken: Sequence[Decision], questions: Questions, risk: float, seed: int) -> CheckFacts:
    losses = answered_losses(taken, questions)
    wrong = float(losses.sum())
    if not len(losses):
        return {"total": len(questions), "answered": 0, "wrong": 0.0, "risk": math.nan, "low": math.nan,
                "high": math.nan, "held": None}  # fmt: skip
    if np.isin(losses, (0, 1)).all():
        low, high = share_interval(round(wrong), len(losses))
    else:
        draws = np.random.default_rng(seed).choice(losses, (_RESAMPLES, len(losses))).mean(1)
        low, high = (float(bound) for bound in np.quantile(draws, (0.025, 0.975)))
    mean = wrong / len(losses)
    return {
        "total": len(questions),
        "answered": len(losses),
        "wrong": wrong,
        "risk": mean,
        "low": low,
        "high": high,
        "held": mean <= risk + ROUNDING,
    }

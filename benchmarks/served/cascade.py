"""What refining only unsure drafts saves against refining them all, both calibrated for the same risk."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.harness import table
from benchmarks.served.skills import KNOWS, MISLEADS, SURENESS, SkilledPrimary, SkilledScorer, right, skilled_auxiliary
from stitch_ray.config.ensemble import DialogueConfig
from stitch_ray.ensemble.dialogue_route import DialogueRoute
from stitch_ray.ensemble.predictor import Predictor
from stitch_ray.ensemble.types import Prediction, Question
from stitch_ray.reliability.calibration import Threshold, learn_then_test, promising_start, quantile_grid
from stitch_ray.reliability.cascade import cascade_threshold, replay
from stitch_ray.reliability.policy import Fingerprints, Policy, Target

SKILLS = (0.5, 0.6, 0.7, 0.8)
RISK, DELTA = 0.1, 0.1
GRID = 200
BAR = 0.5


def compare(num: int) -> tuple[str, dict[str, Any]]:
    """`num`: questions of each set that calibrate, and as many that test; half as many choose the grid."""
    lines, facts = [], {}
    for skill in SKILLS:
        found = asyncio.run(_of_skill(skill, num))
        facts[f"{skill:g}"] = found
        always, cascade = found["always-dialogue"], found["cascade"]
        for name, side in (("always-dialogue", always), ("cascade", cascade)):
            lines.append(
                {
                    "primary right": f"{skill:.0%}",
                    "rule": name,
                    "answered": f"{side['coverage']:.1%}",
                    "of these right": f"{side['accuracy']:.1%}",
                    "calls a question": f"{side['calls']:.2f}",
                    "share of always": f"{side['calls'] / always['calls']:.0%}",
                    "if only wrong drafts were refined": ""
                    if side is always
                    else f"{found['floor'] / always['calls']:.0%}",
                    "target <= 50 %": "" if side is always else _verdict(side["calls"] / always["calls"]),
                }
            )
    means = [sum(found[side]["calls"] for found in facts.values()) for side in ("cascade", "always-dialogue")]
    share = means[0] / means[1]
    note = (
        f"Over all four sets the cascade makes {share:.0%} of the calls (target 50 %: {_verdict(share)}). "
        f"Simulated members of known skill behind the real predictor, dialogue of at most 4 turns that ends in agreement; "
        f"{num:,} questions calibrate and {num:,} others are tested. An auxiliary knows the answer to {KNOWS:.0%} of the "
        f"questions, is sure of a wrong one in {MISLEADS:.0%}, and else keeps what was said. The scorer's log-odds have "
        f"mean +-{SURENESS:g} and deviation 1. Equal selective accuracy: both rules are calibrated for at most {RISK:.0%} "
        f"wrong answers (delta {DELTA:g}). Calls are those of models, the scorer's not counted: draft, turns, and the "
        f"primary's reading of the refined answer."
    )
    return f"{table(lines)}\n\n{note}", facts


async def _of_skill(skill: float, num: int) -> dict[str, Any]:
    names = ("first", "second")
    engines = [skilled_auxiliary(name) for name in names]
    route = DialogueRoute(DialogueConfig(), engines, names)  # type: ignore[call-arg]
    predictor = Predictor(primary=SkilledPrimary(skill), scorer=SkilledScorer(), route=route)
    questions = [Question(example_id=str(n), question=f"question {n}") for n in range(2 * num + num // 2)]
    chosen, calibrated, tested = questions[: num // 2], questions[num // 2 : -num], questions[-num:]
    choosing = _stages([await predictor.both_stages(question) for question in chosen])
    seen = _stages([await predictor.both_stages(question) for question in calibrated])

    always = _always(choosing, seen)
    everything = [await predictor.both_stages(question) for question in tested]
    refined = _stages(everything)
    kept = refined[2] >= (np.inf if always.value is None else always.value)

    promise = Target.of(None, _cascade(choosing, seen))
    policy = Policy((promise,), Fingerprints(**asdict(predictor.fingerprints)), {"loss": "error"})
    cascade = [await predictor.predict(question, policy=policy) for question in tested]
    given = [one for one in cascade if one.decision == "answer"]
    return {
        "always-dialogue": {
            "coverage": float(kept.mean()),
            "accuracy": float(1 - refined[3][kept].mean()),
            "calls": float(np.mean([one.calls for one in everything])),
            "threshold": always.value,
        },
        "cascade": {
            "coverage": len(given) / len(cascade),
            "accuracy": float(np.mean([one.answer == right(one.question) for one in given])),
            "calls": float(np.mean([one.calls for one in cascade])),
            "threshold": promise.threshold,
        },
        "floor": float(np.mean([one.calls if one.draft != right(one.question) else 1 for one in everything])),
    }


def _verdict(share: float) -> str:
    return "met" if share <= BAR else "MISSED"


Stages = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Confidence and loss of the drafts, confidence and loss of the refined answers."""


def _stages(predictions: list[Prediction]) -> Stages:
    rows = [
        (
            one.draft_confidence,
            one.draft != right(one.question),
            one.final_confidence,
            one.refined != right(one.question),
        )
        for one in predictions
    ]
    columns = np.array(rows, np.float64).T
    return columns[0], columns[1], columns[2], columns[3]


def _cascade(choosing: Stages, seen: Stages) -> Threshold:
    grid = quantile_grid(np.maximum(choosing[0], choosing[2]), GRID)
    accepted, losses = replay(*choosing, grid)
    start = _start(accepted, losses, len(seen[0]), grid)
    return cascade_threshold(*seen, RISK, DELTA, grid=grid, start=start)


def _always(choosing: Stages, seen: Stages) -> Threshold:
    grid = quantile_grid(choosing[2], GRID)
    accepted = choosing[2] >= grid[:, None]
    start = _start(accepted, np.where(accepted, choosing[3], 0.0), len(seen[0]), grid)
    return learn_then_test(seen[2], seen[3], RISK, DELTA, grid=grid, start=start)


def _start(accepted: np.ndarray, losses: np.ndarray, num: int, grid: np.ndarray) -> float | None:
    place = promising_start(accepted, losses, num, RISK)
    return None if place is None else float(grid[place])

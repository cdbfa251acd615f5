"""What refining only unsure drafts saves against refining them all, both calibrated for the same risk."""

from __future__ import annotations

import asyncio
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from benchmarks.harness import table
from benchmarks.served.skills import KNOWS, MISLEADS, SURENESS, SkilledPrimary, SkilledScorer, right, skilled_auxiliary
from stitch_ray.config.calibrate import CalibrateConfig, TargetConfig
from stitch_ray.config.ensemble import DialogueConfig
from stitch_ray.ensemble.dialogue_route import DialogueRoute
from stitch_ray.ensemble.predictor import Predictor
from stitch_ray.ensemble.types import Prediction, Question
from stitch_ray.reliability.policy import Fingerprints, Policy
from stitch_ray.reliability.risk.promises import calibrate
from stitch_ray.reliability.risk.questions import Material, Questions
from stitch_ray.reliability.risk.scaling import on_one_scale

SKILLS = (0.5, 0.6, 0.7, 0.8)
RISK, DELTA = 0.1, 0.1
PROMISE = [TargetConfig(risk=RISK, delta=DELTA)]  # type: ignore[call-arg]
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
        f"{num:,} questions calibrate, half as many before them choose grid and scale, {num:,} others are tested. An auxiliary knows the answer to {KNOWS:.0%} of the "
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
    tested = questions[-num:]
    everything = [await predictor.both_stages(question) for question in tested]
    seen = _material(
        [await predictor.both_stages(question) for question in questions[: num // 2]],
        [await predictor.both_stages(question) for question in questions[num // 2 : -num]],
        everything,
        Fingerprints(**asdict(predictor.fingerprints)),
    )
    cascade = await _cascade(predictor, tested, seen)
    return {
        "always-dialogue": _always(seen, everything),
        "cascade": cascade,
        "floor": float(np.mean([one.calls if one.draft != right(one.question) else 1 for one in everything])),
    }


async def _cascade(predictor: Predictor, tested: list[Question], seen: Material) -> dict[str, Any]:
    """Calibrated as `calibrate` does it, and then asked."""
    config = CalibrateConfig(predictions=["simulated"], route="dialogue", targets=PROMISE, grid=GRID)  # type: ignore[call-arg]
    scaled, scale, _ = on_one_scale(seen, config)
    (promise,), _ = calibrate(scaled, config)
    policy = Policy((promise,), seen.fingerprints, {"loss": "error"}, scale)
    found = [await predictor.predict(question, policy=policy) for question in tested]
    given = [one for one in found if one.decision == "answer"]
    return {
        "coverage": len(given) / len(found),
        "accuracy": float(np.mean([one.answer == right(one.question) for one in given])),
        "calls": float(np.mean([one.calls for one in found])),
        "threshold": promise.threshold,
    }


def _always(seen: Material, everything: list[Prediction]) -> dict[str, Any]:
    """The refined answers alone, from a threshold of their own on."""
    config = CalibrateConfig(answers=["simulated"], targets=PROMISE, grid=GRID)  # type: ignore[call-arg]
    alone = replace(seen, isotonic=_second(seen.isotonic), calibrate=_second(seen.calibrate), test=_second(seen.test))
    (promise,), _ = calibrate(alone, config)
    kept = alone.test.draft >= (np.inf if promise.threshold is None else promise.threshold)
    return {
        "coverage": float(kept.mean()),
        "accuracy": float(1 - alone.test.draft_loss[kept].mean()),
        "calls": float(np.mean([one.calls for one in everything])),
        "threshold": promise.threshold,
    }


def _material(
    choosing: list[Prediction], calibrating: list[Prediction], testing: list[Prediction], fingerprints: Fingerprints
) -> Material:
    return Material(
        isotonic=_questions(choosing),
        calibrate=_questions(calibrating),
        test=_questions(testing),
        fingerprints=fingerprints,
        splits={},
        rows_in=0,
        rows_out=0,
        dropped={},
        quarantined=(),
    )


def _questions(predictions: list[Prediction]) -> Questions:
    rows = [
        (
            one.draft_confidence,
            one.draft != right(one.question),
            one.final_confidence,
            one.refined != right(one.question),
        )
        for one in predictions
    ]
    return Questions(np.full(len(rows), None, object), *np.array(rows, np.float64).T)


def _second(questions: Questions) -> Questions:
    assert questions.final is not None
    assert questions.final_loss is not None
    return Questions(questions.tasks, questions.final, questions.final_loss)


def _verdict(share: float) -> str:
    return "met" if share <= BAR else "MISSED"

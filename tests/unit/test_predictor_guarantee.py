"""The promise through the predictor: what it gives in use is what calibration replayed, so the promise is its own.

Every draw calibrates the whole cascade on questions that went through both stages of a predictor, and lets that
predictor decide on fresh ones. Where it decides is compared with the replay question by question, and the replay's true
risk over many more questions tells whether the promise was kept. A policy from drafts alone breaks it the same way.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit

from stitch_ray.ensemble.predictor import Predictor
from stitch_ray.ensemble.types import Answer, Event, Prediction, Question, Refined
from stitch_ray.reliability.calibration import learn_then_test
from stitch_ray.reliability.cascade import cascade_threshold, replay
from stitch_ray.reliability.policy import Policy
from tests.scripted import policy_for

Floats = NDArray[np.float64]

DRAWS, CALIBRATION, IN_USE, FRESH = 200, 500, 12, 2000
RISK, DELTA = 0.2, 0.1
ALLOWED = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)
GRID = np.arange(50, 100) / 100


@dataclass(frozen=True)
class World:
    """Both stages of n questions, (n,): confidence (draft, final), and the true probability of being wrong in either."""

    draft: Floats
    final: Floats
    wrong: Floats

    @classmethod
    def draw(cls, rng: np.random.Generator, n: int) -> World:
        """Refining changes nothing but the scorer's noise, whose second look is 0.7 logits too sure."""
        odds = rng.normal(0.9, 1.5, n)
        first, second = odds + rng.normal(0, 1, n), odds + rng.normal(0, 1, n) + 0.7
        draft, final = expit(first), expit(second)
        draft[rng.random(n) < 0.02] = np.nan
        return cls(draft, final, 1 - expit(odds))


class Member:
    """Primary, route and scorer of a world. Answers are the stage and the number of the question."""

    fingerprint = "dialogue:1"
    name = "dialogue"
    auxiliaries = ("a", "b")

    def __init__(self, world: World) -> None:
        self._world = world

    async def answer(self, question: Question) -> Answer:
        return Answer(text=f"draft {question.example_id}")

    async def signals(self, question: Question, text: str, samples: Sequence[str]) -> Answer:
        return Answer(text=text)

    async def refine(self, question: Question, draft: Answer, budget: Any) -> AsyncIterator[Event | Refined]:
        yield Refined(text=f"final {question.example_id}", calls=0, tokens=0, changed_by=None)


class WorldScorer:
    fingerprint = "scorer"
    signals = frozenset[str]()

    def __init__(self, world: World) -> None:
        self._world = world

    async def score(self, question: Question, text: str, signals: Mapping[str, float | None]) -> float | None:
        stage, number = text.split()
        return float(getattr(self._world, stage)[int(number)])


def predictor_of(world: World) -> Predictor:
    member: Any = Member(world)
    return Predictor(primary=member, scorer=WorldScorer(world), route=member)


def question(number: int) -> Question:
    return Question(example_id=str(number), question=f"number {number}?")


async def calibrated(world: World, rng: np.random.Generator, *, whole: bool) -> float | None:
    """The threshold; the first of the confidences are taken as the predictor had them, to see that they are the same."""
    predictor = predictor_of(world)
    for number in range(3):
        found = await predictor.both_stages(question(number))
        first = math.nan if found.draft_confidence is None else found.draft_confidence
        assert (first, found.final_confidence) == pytest.approx((world.draft[number], world.final[number]), nan_ok=True)
    losses = [(rng.random(CALIBRATION) < world.wrong).astype(float) for _ in range(2)]
    if whole:
        return cascade_threshold(world.draft, losses[0], world.final, losses[1], RISK, DELTA, grid=GRID).value
    scored = ~np.isnan(world.draft)
    return learn_then_test(world.draft[scored], losses[0][scored], RISK, DELTA, grid=GRID).value


async def in_use(world: World, policy: Policy, threshold: float | None) -> float:
    """True risk of the policy, 0 if it answers nothing; the predictor decides on the first questions as the replay does."""
    if threshold is None:
        return 0.0
    accepted, risk = replay(world.draft, world.wrong, world.final, world.wrong, [threshold])
    predictor = predictor_of(world)
    for number in range(IN_USE):
        found: Prediction = await predictor.predict(question(number), policy=policy)
        assert (found.decision == "answer") == bool(accepted[0, number])
        stage = "draft" if world.draft[number] >= threshold else "final"
        assert found.answer == (f"{stage} {number}" if accepted[0, number] else None)
    return float(risk.sum() / max(accepted.sum(), 1))


@pytest.mark.parametrize("whole", [True, False], ids=["whole cascade", "drafts alone"])
def test_the_promise_holds_for_what_the_predictor_gives_and_only_if_the_whole_cascade_was_calibrated(
    *, whole: bool
) -> None:
    async def run() -> list[float]:
        rng = np.random.default_rng(7)
        risks = []
        for _ in range(DRAWS):
            threshold = await calibrated(World.draw(rng, CALIBRATION), rng, whole=whole)
            policy = policy_for(threshold, route=Member.fingerprint, auxiliaries=Member.auxiliaries, target_risk=RISK)
            risks.append(await in_use(World.draw(rng, FRESH), policy, threshold))
        return risks

    risks = asyncio.run(run())
    violations = float(np.mean([risk > RISK for risk in risks]))
    assert (violations <= ALLOWED) == whole, violations
    assert np.mean([risk > 0 for risk in risks]) > 0.5

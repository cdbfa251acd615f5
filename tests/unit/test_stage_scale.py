"""Both stages of a cascade on one scale: what it is, that it never reorders a stage, what it is for, and where it acts."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from stitch_ray.config.calibrate import CalibrateConfig
from stitch_ray.ensemble.predictor import Predictor
from stitch_ray.ensemble.types import Answer, Prediction, Question, Refined
from stitch_ray.errors import UserError
from stitch_ray.reliability.cascade import replay
from stitch_ray.reliability.policy import Fingerprints, Policy
from stitch_ray.reliability.probability import Platt
from stitch_ray.reliability.risk.promises import calibrate
from stitch_ray.reliability.risk.questions import Floats, Material, Questions
from stitch_ray.reliability.risk.scaling import on_one_scale
from stitch_ray.reliability.stage_scale import LEAST_LABELS, StageScale
from tests.scripted import policy_for

pytestmark = pytest.mark.numeric

RISK, DELTA, DRAWS = 0.1, 0.1, 100
ALLOWED = DELTA + 3 * math.sqrt(DELTA * (1 - DELTA) / DRAWS)
SCALE = StageScale(draft=Platt(1.0, 0.0), refined=Platt(0.2, 2.0))


def test_a_stage_of_confidences_that_are_probabilities_stays_as_it_is_and_another_becomes_one() -> None:
    rng = np.random.default_rng(0)
    odds = rng.normal(0, 2, 20_000)
    right = rng.random(len(odds)) < expit(odds)
    after = rng.random(len(odds)) < expit(2.5 + 0.3 * odds)
    scale = StageScale.fit(expit(odds), 1 - right, expit(odds), 1.0 - after)
    assert scale is not None
    assert (scale.draft.slope, scale.draft.intercept) == pytest.approx((1, 0), abs=0.05)
    assert (scale.refined.slope, scale.refined.intercept) == pytest.approx((0.3, 2.5), abs=0.08)


@given(
    scores=st.lists(st.floats(0, 1) | st.just(math.nan), min_size=2, max_size=20),
    slope=st.floats(0, 5),
    intercept=st.floats(-5, 5),
)
def test_within_a_stage_no_two_answers_change_places(scores: list[float], slope: float, intercept: float) -> None:
    scale = StageScale(draft=Platt(1.0, 0.0), refined=Platt(slope, intercept))
    made = scale.apply(scores, "refined")
    assert np.isnan(made).tolist() == [math.isnan(score) for score in scores]
    kept = [(score, value) for score, value in zip(scores, made.tolist(), strict=True) if not math.isnan(score)]
    assert all(0 <= value <= 1 for _, value in kept)
    values = [value for _, value in sorted(kept)]
    assert values == sorted(values)
    assert [scale.confidence(score, "refined") for score, _ in kept] == [value for _, value in kept]


def test_what_is_unscored_stays_so() -> None:
    assert SCALE.confidence(None, "refined") is None
    assert SCALE.confidence(math.nan, "draft") is None


@pytest.mark.parametrize("stage", [0, 2], ids=["draft", "refined"])
def test_too_few_answers_with_score_and_label_are_not_fitted_to(stage: int) -> None:
    columns: list[Any] = [np.full(LEAST_LABELS, 0.5), np.zeros(LEAST_LABELS)] * 2
    assert StageScale.fit(*columns) is not None
    columns[stage] = np.where(np.arange(LEAST_LABELS) == 0, np.nan, columns[stage])
    assert StageScale.fit(*columns) is None


def test_scores_that_are_no_probabilities_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        StageScale.fit([1.5] * 40, [0.0] * 40, [0.5] * 40, [0.0] * 40)


def test_it_stands_in_the_file_of_the_policy_and_in_its_version(tmp_path: Path) -> None:
    bare = policy_for(0.8, route="dialogue:1", auxiliaries=("a", "b"))
    made = Policy(bare.targets, bare.fingerprints, bare.created_from, SCALE)
    made.save(tmp_path / "policy.json")
    assert Policy.load(tmp_path) == made
    assert made.version != bare.version
    assert made.confidence(0.5, "draft") == 0.5
    assert made.confidence(0.5, "refined") == pytest.approx(expit(2.0))
    assert bare.confidence(0.5, "refined") == 0.5
    text = (tmp_path / "policy.json").read_text()
    (tmp_path / "policy.json").write_text(text.replace('"intercept": 2.0', '"intercept": 3.0'))
    with pytest.raises(UserError, match="changed after it was calibrated"):
        Policy.load(tmp_path)


# What it is for: refined answers are mostly right, and the scorer, which learned from drafts, trusts them less.


def draw(rng: np.random.Generator, n: int) -> tuple[Questions, Floats, Floats]:
    """Questions, and the true probabilities that draft and refined answer are wrong."""
    odds = rng.normal(0, 2, n)
    wrong = (1 - expit(odds), 1 - expit(3 + 0.5 * odds))
    losses = [(rng.random(n) < risk).astype(float) for risk in wrong]
    draft, final = expit(odds + rng.normal(0, 1, n)), expit(odds - 1 + rng.normal(0, 1, n))
    return Questions(np.full(n, None, object), draft, losses[0], final, losses[1]), *wrong


def material(rng: np.random.Generator, isotonic: int = 300) -> Material:
    parts = [draw(rng, n)[0] for n in (isotonic, 600, 10)]
    return Material(*parts, Fingerprints(route="dialogue"), {}, 0, 0, {}, ())


def config(scale: str = "platt") -> CalibrateConfig:
    return CalibrateConfig(predictions=["unread"], route="dialogue", scale=scale)  # type: ignore[call-arg,arg-type]


def outcome(rng: np.random.Generator, scale: str) -> tuple[float, float]:
    """True risk and coverage on fresh questions."""
    given, found, _ = on_one_scale(material(rng), config(scale))
    ((target,), _) = calibrate(given, config(scale))
    if target.threshold is None:
        return 0.0, 0.0
    fresh, draft_risk, final_risk = draw(rng, 2000)
    assert fresh.final is not None
    draft, final = fresh.draft, fresh.final
    if found is not None:
        draft, final = found.apply(draft, "draft"), found.apply(final, "refined")
    accepted, risk = replay(draft, draft_risk, final, final_risk, [target.threshold])
    return float(risk.sum() / max(accepted.sum(), 1)), float(accepted.mean())


def test_the_promise_is_kept_and_far_more_is_answered_than_with_scores_as_they_are() -> None:
    rng = np.random.default_rng(3)
    scaled = np.array([outcome(rng, "platt") for _ in range(DRAWS)])
    plain = np.array([outcome(rng, "none") for _ in range(20)])
    assert (scaled[:, 0] > RISK).mean() <= ALLOWED
    assert scaled[:, 1].mean() > 0.85
    assert plain[:, 1].mean() < 0.3


def test_it_is_fitted_on_the_isotonic_split_alone_and_the_labels_of_the_others_do_not_matter() -> None:
    seen = material(np.random.default_rng(4))
    _, scale, notes = on_one_scale(seen, config())
    turned = Questions(
        seen.calibrate.tasks, seen.calibrate.draft, 1 - seen.calibrate.draft_loss,
        seen.calibrate.final, np.ones(len(seen.calibrate)),
    )  # fmt: skip
    other = Material(seen.isotonic, turned, turned, seen.fingerprints, {}, 0, 0, {}, ())
    assert on_one_scale(other, config())[1] == scale
    assert scale is not None
    assert "300 refined answers 9" in notes[0]


@pytest.mark.parametrize(
    ("given", "asked", "told"),
    [
        (lambda rng: material(rng, 20), "platt", "takes 30 labelled"),
        (material, "none", None),
    ],
    ids=["few labels", "none asked for"],
)
def test_without_it_scores_stay_as_they_are_and_a_note_says_why(given: Any, asked: str, told: str | None) -> None:
    seen = given(np.random.default_rng(5))
    same, scale, notes = on_one_scale(seen, config(asked))
    assert same is seen
    assert scale is None
    assert (notes == []) if told is None else (told in notes[0])


def test_scores_beyond_probabilities_are_left_alone_with_a_note() -> None:
    seen = material(np.random.default_rng(6))
    high = Questions(seen.test.tasks, seen.test.draft + 1, seen.test.draft_loss, seen.test.final, seen.test.final_loss)
    odd = Material(seen.isotonic, seen.calibrate, high, seen.fingerprints, {}, 0, 0, {}, ())
    assert on_one_scale(odd, config())[:2] == (odd, None)


# Where it acts: in the predictor, on either stage, wherever a policy decides.


class Members:
    """A primary, a route that says `better` (or keeps the draft), and a scorer of .5 for everything."""

    fingerprint, name, auxiliaries = "dialogue:1", "dialogue", ("a", "b")

    def __init__(self, *, keeps: bool) -> None:
        self._refined = "draft" if keeps else "better"

    async def answer(self, question: Question) -> Answer:
        return Answer(text="draft")

    async def signals(self, question: Question, text: str, samples: Any) -> Answer:
        return Answer(text=text)

    async def refine(self, question: Question, draft: Answer, budget: Any) -> Any:
        yield Refined(text=self._refined, calls=0, tokens=0, changed_by=None)


class Halves:
    fingerprint, signals = "scorer", frozenset[str]()

    async def score(self, question: Question, text: str, signals: Any) -> float | None:
        return 0.5


def predicted(*, keeps: bool, policy: Policy | None) -> Prediction:
    members: Any = Members(keeps=keeps)
    predictor = Predictor(primary=members, scorer=Halves(), route=members)
    asked = Question(example_id="1", question="which?")
    if policy is None:
        return asyncio.run(predictor.both_stages(asked))
    return asyncio.run(predictor.predict(asked, policy=policy))


@pytest.mark.parametrize("keeps", [True, False], ids=["draft kept", "draft changed"])
def test_the_predictor_decides_by_confidences_and_calibration_sees_scores(*, keeps: bool) -> None:
    bare = policy_for(0.8, route="dialogue:1", auxiliaries=("a", "b"))
    found = predicted(keeps=keeps, policy=Policy(bare.targets, bare.fingerprints, {}, SCALE))
    sure = pytest.approx(float(expit(2.0)))
    assert (found.decision, found.reason) == ("answer", "refined")
    assert (found.draft_confidence, found.final_confidence, found.confidence) == (0.5, sure, sure)
    told = {entry["stage"]: entry["confidence"] for entry in found.trace if "confidence" in entry}
    assert told == {"score": 0.5, "rescore": sure}
    assert json.loads(json.dumps(found.to_dict()))["final_confidence"] == sure
    assert predicted(keeps=keeps, policy=bare).decision == "abstain"
    raw = predicted(keeps=keeps, policy=None)
    assert (raw.draft_confidence, raw.final_confidence) == (0.5, 0.5)

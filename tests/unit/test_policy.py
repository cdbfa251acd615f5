"""policy.json, and decisions with it: who gets which threshold, what is refused, and that replay and decision agree."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch_ray.errors import UserError
from stitch_ray.reliability.calibration import Threshold
from stitch_ray.reliability.cascade import Decision, cascade_threshold, decide, replay
from stitch_ray.reliability.policy import Fingerprints, Policy, Target, UnknownTarget

MARKS = Fingerprints(primary="p1", auxiliaries=("a1", "a2"), scorer="s1", route="dialogue")


def target(threshold: float | None, *, task: str | None = None, risk: float = 0.1, delta: float = 0.1) -> Target:
    coverage = 0.0 if threshold is None else 0.5
    found = Threshold(threshold, risk, delta, 100, int(100 * coverage), 0.05, coverage, 0.04, "learn_then_test", None)
    return Target.of(task, found)


def policy(*targets: Target, route: str = "none") -> Policy:
    marks = Fingerprints("p1", (), "s1", route)
    return Policy(targets or (target(0.7),), marks, {"work_hash": "w", "loss": "error", "policy": None})


def test_the_file_has_the_default_on_top_and_is_plain_json(tmp_path: Path) -> None:
    made = Policy((target(None), target(0.4, risk=0.2)), MARKS, {"work_hash": "w"})
    made.save(tmp_path / "policy.json")
    text = (tmp_path / "policy.json").read_text()
    values = json.loads(text, parse_constant=pytest.fail)
    assert values["default"] == {
        "threshold": None,
        "target_risk": 0.1,
        "delta": 0.1,
        "n_calibration": 100,
        "empirical_risk": 0.05,
        "coverage": 0.0,
        "scorer": "s1",
        "created_from": {"work_hash": "w"},
    }
    assert {key: values[key] for key in values["default"]} == values["default"]
    assert values["fingerprints"] == {"primary": "p1", "auxiliaries": ["a1", "a2"], "scorer": "s1", "route": "dialogue"}
    assert [(t["task"], t["target_risk"], t["threshold"]) for t in values["targets"]] == [
        (None, 0.1, None),
        (None, 0.2, 0.4),
    ]
    assert values["joint_delta"] == 0.2
    assert Policy.load(tmp_path / "policy.json") == Policy.load(tmp_path) == made


def test_the_version_is_the_content(tmp_path: Path) -> None:
    assert policy().version == policy().version
    assert len({policy().version, policy(target(0.71)).version, policy(target(0.7, delta=0.05)).version}) == 3
    assert policy(route="revise").version != policy().version
    policy().save(tmp_path / "policy.json")
    text = (tmp_path / "policy.json").read_text()
    assert json.loads(text)["version"] == policy().version


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"threshold": 0.7', '"threshold": 0.1', "changed after it was calibrated"),
        ('"version"', '"v"', "no policy.json"),
        ('"targets"', '"goals"', "no policy.json"),
        ("{", "", "no policy.json"),
    ],
)
def test_a_policy_that_was_edited_or_is_none_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "policy.json"
    policy().save(file)
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=message):
        Policy.load(file)
    with pytest.raises(UserError, match="cannot read"):
        Policy.load(tmp_path / "elsewhere.json")


def test_an_answer_is_given_from_the_threshold_on_and_an_unscored_one_never() -> None:
    given = [c for c in (None, math.nan, 0.0, 0.69, 0.7, 1.0) if policy().accepts(c, stage="draft")]
    assert given == [0.7, 1.0]
    assert not policy(target(0.0)).accepts(math.nan, stage="draft")
    assert not policy(target(None)).accepts(1.0, stage="draft")


def test_a_task_with_promises_of_its_own_uses_only_those() -> None:
    both = policy(target(0.7), target(0.5, risk=0.2), target(0.9, task="law"))
    assert both.target().threshold == 0.7
    assert both.target("law").threshold == 0.9
    assert both.target("other", 0.2).threshold == 0.5
    assert both.target(None, 0.1 + 1e-12).threshold == 0.7
    with pytest.raises(UnknownTarget, match=r"task 'law' and a risk of 0\.2; calibrated are 0\.1 for task 'law'"):
        both.target("law", 0.2)
    with pytest.raises(UnknownTarget, match=r"calibrated are 0\.1, 0\.2"):
        both.accepts(1.0, stage="draft", target_risk=0.01)
    with pytest.raises(UnknownTarget, match="without task"):
        policy(target(0.7, task="law")).target()


def test_joint_promises_add_up() -> None:
    m = [target(0.7, risk=r, delta=0.1 / 4) for r in (0.05, 0.1, 0.2, 0.3)]
    assert policy(*m).joint_delta == pytest.approx(0.1)
    assert policy(*[target(0.7, risk=r, delta=0.6) for r in (0.1, 0.2)]).joint_delta == 1.0


def test_what_changed_since_calibration_is_refused_by_name() -> None:
    made = Policy((target(0.7),), MARKS, {})
    same = {"primary": "p1", "auxiliaries": ["a1", "a2"], "scorer": "s1", "route": "dialogue"}
    assert made.check_fingerprints(**same) == []
    for name, value, shown in (
        ("primary", "p2", "primary is p2, was p1"),
        ("auxiliaries", ["a2"], "auxiliaries is a2, was a1, a2"),
        ("scorer", None, "scorer is not given, was s1"),
        ("route", "none", "route is none, was dialogue"),
    ):
        with pytest.raises(UserError, match=shown):
            made.check_fingerprints(**{**same, name: value})
    assert made.check_fingerprints(**{**same, "route": "dialogue:12ab"}) == ["route"]
    exact = Policy((target(0.7),), Fingerprints("p1", ("a1", "a2"), "s1", "dialogue:12ab"), {})
    with pytest.raises(UserError, match="route is dialogue:34cd, was dialogue:12ab"):
        exact.check_fingerprints(**{**same, "route": "dialogue:34cd"})


def test_what_the_calibration_data_did_not_tell_is_reported_not_assumed() -> None:
    made = Policy((target(0.7),), Fingerprints(), {})
    assert made.check_fingerprints(primary="p", auxiliaries=(), scorer="s") == ["primary", "auxiliaries", "scorer"]


def test_decisions_of_one_stage() -> None:
    one = policy()
    assert decide(one, draft=0.7, has_route=False) == Decision("answer", "draft", 0.7, "confident")
    assert decide(one, draft=0.69, has_route=False) == Decision("abstain", "draft", 0.69, "unsure")
    for unscored in (None, math.nan):
        assert decide(one, draft=unscored, has_route=False) == Decision("abstain", "draft", None, "scorer_unavailable")


def test_decisions_of_a_cascade() -> None:
    two = policy(route="dialogue")
    assert decide(two, draft=0.7, has_route=True) == Decision("answer", "draft", 0.7, "confident")
    assert decide(two, draft=0.6, has_route=True) == Decision("escalate", "draft", 0.6, "unsure")
    assert decide(two, draft=None, has_route=True) == Decision("escalate", "draft", None, "scorer_unavailable")
    assert decide(two, draft=0.6, final=0.7, has_route=True) == Decision("answer", "refined", 0.7, "refined")
    assert decide(two, draft=0.6, final=0.6, has_route=True) == Decision("abstain", "refined", 0.6, "unsure")
    assert decide(two, draft=0.6, final=math.nan, has_route=True) == Decision(
        "abstain", "refined", None, "scorer_unavailable"
    )
    never = policy(target(None), route="dialogue")
    assert decide(never, draft=0.99, has_route=True) == Decision("abstain", "draft", 0.99, "unsure")


def test_a_threshold_of_one_stage_is_refused_for_two_and_the_other_way_round() -> None:
    with pytest.raises(ValueError, match="without one"):
        decide(policy(), draft=0.9, has_route=True)
    with pytest.raises(ValueError, match="with one"):
        decide(policy(route="dialogue"), draft=0.9, has_route=False)
    with pytest.raises(ValueError, match="one stage"):
        policy().accepts(0.9, stage="refined")
    with pytest.raises(ValueError, match="nothing to refine"):
        decide(policy(route="dialogue"), draft=0.9, final=0.9, has_route=True)
    with pytest.raises(ValueError, match="needs a route"):
        decide(policy(), draft=0.1, final=0.9, has_route=False)


@given(st.integers(0, 2**32 - 1))
def test_replay_does_what_decide_does(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = 12
    draft, final = np.round(rng.random((2, n)), 1)
    draft[rng.random(n) < 0.2] = final[rng.random(n) < 0.2] = np.nan
    draft_loss, final_loss = rng.integers(0, 2, (2, n)).astype(float)
    thresholds = np.round(np.sort(rng.random(4))[::-1], 1)
    accepted, losses = replay(draft, draft_loss, final, final_loss, thresholds)
    for row, threshold in enumerate(thresholds):
        two = policy(target(float(threshold)), route="dialogue")
        for i in range(n):
            taken = decide(two, draft=draft[i], has_route=True)
            if taken.action == "escalate":
                taken = decide(two, draft=draft[i], final=final[i], has_route=True)
            assert accepted[row, i] == (taken.action == "answer")
            if taken.action == "answer":
                assert losses[row, i] == (draft_loss if taken.stage == "draft" else final_loss)[i]
            else:
                assert losses[row, i] == 0


def test_a_cascade_that_only_repeats_its_draft_has_the_threshold_of_the_draft() -> None:
    from stitch_ray.reliability.calibration import learn_then_test

    rng = np.random.default_rng(0)
    c = rng.beta(1.2, 0.5, 500)
    wrong = (rng.random(500) > c).astype(float)
    grid = np.arange(100) / 100
    assert cascade_threshold(c, wrong, c, wrong, 0.1, 0.1, grid=grid) == learn_then_test(c, wrong, 0.1, 0.1, grid=grid)

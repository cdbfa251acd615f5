"""The risk monitor: rarely wrong however often it is looked at, and not late when the risk has doubled."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch_ray.reliability.monitor import Bettor, RiskMonitor

DRAWS = 150


def alarms(risk: float, true_risk: float, labels: int, seed: int) -> np.ndarray:
    """Label of the first alarm in every draw, inf without one."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(DRAWS):
        monitor = RiskMonitor(risk)
        for loss in (rng.random(labels) < true_risk).tolist():
            monitor = monitor.update(loss)
            if monitor.alarm:
                break
        found.append(monitor.alarm_at or math.inf)
    return np.array(found)


def test_false_alarms_stay_below_alpha_after_a_look_at_every_label() -> None:
    """At a risk that is exactly the promised one, the worst case that the promise allows."""
    share = float(np.isfinite(alarms(0.1, 0.1, 1000, seed=0)).mean())
    assert share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / DRAWS)


def test_twice_the_promised_risk_is_noticed_within_some_hundred_labels() -> None:
    first = alarms(0.1, 0.2, 600, seed=1)
    assert np.median(first) < 150
    assert np.isfinite(first).mean() > 0.95


def test_a_change_after_a_long_good_time_is_noticed() -> None:
    """The mean over all labels is below the promised risk when the alarm comes: it is the recent ones that tell."""
    rng = np.random.default_rng(2)
    found = []
    for _ in range(20):
        losses = np.r_[rng.random(1000) < 0.05, rng.random(400) < 0.2].astype(float)
        monitor, _ = RiskMonitor(0.1).follow(losses)
        found.append((monitor.alarm_at or math.inf) - 1000)
    assert min(found) > 0
    assert np.median(found) < 300


@given(st.lists(st.floats(0, 1), max_size=60), st.floats(0.01, 0.99))
def test_a_bet_knows_only_the_past_and_never_loses_everything(losses: list[float], risk: float) -> None:
    monitor = RiskMonitor(risk)
    for loss in losses:
        for bettor in monitor.bettors:
            stake = bettor.bet(risk)
            assert stake >= 0
            assert stake * risk < 1
        monitor = monitor.update(loss)
        assert monitor.wealth > 0
    # In expectation no bet gains at the promised risk: (1 - r) * (1 - stake r) + r * (1 + stake (1 - r)) = 1.
    for bettor in monitor.bettors:
        stake = bettor.bet(risk)
        assert (1 - risk) * (1 - stake * risk) + risk * (1 + stake * (1 - risk)) == pytest.approx(1)


def test_right_answers_cost_no_wealth_and_wrong_ones_raise_the_alarm() -> None:
    monitor, wealth = RiskMonitor(0.1).follow([0.0] * 50)
    assert wealth == [1.0] * 50
    monitor, wealth = monitor.follow([1.0] * 20)
    assert monitor.alarm
    assert monitor.alarm_at == 51 + next(i for i, value in enumerate(wealth) if value >= 20)
    later, _ = monitor.follow([0.0] * 500)
    assert later.alarm_at == monitor.alarm_at
    _, wealth = RiskMonitor(0.01).follow([1.0] * 500)
    assert math.isfinite(wealth[-1])


def test_the_state_goes_through_json() -> None:
    monitor, _ = RiskMonitor(0.1).follow([0, 1, 0, 0.5] * 10)
    again = RiskMonitor.from_dict(json.loads(json.dumps(monitor.to_dict(), allow_nan=False)))
    assert again == monitor
    assert again.update(1.0) == monitor.update(1.0)


def test_what_is_no_loss_is_refused() -> None:
    for loss in (math.nan, -0.1, 1.1):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            RiskMonitor(0.1).update(loss)
    with pytest.raises(ValueError, match="between 0 and 1"):
        RiskMonitor(0.0)
    assert Bettor(50.0).bet(0.1) == 0.0

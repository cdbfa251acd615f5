"""The order of an epoch: every example once, or tasks in given shares, evenly interleaved."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch_ray.config.finetune import MixingConfig
from stitch_ray.training.mixing import epoch_order, shuffle, spread

BLEND = json.loads((Path(__file__).parents[1] / "golden" / "stitch.json").read_text())["blend"]


def tasks_of(*sizes):
    """Rows of the tasks, mixed up."""
    ids = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    return ids[shuffle(len(ids), 99)]


def draws(ids, order, task):
    return [int(row) for row in order if ids[row] == task]


@pytest.mark.parametrize("weights", BLEND)
def test_the_shares_are_those_of_the_published_order(weights):
    """Golden orders made with MFTCoder's blending rule; ours differs in when, not in how often, a task comes."""
    sizes = [int(weight) for weight in weights.split(",")]
    assert np.bincount(BLEND[weights]).tolist() == np.bincount(spread(sizes)).tolist() == sizes


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6))
def test_spread_takes_every_draw_and_never_strays_from_the_shares(counts):
    order = spread(counts)
    assert np.bincount(order, minlength=len(counts)).tolist() == counts
    taken = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)
    due = np.arange(1, len(order) + 1)[:, None] * np.asarray(counts) / max(1, len(order))
    assert len(order) == 0 or np.abs(taken - due).max() <= max(1, len(counts) / 2)


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_proportional_takes_every_row_once(epoch):
    ids = tasks_of(50, 7, 200)
    assert sorted(epoch_order(ids, MixingConfig(), 0, epoch)) == list(range(257))


def test_proportional_interleaves_tasks_evenly():
    ids = tasks_of(100, 300, 600)
    order = epoch_order(ids, MixingConfig(), 3, 0)
    for part in np.split(ids[order], 20):
        np.testing.assert_allclose(np.bincount(part, minlength=3), [5, 15, 30], atol=1)


def test_order_depends_on_seed_and_epoch_and_on_nothing_else():
    ids = tasks_of(40, 60)
    orders = {(s, e): tuple(epoch_order(ids, MixingConfig(), s, e)) for s in (0, 1) for e in (0, 1)}
    assert len(set(orders.values())) == 4
    np.random.default_rng(7).random(10)
    np.random.seed(7)
    assert tuple(epoch_order(ids, MixingConfig(), 1, 1)) == orders[1, 1]


def test_a_task_keeps_its_order_whatever_the_others_are():
    """So that adding a task does not reshuffle the rest."""
    few, many = tasks_of(30), np.concatenate((tasks_of(30), np.full(50, 1, np.int32)))
    alone, beside = (epoch_order(ids, MixingConfig(), 0, 2) for ids in (few, many))
    assert draws(few, alone, 0) == draws(many, beside, 0)


def test_shuffles_are_the_same_on_every_machine():
    """Raw PCG64 output; a change here changes every run that is resumed."""
    assert shuffle(8, 1, 2, 3).tolist() == [1, 3, 7, 5, 2, 0, 4, 6]


@pytest.mark.parametrize(
    ("mixing", "shares"),
    [
        (MixingConfig(weights=[1, 1, 2]), [0.25, 0.25, 0.5]),
        (MixingConfig(temperature=2), np.sqrt([400, 90, 10]) / np.sqrt([400, 90, 10]).sum()),
        (MixingConfig(temperature=1e9), [1 / 3] * 3),
        (MixingConfig(temperature=1e-3), [1, 0, 0]),
    ],
)
def test_tasks_are_drawn_in_their_shares(mixing, shares):
    ids = tasks_of(400, 90, 10)
    order = epoch_order(ids, mixing, 0, 0)
    assert len(order) == 500
    np.testing.assert_allclose(np.bincount(ids[order], minlength=3) / 500, shares, atol=1 / 500)


def test_a_row_comes_back_only_after_all_of_its_task_also_across_epochs():
    ids = tasks_of(70, 9)
    walks = {0: [], 1: []}
    for epoch in range(6):
        order = epoch_order(ids, MixingConfig(weights=[1, 1]), 5, epoch)
        for task, walk in walks.items():
            walk.extend(draws(ids, order, task))
    for task, walk in walks.items():
        size = int((ids == task).sum())
        rounds = [walk[i : i + size] for i in range(0, len(walk) - size + 1, size)]
        assert len(rounds) > 2
        assert all(len(set(one)) == size for one in rounds)
        assert rounds[0] != rounds[1]


@pytest.mark.parametrize("mixing", [MixingConfig(), MixingConfig(weights=[1, 5, 1]), MixingConfig(temperature=3)])
def test_a_task_without_rows_is_left_out(mixing):
    ids = np.array([0, 2, 2, 0, 2, 0], np.int32)
    assert sorted(ids[epoch_order(ids, mixing, 0, 0)]) == [0, 0, 0, 2, 2, 2]

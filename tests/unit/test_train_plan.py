"""Steps of training are a pure function of the data and the seed."""

import pickle
from itertools import chain

import numpy as np
import pytest

from stitch_ray.config.finetune import MixingConfig
from stitch_ray.errors import UserError
from stitch_ray.training import plan
from stitch_ray.training.packing import utilisation
from stitch_ray.training.plan import plan_epoch, plan_steps, plan_validation

RNG = np.random.default_rng(0)
LENGTHS = np.clip(RNG.lognormal(3.5, 0.7, 500), 2, 200).astype(np.int32)
TASKS = RNG.choice(3, 500, p=[0.6, 0.3, 0.1]).astype(np.int32)
KINDS = {
    "packed_tokens": {"packing": True, "batch_tokens": 256, "batch_examples": None},
    "packed_examples": {"packing": True, "batch_tokens": None, "batch_examples": 6},
    "padded_tokens": {"packing": False, "batch_tokens": 256, "batch_examples": None},
    "padded_examples": {"packing": False, "batch_tokens": None, "batch_examples": 6},
}
COMMON = {"seed": 1, "mixing": MixingConfig(), "micro_batches": 4}


def epoch_of(kind, epoch=0, lengths=LENGTHS, tasks=TASKS, **other):
    return plan_epoch(lengths, tasks, epoch=epoch, **{**COMMON, **KINDS[kind], **other})


def micro_batches(steps):
    return list(chain.from_iterable(steps))


def rows_of(steps):
    return sorted(chain.from_iterable(micro_batches(steps)))


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_trains_every_row_once_in_full_steps(kind):
    steps = epoch_of(kind)
    assert rows_of(steps) == list(range(500))
    assert {len(step) for step in steps[:-1]} == {4}
    assert 1 <= len(steps[-1]) <= 4
    assert all(micro_batches(steps))
    assert all(type(row) is int for batch in micro_batches(steps) for row in batch)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_keep_their_budget(kind):
    batches = micro_batches(epoch_of(kind))
    if kind.endswith("examples"):
        assert {len(batch) for batch in batches[:-1]} == {6}
        return
    sizes = [LENGTHS[list(batch)] for batch in batches]
    cost = [size.sum() if kind == "packed_tokens" else len(size) * size.max() for size in sizes]
    assert max(cost) <= 256
    assert np.mean(cost) > 0.7 * 256


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_and_epoch_give_the_same_steps(kind):
    assert epoch_of(kind) == epoch_of(kind)
    assert epoch_of(kind) != epoch_of(kind, seed=2)
    assert epoch_of(kind) != epoch_of(kind, epoch=1)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_do_not_depend_on_how_micro_batches_make_them(kind):
    assert micro_batches(epoch_of(kind, micro_batches=1)) == micro_batches(epoch_of(kind, micro_batches=7))


def test_padded_examples_keep_the_order_of_the_epoch_and_packed_ones_are_the_same():
    assert epoch_of("padded_examples") == epoch_of("packed_examples")


def test_packed_steps_mix_tasks_and_lengths():
    """Best fit alone would put the long examples first and the short ones last."""
    steps = epoch_of("packed_tokens", micro_batches=8)
    means = [np.mean([LENGTHS[list(batch)].mean() for batch in step]) for step in steps[:-1]]
    assert max(means) < 2.5 * min(means)
    first = np.mean(means[: len(means) // 2]) / np.mean(means[len(means) // 2 :])
    assert 0.7 < first < 1.4
    shares = np.array([np.bincount(TASKS[list(chain.from_iterable(step))], minlength=3) for step in steps[:-1]])
    assert (shares[:, :2] > 0).all()


def test_windows_are_of_equal_size_and_pack_well(monkeypatch):
    monkeypatch.setattr(plan, "PACKING_WINDOW", 240)  # 500 rows: three windows of 167, not 240 + 240 + 20
    batches = micro_batches(epoch_of("packed_tokens"))
    assert sorted(chain.from_iterable(batches)) == list(range(500))
    assert utilisation(batches, LENGTHS, 256) > 0.95


def test_an_example_longer_than_a_row():
    long = np.array([10, 300, 20], np.int32)
    with pytest.raises(ValueError, match="300 tokens"):
        epoch_of("packed_tokens", lengths=long, tasks=TASKS[:3])
    batches = micro_batches(epoch_of("padded_tokens", lengths=long, tasks=TASKS[:3]))
    assert (1,) in batches
    assert rows_of([batches]) == [0, 1, 2]


def run_of(kind="packed_tokens", **other):
    return plan_steps(LENGTHS, TASKS, **{**COMMON, **KINDS[kind], **other})


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_its_epochs_one_after_another(kind):
    run = run_of(kind, epochs=3)
    expected = [step for epoch in range(3) for step in epoch_of(kind, epoch)]
    assert run.total_steps == len(expected)
    assert [run.step(i) for i in range(run.total_steps)] == expected


def test_a_part_of_an_epoch_is_rounded_up():
    steps = [len(epoch_of("packed_tokens", epoch)) for epoch in range(3)]
    assert run_of(epochs=0.001).total_steps == 1
    assert run_of(epochs=0.5).total_steps == -(-steps[0] // 2)
    assert run_of(epochs=2.5).total_steps == steps[0] + steps[1] + -(-steps[2] // 2)
    ten = plan_steps(LENGTHS[:60], TASKS[:60], **{**COMMON, **KINDS["padded_examples"], "micro_batches": 1}, epochs=1.1)
    assert ten.total_steps == 11


def test_max_steps_takes_as_many_epochs_as_it_needs():
    run, steps = run_of(max_steps=40), len(epoch_of("packed_tokens"))
    assert run.total_steps == 40
    assert run.step(39) == epoch_of("packed_tokens", 39 // steps)[39 % steps]
    assert run.epoch(0) == 0
    assert run.epoch(steps) == 1
    assert run.epoch(steps + 1) == 1 + 1 / steps


def test_steps_may_be_asked_in_any_order():
    """As after a restart, in another process."""
    run = run_of(epochs=4)
    expected = [run.step(i) for i in range(run.total_steps)]
    again = pickle.loads(pickle.dumps(run_of(epochs=4)))
    for i in (run.total_steps - 1, 0, run.total_steps // 2, 1):
        assert again.step(i) == expected[i]


@pytest.mark.parametrize("i", [-1, 5])
def test_there_is_no_step_outside_the_run(i):
    with pytest.raises(IndexError, match=f"step {i} of 5"):
        run_of(max_steps=5).step(i)


def test_epochs_with_drawn_tasks_have_as_many_examples():
    run = run_of("padded_examples", epochs=2, mixing=MixingConfig(weights=[1, 1, 1]))
    rows = list(chain.from_iterable(chain.from_iterable(run.step(i) for i in range(run.total_steps))))
    assert len(rows) == 1000
    np.testing.assert_allclose(np.bincount(TASKS[rows]), 1000 / 3, atol=2)


def test_a_run_without_examples_is_refused():
    with pytest.raises(UserError, match="no example is left"):
        plan_steps(LENGTHS[:0], TASKS[:0], **COMMON, **KINDS["packed_tokens"], max_steps=3)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_reads_every_row_once(kind):
    batches = plan_validation(LENGTHS, **KINDS[kind])
    assert sorted(chain.from_iterable(batches)) == list(range(500))
    assert plan_validation(LENGTHS[:0], **KINDS[kind]) == []


def test_padded_validation_wastes_little():
    batches = plan_validation(LENGTHS, **KINDS["padded_tokens"])
    cost = sum(len(batch) * LENGTHS[list(batch)].max() for batch in batches)
    assert LENGTHS.sum() / cost > 0.9

"""CoBa: MFTCoder's weights where it works, sensible weights where it fails."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch_ray.training.coba import CoBa

pytestmark = pytest.mark.numeric

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "stitch.json").read_text())["coba"]
FIRST_LOSSES = np.array([2.0, 0.5, 3.0])


def curves(step: int) -> np.ndarray:
    """Losses of the golden run."""
    return FIRST_LOSSES * [0.2 + 0.8 * np.exp(-step / 5), 1 - 0.01 * step, 0.6 + 0.0015 * (step - 14) ** 2]


def lines(step: int) -> np.ndarray:
    """Losses on straight lines, where a slope is the same over any window; the last task is always the worst."""
    return FIRST_LOSSES * [1 - 0.02 * step, 1 - 0.01 * step, 1 - 0.002 * step]


def golden_coba(**changes: int) -> CoBa:
    coba = CoBa(3, **({"warmup": 5, "history": 10, "tau": 5, "interval": 1} | changes))  # type: ignore[arg-type]
    coba.start(FIRST_LOSSES)
    return coba


def test_golden_weights() -> None:
    coba = golden_coba()
    weights = {step + 1: coba.update(step, curves(step)) for step in range(1, 30)}
    for number, expected in GOLDEN["weights"].items():
        np.testing.assert_allclose(weights[int(number)], expected, atol=1e-6)
    for number in range(2, 5):
        np.testing.assert_allclose(weights[number], 1 / 3)


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("cut", [0, 2, 4, 5, 11, 25])
def test_resumed_run_has_exactly_the_same_weights(cut: int, interval: int) -> None:
    def losses(step: int) -> list[float | None]:
        return [None if (step + task) % 4 == 0 else float(loss) for task, loss in enumerate(curves(step))]

    whole = golden_coba(interval=interval)
    first = golden_coba(interval=interval)
    for step in range(1, cut + 1):
        whole.update(step, losses(step))
        first.update(step, losses(step))
    resumed = CoBa(3, warmup=5, history=10, tau=5, interval=interval)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert resumed.weights.tolist() == whole.weights.tolist()
    for step in range(cut + 1, 40):
        assert resumed.update(step, losses(step)).tolist() == whole.update(step, losses(step)).tolist()
    assert resumed.state_dict() == whole.state_dict()


def test_history_shorter_than_warmup_uses_only_the_history() -> None:
    first, second = golden_coba(warmup=6, history=3), golden_coba(warmup=6, history=3)
    for step in range(1, 6):
        weights = first.update(step, curves(step))
        other = second.update(step, curves(step) * (7 if step < 3 else 1))
    np.testing.assert_array_equal(weights, other)
    assert np.ptp(weights) > 0.1


def test_weights_change_every_interval_steps_after_the_warmup() -> None:
    coba = golden_coba(interval=4)
    weights = {step + 1: tuple(coba.update(step, curves(step))) for step in range(1, 20)}
    changes = [number for number in range(3, 21) if weights[number] != weights[number - 1]]
    assert changes == [5, 9, 13, 17]


def test_measuring_only_for_an_update_gives_updates() -> None:
    coba = golden_coba(interval=4)
    weights = [tuple(coba.update(step, curves(step))) for step in range(4, 40, 4)]
    assert weights[0] == (1 / 3, 1 / 3, 1 / 3)
    assert len(set(weights)) == len(weights)


def test_interval_longer_than_the_history_still_has_slopes() -> None:
    coba = golden_coba(interval=25)
    weights = [coba.update(step, lines(step)) for step in range(25, 101, 25)]
    assert all(np.ptp(w) > 0.1 for w in weights[1:])


def test_slopes_are_per_step_so_gaps_do_not_bend_a_line() -> None:
    every, some = golden_coba(), golden_coba()
    for step in range(1, 41):
        weights = every.update(step, lines(step))
        gap = step % 7 in (2, 3, 5)
        sparse = some.update(step, [None] * 3 if gap else lines(step))
    np.testing.assert_allclose(sparse, weights, atol=1e-9)


@pytest.mark.parametrize("every_steps", [5, 1000])
def test_a_task_that_is_not_measured_keeps_its_history(every_steps: int) -> None:
    """Measured rarely, or never again: then the last slope stays when the window has run empty."""
    every, some = golden_coba(), golden_coba()
    for step in range(1, 41):
        weights = every.update(step, lines(step))
        losses = lines(step)
        losses[0] = losses[0] if step < 15 or step % every_steps == 0 else np.nan
        partial = some.update(step, losses)
    np.testing.assert_allclose(partial, weights, atol=1e-9)


def test_the_worst_task_stays_the_worst_when_it_is_not_measured() -> None:
    """Else the greatest ratio would jump down and up, a slope that no task has."""
    coba = golden_coba()
    constant = FIRST_LOSSES * [0.1, 0.2, 0.9]
    for step in range(1, 30):
        coba.update(step, [*constant[:2], constant[2] if step % 2 else None])
    assert coba.state_dict()["worst_slopes"] == pytest.approx([0] * 26, abs=1e-12)


def test_a_task_without_any_validation_loss_gets_its_even_share() -> None:
    with_four = CoBa(4, warmup=5, history=10, tau=5, interval=1)
    with_four.start([*FIRST_LOSSES, None])
    with_three = golden_coba()
    for step in range(1, 20):
        four = with_four.update(step, [*curves(step), float("nan")])
        three = with_three.update(step, curves(step))
    assert four[3] == pytest.approx(1 / 4)
    np.testing.assert_allclose(four[:3], three * 3 / 4)


def test_a_task_missing_at_the_start_starts_at_its_first_loss() -> None:
    late, known = golden_coba(), golden_coba()
    late.start([2.0, None, 3.0])
    known.start([2.0, lines(1)[1], 3.0])
    for step in range(1, 20):
        np.testing.assert_array_equal(late.update(step, lines(step)), known.update(step, lines(step)))


def test_losses_that_stand_still_give_equal_weights() -> None:
    coba = golden_coba()
    for step in range(1, 20):
        np.testing.assert_allclose(coba.update(step, FIRST_LOSSES), 1 / 3)


LOSS = st.one_of(st.none(), st.sampled_from([float("nan"), 0.0]), st.floats(1e-3, 100))


@settings(deadline=None)
@given(
    st.lists(st.lists(LOSS, min_size=3, max_size=3), min_size=2, max_size=25),
    st.integers(2, 6),
    st.integers(2, 8),
    st.integers(1, 4),
)
def test_weights_are_positive_and_sum_to_one(losses: list, warmup: int, history: int, interval: int) -> None:
    coba = CoBa(3, warmup=warmup, history=history, tau=5, interval=interval)
    coba.start(losses[0])
    for step, row in enumerate(losses[1:], 1):
        weights = coba.update(step, row)
        assert weights.sum() == pytest.approx(1)
        assert weights.min() >= 1 / 30 - 1e-12

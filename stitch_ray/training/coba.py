"""CoBa: task weights that slow down tasks which converge early and pull back tasks which diverge (Gong et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class _Measurement(NamedTuple):
    step: int
    ratios: Array  # (tasks,), NaN: not measured in this step
    worst: float  # greatest ratio of any task; a task that was not measured keeps its last one


class _Slopes(NamedTuple):
    number: int  # of the optimizer step the weights were made for
    tasks: Array  # (tasks,), NaN: not known yet


class CoBa:
    """Weights of K tasks from the slopes of their validation losses L_k; arXiv 2410.06741, MFTCoder `CoBaStatus`.

    r_k = L_k(step) / L_k(0); a_k is its least-squares slope over the last `history` steps, a_max the slope of max_k r_k.

    RCS = softmax_k(K a_k / sum_j |a_j|)                                  tasks against each other, now
    ACS = softmax_k(-n a_k / sum over n earlier slopes of the task |a_k|) every task against its own past
    DF  = n softmax_i(-tau n a_max(i) / sum_i |a_max(i)|) at the last i   i: all n updates since the warm-up
    w   = softmax_k(K (DF RCS + (1 - DF) ACS)), raised to at least 1 / (10 K)

    As published: DF is not clamped to 1 and looks only at the worst ratio over all tasks. So a task that diverges is noticed
    late: until its ratio is the greatest of all, RCS even weighs it up. ACS looks back history - warmup + 1 steps.

    Unlike the published code:
    - the state can be saved, and a resumed run continues with exactly the same weights;
    - windows are counted in optimizer steps whatever `interval` is, and slopes are per step, not per measurement;
    - every combination of warmup, history and interval works; a window holds at least two entries once there are two;
    - a task that is not measured in a step keeps its history, and its last slope if the window has fewer than two of its
      losses; one without any slope gets 1/K and the others share the rest. One not measured at the start starts at its first loss;
    - slopes that are all zero give equal scores instead of NaN.

    Steps are counted as finished optimizer steps: `update(step, losses)` takes the losses after `step` of them and returns the
    weights for the next, number step + 1. The first number with weights of its own is `warmup`; an update follows when
    `interval` steps have passed since the last. Update may be called every step or only when losses were measured.
    """

    def __init__(self, num_tasks: int, *, warmup: int, history: int, tau: float, interval: int) -> None:
        self._warmup = warmup
        self._history = history
        self._tau = tau
        self._interval = interval
        self._first_losses: Array = np.full(num_tasks, np.nan)
        self._last_ratios: Array = np.full(num_tasks, np.nan)
        self._measurements: list[_Measurement] = []
        self._slopes: list[_Slopes] = []
        self._worst_slopes: list[float] = []
        self._weights: Array = np.full(num_tasks, 1 / num_tasks)

    @property
    def weights(self) -> Array:
        """(tasks,), positive, sum 1; equal until the warm-up is over."""
        return self._weights.copy()

    def start(self, losses: Sequence[float | None] | Array) -> None:
        """Take L_k(0): validation losses (tasks,) before the first step; None or not finite: not measured."""
        self._first_losses = _measured(losses)

    def update(self, step: int, losses: Sequence[float | None] | Array) -> Array:
        """Take validation losses (tasks,) after `step` >= 1 optimizer steps; return the weights (tasks,) for the next one.

        None or not finite: the task was not measured.
        """
        self._record(step, _measured(losses))
        number = step + 1
        due = not self._slopes or number - self._slopes[-1].number >= self._interval
        if number >= self._warmup and due and len(self._measurements) >= 2:
            self._record_slopes(number)
            self._weights = self._weigh()
        return self.weights

    def state_dict(self) -> dict[str, Any]:
        """Everything that `update` depends on, as JSON values; the parameters of the constructor are not in it."""
        return {
            "first_losses": _to_json(self._first_losses),
            "last_ratios": _to_json(self._last_ratios),
            "measurements": [[m.step, _to_json(m.ratios), m.worst] for m in self._measurements],
            "slopes": [[s.number, _to_json(s.tasks)] for s in self._slopes],
            "worst_slopes": list(self._worst_slopes),
            "weights": _to_json(self._weights),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._first_losses = np.array(state["first_losses"], float)
        self._last_ratios = np.array(state["last_ratios"], float)
        self._measurements = [_Measurement(step, np.array(r, float), worst) for step, r, worst in state["measurements"]]
        self._slopes = [_Slopes(number, np.array(tasks, float)) for number, tasks in state["slopes"]]
        self._worst_slopes = list(state["worst_slopes"])
        self._weights = np.array(state["weights"], float)

    def _record(self, step: int, losses: Array) -> None:
        assert not self._measurements or step > self._measurements[-1].step, "steps come in order"
        # A ratio to a first loss of 0 would be infinite.
        self._first_losses = np.where(self._first_losses > 0, self._first_losses, losses)
        ratios = losses / np.where(self._first_losses > 0, self._first_losses, np.nan)
        self._last_ratios = np.where(np.isnan(ratios), self._last_ratios, ratios)
        if np.isnan(ratios).all():
            return
        self._measurements.append(_Measurement(step, ratios, float(np.nanmax(self._last_ratios))))
        while len(self._measurements) > 2 and self._measurements[0].step <= step - self._history:
            del self._measurements[0]

    def _record_slopes(self, number: int) -> None:
        steps = np.array([m.step for m in self._measurements], float)
        ratios = np.array([m.ratios for m in self._measurements])
        now = np.array([_slope(steps, column) for column in ratios.T])
        if self._slopes:
            now = np.where(np.isnan(now), self._slopes[-1].tasks, now)
        self._slopes.append(_Slopes(number, now))
        while len(self._slopes) > 2 and self._slopes[0].number < number - (self._history - self._warmup):
            del self._slopes[0]
        self._worst_slopes.append(_slope(steps, np.array([m.worst for m in self._measurements])))

    def _weigh(self) -> Array:
        past = np.array([s.tasks for s in self._slopes])
        known = ~np.isnan(past[-1])
        num_tasks, num_known = len(known), int(known.sum())
        weights = np.full(num_tasks, 1 / num_tasks)
        if num_known < 2:
            return weights
        slopes, past = past[-1, known], past[:, known]
        relative = _softmax(num_known * _share(slopes, np.abs(slopes).sum()))
        absolute = _softmax(-(~np.isnan(past)).sum(axis=0) * _share(slopes, np.nansum(np.abs(past), axis=0)))
        worst = np.array(self._worst_slopes)
        divergence = len(worst) * _softmax(-self._tau * len(worst) * _share(worst, np.abs(worst).sum()))[-1]
        scores = _softmax(num_known * (divergence * relative + (1 - divergence) * absolute))
        floor = 1 / (10 * num_known)
        if scores.min() < floor:
            scores = scores * (1 - num_known * floor) + floor
        weights[known] = scores * num_known / num_tasks
        return weights


def _measured(losses: Sequence[float | None] | Array) -> Array:
    values = np.array(losses, float)
    return np.where(np.isfinite(values), values, np.nan)


def _slope(steps: Array, values: Array) -> float:
    """Least-squares slope over the values that are not NaN; NaN with fewer than two."""
    there = ~np.isnan(values)
    if there.sum() < 2:
        return float("nan")
    x = steps[there] - steps[there].mean()
    return float(x @ values[there] / (x @ x))


def _share(slopes: Array, total: Array | np.float64) -> Array:
    """slopes / total; 0 where all slopes are."""
    return np.divide(slopes, total, out=np.zeros_like(slopes), where=np.broadcast_to(total > 0, slopes.shape))


def _softmax(logits: Array) -> Array:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def _to_json(values: Array) -> list[float | None]:
    return [None if np.isnan(value) else float(value) for value in values]

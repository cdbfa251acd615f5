"""Curves over the steps of a training run, as SVG text: losses, weights, learning rate, speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from stitch_ray.report.figures import INK, KEPT, Floats, label, svg

Curve = tuple[Floats, Floats]
"""Steps in ascending order, and a value for each; NaN where it was not a number."""

TRAINING, RAW, VALIDATION = KEPT, "#a9c8e4", "#c2571a"
_MOST_POINTS = 1000


def smoothed(values: Floats, half: int | None = None) -> Floats:
    """Mean over `half` values on each side (default: a sixtieth of all); NaN does not count.

    Towards the ends the window narrows on both sides, so that the curve does not lag, down to a quarter: a single value
    at the very end would be as noisy as the values.
    """
    half = len(values) // 60 if half is None else half
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    place = np.arange(len(values))
    reach = np.maximum(np.minimum(half, np.minimum(place, len(values) - 1 - place)), half // 4)
    low, high = np.maximum(place - reach, 0), np.minimum(place + reach + 1, len(values))
    number = counts[high] - counts[low]
    return np.where(number > 0, (sums[high] - sums[low]) / np.maximum(number, 1), np.nan)


def thinned(curve: Curve, most: int = _MOST_POINTS) -> Curve:
    """At most `most` points: of every stretch its lowest and its highest, so that no spike is lost."""
    steps, values = curve
    if len(steps) <= most:
        return curve
    edges = np.linspace(0, len(steps), most // 2 + 1).astype(np.int64)
    chosen: list[int] = []
    for low, high in pairwise(edges.tolist()):
        part = values[low:high]
        if np.isfinite(part).any():
            chosen += sorted({low + int(np.nanargmin(part)), low + int(np.nanargmax(part))})
        else:
            chosen.append(low)  # keeps the gap
    return steps[chosen], values[chosen]


def loss_curve(training: Curve, validation: Curve, restarts: Sequence[int], title: str) -> str:
    """Training loss, raw and smoothed, with the validation loss; its lowest point is ringed. Restarts are dotted."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _loss(axes, training, validation)
        steps, values = validation
        if np.isfinite(values).any():
            best = int(np.nanargmin(values))
            ring = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.4}
            axes.plot(steps[best], values[best], "o", color=VALIDATION, label="lowest", clip_on=False, **ring)
        _mark(axes, restarts)
        axes.set_ylabel("loss (nats a token)")
        axes.set_xlabel("step")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderpad=0, handlelength=1.4, columnspacing=1.2)

    return svg(draw, 2.9, title)


def loss_panels(training: Mapping[str, Curve], validation: Mapping[str, Curve], title: str) -> str:
    """Training and validation loss of every task in a small picture of its own, each with its own loss axis."""

    def draw(figure: Figure) -> None:
        for axes, name in _panels(figure, list(training), share=False):
            _loss(axes, training[name], validation.get(name, (np.empty(0), np.empty(0))))

    return svg(draw, _panels_height(len(training)), title)


def weight_panels(weights: Mapping[str, Curve], title: str) -> str:
    """The weight of every task on common axes; the dashed line is an equal share."""
    equal = 1 / len(weights)
    highest = max(float(values.max(initial=equal)) for _, values in weights.values())

    def draw(figure: Figure) -> None:
        for axes, name in _panels(figure, list(weights), share=True):
            axes.axhline(equal, color=INK, linewidth=0.8, linestyle="--")
            axes.plot(*thinned(weights[name]), color=TRAINING, linewidth=1.3, **_dots(weights[name]))
            axes.set_ylim(0, 1.08 * highest)

    return svg(draw, _panels_height(len(weights)), title)


def optimizer(learning_rate: Curve, grad_norm: Curve, max_grad_norm: float | None, title: str) -> str:
    """Learning rate above, norm of the gradient before clipping below; the dashed line is where it is clipped."""

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True)
        top.plot(*thinned(learning_rate), color=TRAINING, linewidth=1.3, **_dots(learning_rate))
        _from_zero(top, learning_rate[1])
        top.set_ylabel("learning rate")
        top.yaxis.set_major_locator(MaxNLocator(nbins=4))
        _level(bottom, grad_norm, smoothed(grad_norm[1]))
        values = grad_norm[1][np.isfinite(grad_norm[1]) & (grad_norm[1] > 0)]
        if len(values) and values.max() > 20 * np.median(values):
            bottom.set_yscale("log")
        else:
            _from_zero(bottom, values)
            bottom.yaxis.set_major_locator(MaxNLocator(nbins=4))
        if max_grad_norm is not None:
            bottom.axhline(max_grad_norm, color=INK, linewidth=0.9, linestyle="--")
        bottom.set_ylabel("gradient norm")
        bottom.set_xlabel("step")
        _step_axis(bottom)
        figure.align_ylabels()

    return svg(draw, 3.4, title)


def throughput(speed: Curve, workers: Curve, restarts: Sequence[int], title: str) -> str:
    """Tokens a second over the steps; the number of workers below it if that changed. Restarts are dotted."""
    changed = len(np.unique(workers[1])) > 1

    def draw(figure: Figure) -> None:
        rows = figure.subplots(2 if changed else 1, 1, sharex=True, squeeze=False, height_ratios=[3, 1][: 1 + changed])
        axes = rows[0, 0]
        stretches = np.split(speed[1], np.searchsorted(speed[0], restarts, side="right"))
        _level(axes, speed, np.concatenate([smoothed(part, len(speed[0]) // 60) for part in stretches]))
        _from_zero(axes, speed[1])
        axes.set_ylabel("tokens a second")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if changed:
            kept = np.flatnonzero(np.diff(workers[1], prepend=np.nan, append=np.nan) != 0)
            kept = np.unique(np.clip(np.concatenate([kept, kept - 1]), 0, len(workers[0]) - 1))
            rows[1, 0].plot(workers[0][kept], workers[1][kept], color=TRAINING, linewidth=1.5, drawstyle="steps-post")
            _from_zero(rows[1, 0], workers[1])
            rows[1, 0].yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
            rows[1, 0].set_ylabel("workers")
        for row in rows[:, 0]:
            _mark(row, restarts)
        rows[-1, 0].set_xlabel("step")
        _step_axis(rows[-1, 0])
        figure.align_ylabels()

    return svg(draw, 3.2 if changed else 2.6, title)


def _loss(axes: Axes, training: Curve, validation: Curve) -> None:
    """One loss axis that shows the course; a few much higher raw values may leave it at the top."""
    values = training[1]
    line = smoothed(values)
    _level(axes, training, line, label="training")
    few = len(validation[0]) <= 60
    style = {"marker": "o", "markersize": 3.2} if few else {}
    if len(validation[0]):
        axes.plot(*thinned(validation), color=VALIDATION, linewidth=1.1, label="validation", **style)
    usual = values[np.isfinite(values)]
    shown = np.concatenate([np.percentile(usual, [0.5, 99.5]) if len(usual) else [], line, validation[1]])
    shown = shown[np.isfinite(shown)]
    if len(shown):
        low, high = shown.min(), shown.max()
        room = 0.06 * (high - low) or 0.1 * max(1e-6, abs(high))
        axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    _step_axis(axes)


def _level(axes: Axes, curve: Curve, level: Floats, **style: Any) -> None:
    """The values, pale, below their smoothed course; where they are too few to smooth both are the same."""
    if len(level) >= 60:
        axes.plot(*thinned(curve), color=RAW, linewidth=0.7)
    axes.plot(*thinned((curve[0], level)), color=TRAINING, linewidth=1.5, **_dots(curve), **style)


def _panels(figure: Figure, names: Sequence[str], *, share: bool) -> Iterator[tuple[Axes, str]]:
    """Two panels a row with a title each, steps below the lowest of each column."""
    columns = min(2, len(names))
    grid = figure.subplots(-(-len(names) // columns), columns, sharex=True, sharey=share, squeeze=False).ravel()
    for place, axes in enumerate(grid):
        if place >= len(names):
            axes.set_visible(False)
            continue
        axes.set_title(label(names[place], 26), pad=3)
        yield axes, names[place]
        axes.yaxis.set_major_locator(MaxNLocator(nbins=3))
        _step_axis(axes, nbins=3)
        axes.tick_params(labelbottom=place + columns >= len(names))
    figure.supxlabel("step", fontsize=9)


def _panels_height(count: int) -> float:
    return 0.5 + 1.15 * -(-count // 2)


def _from_zero(axes: Axes, values: Floats) -> None:
    axes.set_ylim(0, 1.1 * float(np.nanmax(values, initial=0.0)) or 1.0)


def _dots(curve: Curve) -> dict[str, Any]:
    """Points where there are so few that a line hardly shows."""
    return {"marker": "o", "markersize": 3} if len(curve[0]) <= 12 else {}


def _mark(axes: Axes, steps: Sequence[int]) -> None:
    for step in steps:
        axes.axvline(step, color=INK, linewidth=0.9, linestyle=":")


def _step_axis(axes: Axes, nbins: int = 5) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=nbins, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))

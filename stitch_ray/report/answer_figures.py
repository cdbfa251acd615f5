"""Figures of answers as SVG text: histograms by kind, and of every signal for right and wrong answers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator
from numpy.typing import NDArray

from stitch_ray.report.figures import INK, KEPT, Floats, label, svg

RIGHT, WRONG, CHANCE = KEPT, "#c2571a", "#8b949e"
COUNT = FuncFormatter(lambda value, _: f"{value:,.0f}")
_HISTOGRAM_BINS = 30


def histogram_rows(
    series: Mapping[str, Floats],
    xlabel: str,
    title: str,
    *,
    unit: bool = False,
    log: bool = False,
    line: float | None = None,
) -> str:
    """One histogram a row on a common axis, with its number of values; NaN is left out. series: name -> (n,).

    unit: the axis is 0 to 1. log: values >= 1 on a log axis. line: an upright line, such as a threshold.
    """
    finite = {name: values[np.isfinite(values)].astype(np.float64) for name, values in series.items()}
    every = np.concatenate(list(finite.values()))
    edges = _log_edges(every) if log else equal_edges(every, 20 if unit else _HISTOGRAM_BINS, unit=unit)

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(finite), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, values) in zip(rows, finite.items(), strict=True):
            axes.stairs(np.histogram(np.maximum(values, 1) if log else values, edges)[0], edges, fill=True, color=KEPT)
            axes.set_title(f"{label(name, 40)} ({len(values):,})", pad=3)
            count_axis(axes)
            if line is not None:
                axes.axvline(line, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        if log:
            rows[-1].set_xscale("log")
            rows[-1].xaxis.set_major_formatter(COUNT)
            rows[-1].xaxis.set_minor_locator(NullLocator())
            powers = [step * 10.0**power for power in range(7) for step in (1, 2, 5)]
            inside = [tick for tick in powers if edges[0] <= tick <= edges[-1]]
            rows[-1].set_xticks(inside if len(inside) <= 7 else inside[:: -(-len(inside) // 7)])
        rows[-1].set_xlabel(xlabel)
        figure.supylabel("answers", fontsize=9)

    return svg(draw, 0.75 + 1.0 * len(finite), title)


def signal_panels(
    signals: Mapping[str, Floats], correct: NDArray[np.bool_], signs: Mapping[str, int], title: str
) -> str:
    """Every signal in a small picture of its own: right answers filled, wrong ones as a line, each of area one.

    The outer hundredth on each side is left out, so that one odd answer does not squeeze the rest. signs: +1 where more
    means surer, said above the picture.
    """
    names = list(signals)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(-(-len(names) // 2), 2, squeeze=False).ravel()
        for place, axes in enumerate(grid):
            if place >= len(names):
                axes.set_visible(False)
                continue
            name = names[place]
            scored = np.isfinite(signals[name])
            values, right = signals[name][scored], correct[scored].astype(bool)
            axes.set_title(label(name, 28), pad=3)
            axes.set_yticks([])
            axes.spines["left"].set_visible(False)
            if not len(values):
                axes.text(0.5, 0.5, "not computed", transform=axes.transAxes, ha="center", va="center", color=CHANCE)
                axes.set_xticks([])
                continue
            low, high = np.percentile(values, [1, 99])
            inside = (values >= low) & (values <= high)
            edges = equal_edges(values[inside], 20)
            for mask, style in ((right, {"fill": True, "color": RIGHT, "alpha": 0.45}), (~right, {"color": WRONG})):
                if mask.any():
                    heights = np.histogram(values[mask], edges)[0] / mask.sum()
                    axes.stairs(heights, edges, linewidth=1.3, **style)
            axes.set_ylim(bottom=0)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
            axes.set_xlabel(
                {1: "surer \N{RIGHTWARDS ARROW}", -1: "\N{LEFTWARDS ARROW} surer"}.get(signs.get(name, 0), ""),
                fontsize=8,
            )

    return svg(draw, 0.35 + 1.25 * -(-len(names) // 2), title)


def count_axis(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    axes.yaxis.set_major_formatter(COUNT)


def equal_edges(values: Floats, bins: int, *, unit: bool = False) -> Floats:
    """Edges of equal bins over the values; over [0, 1] where `unit` and all lie there."""
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if unit and low >= 0 and high <= 1:
        return np.linspace(0, 1, bins + 1)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
    return np.linspace(low, high, bins + 1)


def _log_edges(values: Floats) -> Floats:
    """Whole edges that widen, so that no bin of short lengths is empty for want of a whole number."""
    low, high = (max(1.0, values.min()), max(1.0, values.max())) if len(values) else (1.0, 10.0)
    span = np.geomspace(low, high + 1, 25)
    return np.unique(np.append(np.floor(span[:-1]), np.ceil(span[-1])))

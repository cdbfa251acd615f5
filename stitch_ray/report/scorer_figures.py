"""Figures of how a scorer came about, as SVG text: the loss of its encoder, the weights of its stack."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from stitch_ray.report.answer_figures import COUNT, RIGHT, WRONG
from stitch_ray.report.curves import RAW, TRAINING, VALIDATION, Curve, smoothed, thinned
from stitch_ray.report.figures import INK, label, svg


def learning_curve(training: Curve, validation: Curve, best: int | None, ylabel: str, title: str) -> str:
    """Training loss, pale and smoothed, with the validation loss by step; the checkpoint that was kept is ringed."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        steps, values = training
        if len(steps) >= 60:
            axes.plot(*thinned(training), color=RAW, linewidth=0.7)
        axes.plot(*thinned((steps, smoothed(values))), color=TRAINING, linewidth=1.5, label="training")
        if len(validation[0]):
            axes.plot(*validation, "o-", color=VALIDATION, linewidth=1.1, markersize=3.2, label="validation")
            kept = np.flatnonzero(validation[0] == best) if best is not None else ()
            for place in kept:
                ring = {"markersize": 9, "markerfacecolor": "none", "markeredgewidth": 1.4}
                axes.plot(validation[0][place], validation[1][place], "o", color=VALIDATION, label="kept", **ring)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.xaxis.set_major_formatter(COUNT)
        axes.set_ylabel(ylabel)
        axes.set_xlabel("step")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=3, handlelength=1.4)

    return svg(draw, 2.9, title)


def coefficients(names: Sequence[str], values: Sequence[float], title: str) -> str:
    """What each feature weighs, the heaviest on top: to the right where more of it means surer."""
    order = sorted(range(len(names)), key=lambda place: abs(values[place]))
    reach = max(1e-9, *(abs(value) for value in values)) if values else 1.0

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, row in enumerate(order):
            value = values[row]
            axes.barh(place, value, height=0.62, color=RIGHT if value >= 0 else WRONG)
            axes.annotate(
                f"{value:+.2f}",
                (value, place),
                xytext=(4 if value >= 0 else -4, 0),
                textcoords="offset points",
                ha="left" if value >= 0 else "right",
                va="center",
                fontsize=8,
            )
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(order)), [label(names[row], 28) for row in order])
        axes.tick_params(axis="y", length=0)
        low, high = min(0.0, *values), max(0.0, *values)
        axes.set_xlim(low - 0.3 * reach * (low < 0), high + 0.22 * reach * (high > 0))
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel("weight, a standard deviation of the feature")

    return svg(draw, 0.75 + 0.27 * max(1, len(names)), title)

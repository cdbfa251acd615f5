"""Figures of a policy as SVG text: where questions end, and the wealth of a bet against its promise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from stitch_ray.report.answer_figures import CHANCE, COUNT, WRONG
from stitch_ray.report.curves import thinned
from stitch_ray.report.figures import DROPPED, INK, KEPT, Floats, label, svg

_SHARE = FuncFormatter(lambda value, _: f"{value:.0%}")


def wealth(values: Floats, alpha: float, title: str) -> str:
    """Wealth of a bet against the promise after every label that came back, and the level at which it is broken."""
    steps = np.arange(len(values) + 1, dtype=np.float64)
    course = np.append(1.0, np.maximum(values, 1e-6))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(1 / alpha, color=WRONG, linewidth=1.1)
        axes.axhline(1, color=CHANCE, linewidth=0.9, linestyle="--")
        axes.plot(*thinned((steps, course)), color=KEPT, linewidth=1.5, drawstyle="steps-post")
        over = np.flatnonzero(course >= 1 / alpha)
        if len(over):
            axes.plot(steps[over[0]], course[over[0]], "o", color=WRONG, markersize=6)
        axes.set_yscale("log")
        low, high = min(0.5, course.min()), max(2 / alpha, course.max())
        axes.set_ylim(low / 1.4, high * 1.4)
        axes.yaxis.set_major_locator(LogLocator(numticks=6))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e+0", "e")))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.text(0, 1.08 / alpha, f" alarm at {1 / alpha:.3g}", va="bottom", color=WRONG)
        axes.set_xlim(0, max(1, len(values)))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.xaxis.set_major_formatter(COUNT)
        axes.set_ylabel("wealth (log scale)")
        axes.set_xlabel("labels that came back")

    return svg(draw, 2.7, title)


def stages(rows: Sequence[tuple[str, int, int, int]], title: str) -> str:
    """Where the questions of a cascade end: (name, answered at the draft, after refinement, not at all), as shares."""
    parts = (("at the draft", KEPT), ("after refinement", "#7fb2dd"), ("abstained", DROPPED))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (_, *counts) in enumerate(reversed(rows)):
            start, total = 0.0, max(1, sum(counts))
            for count, (name, colour) in zip(counts, parts, strict=True):
                share = count / total
                axes.barh(place, share, left=start, height=0.6, color=colour, label=name if place == 0 else None)
                if share >= 0.09:
                    dark = colour == KEPT
                    text = f"{share:.0%}"
                    axes.text(start + share / 2, place, text, ha="center", va="center", color="white" if dark else INK)
                start += share
        axes.set_yticks(range(len(rows)), [label(row[0], 24) for row in reversed(rows)])
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(_SHARE)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("questions")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3, handlelength=1.2)

    return svg(draw, 1.0 + 0.34 * len(rows), title)

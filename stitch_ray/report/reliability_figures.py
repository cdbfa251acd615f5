"""Figures of confidence as SVG text: risk against coverage, reliability diagram, histograms of right and wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray
from scipy.stats import beta

from stitch_ray.report.answer_figures import CHANCE, COUNT, RIGHT, WRONG, count_axis, equal_edges
from stitch_ray.report.curves import thinned
from stitch_ray.report.figures import INK, KEPT, Floats, label, svg

Dot = tuple[str, float, float, float]
"""Name, value, and the ends of its interval; NaN where one is not known."""

_OTHERS = ("#2a8f6b", "#8a5bb5", "#b58900", "#c94f7c", "#5b7083")
"""Of the curves beside the first. More cannot be told apart."""
MOST_CURVES = 1 + len(_OTHERS)
_SHARE = FuncFormatter(lambda value, _: f"{value:.0%}")
_HISTOGRAM_BINS = 30


def risk_coverage(
    curves: Mapping[str, tuple[Floats, Floats]],
    title: str,
    *,
    oracle: tuple[Floats, Floats] | None = None,
    chance: float | None = None,
    targets: Sequence[float] = (),
    marks: Sequence[tuple[float, str]] = (),
    band: tuple[Floats, Floats, Floats] | None = None,
) -> str:
    """Share of wrong answers among those given, at every share given. curves: name -> (coverage, risk), strictest first.

    The first curve is the one the report is about; at most `MOST_CURVES` are drawn. oracle: the best order there is.
    chance: risk of a random order. targets: largest risks that are allowed.
    marks: (coverage of a threshold, its label).
    band: (coverage, low, high) around the first curve.
    """
    drawn = dict(list(curves.items())[:MOST_CURVES])
    dotted = {name: len(coverage) <= 25 for name, (coverage, _) in drawn.items()}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if band is not None:
            axes.fill_between(*band, color=KEPT, alpha=0.14, linewidth=0)
        if oracle is not None:
            axes.plot(*thinned(oracle, 300), color=INK, linewidth=1, linestyle=":", label="best order")
        if chance is not None:
            axes.plot([0, 1], [chance, chance], color=CHANCE, linewidth=1.2, linestyle="--", label="random order")
        for position, (name, curve) in reversed(list(enumerate(drawn.items()))):
            dots = {"marker": "o", "markersize": 3} if dotted[name] else {}
            colour, width = (KEPT, 1.9) if position == 0 else (_OTHERS[position - 1], 1.0)
            axes.plot(*thinned(curve, 400), color=colour, linewidth=width, label=label(name, 30), **dots)
        top = _risk_limit(list(drawn.values()), chance, targets)
        for target in targets:
            axes.axhline(target, color=WRONG, linewidth=1.1)
            text = f"at most {100 * target:.4g}%"
            axes.text(1, target + 0.01 * top, text, ha="right", va="bottom", color=WRONG, fontsize=8)
        for position, (place, text) in enumerate(marks):
            axes.axvline(place, color=INK, linewidth=0.9, linestyle=(0, (4, 2)))
            left = place > 0.6
            axes.annotate(
                label(text, 26),
                (place, (0.98 - 0.075 * position) * top),
                xytext=(-3 if left else 3, 0),
                textcoords="offset points",
                ha="right" if left else "left",
                va="top",
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8},
            )
        axes.set_xlim(0, 1)
        axes.set_ylim(0, top)
        axes.xaxis.set_major_formatter(_SHARE)
        axes.yaxis.set_major_formatter(_SHARE)
        axes.set_xlabel("answered (coverage)")
        axes.set_ylabel("wrong among these (risk)")
        handles, names = axes.get_legend_handles_labels()
        figure.legend(handles[::-1], names[::-1], loc="outside lower center", ncols=2, handlelength=1.8)

    lines = len(drawn) + (oracle is not None) + (chance is not None)
    return svg(draw, 3.0 + 0.17 * -(-lines // 2), title)


def _risk_limit(curves: Sequence[tuple[Floats, Floats]], chance: float | None, targets: Sequence[float]) -> float:
    """Top of the risk axis: the first few answers, whose risk jumps between 0 and 1, may leave it."""
    usual = [float(risk[coverage >= 0.08].max(initial=0.0)) for coverage, risk in curves]
    return min(1.02, max(1.15 * max([*usual, chance or 0.0, *targets]), 0.02))


def reliability_diagram(
    probability: Floats, correct: Floats, title: str, *, bins: int = 10, before: Floats | None = None
) -> str:
    """Share that is right against the stated probability, in bins of equal width, with exact 95 % intervals if labels are 0 or 1.

    probability, before: (n,) in [0, 1], NaN = unscored, which is left out; correct: (n,) in [0, 1]. before: the score
    that was not yet calibrated, hollow. Below: how many answers each bin has.
    """
    edges = np.linspace(0, 1, bins + 1)

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        top.plot([0, 1], [0, 1], color=CHANCE, linewidth=1, linestyle="--")
        if before is not None:
            stated, share, _, _ = _binned(before, correct, edges)
            top.plot(stated, share, "o-", color=CHANCE, markerfacecolor="white", markersize=4, linewidth=0.9)
        stated, share, count, right = _binned(probability, correct, edges)
        room = None
        if np.isin(correct, (0, 1)).all():  # the interval is that of a count
            low = np.where(right > 0, beta.ppf(0.025, np.maximum(right, 1), count - right + 1), 0.0)
            high = np.where(right < count, beta.ppf(0.975, right + 1, np.maximum(count - right, 1)), 1.0)
            room = np.maximum(0.0, [share - low, high - share])
        top.errorbar(stated, share, room, fmt="o", color=KEPT, markersize=4.5, elinewidth=1, clip_on=False)
        top.set_ylim(0, 1)
        top.yaxis.set_major_formatter(_SHARE)
        top.set_ylabel("right")
        total = np.histogram(probability[np.isfinite(probability)], edges)[0]
        bottom.stairs(total, edges, fill=True, color=KEPT, alpha=0.55)
        for place, number in zip((edges[:-1] + edges[1:]) / 2, total, strict=True):
            if number:
                bottom.text(place, number, _short(number), ha="center", va="bottom", fontsize=8)
        bottom.set_ylim(0, 1.35 * max(1, total.max()))
        bottom.set_xlim(0, 1)
        bottom.xaxis.set_major_formatter(_SHARE)
        bottom.yaxis.set_major_locator(MaxNLocator(nbins=2, integer=True))
        bottom.yaxis.set_major_formatter(COUNT)
        bottom.set_ylabel("answers")
        bottom.set_xlabel("stated probability of being right")
        figure.align_ylabels()

    return svg(draw, 4.0, title)


def _binned(probability: Floats, correct: Floats, edges: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """(mean probability, share right, answers, right answers) of every bin that is not empty."""
    scored = np.isfinite(probability)
    bins = len(edges) - 1
    place = np.clip(np.searchsorted(edges, probability[scored], side="right") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins).astype(np.float64)
    stated = np.bincount(place, probability[scored], bins)
    right = np.bincount(place, correct[scored], bins).astype(np.float64)
    some = count > 0
    return stated[some] / count[some], right[some] / count[some], count[some], right[some]


def score_histograms(
    confidence: Floats, correct: NDArray[np.bool_], title: str, *, thresholds: Sequence[tuple[float, str]] = ()
) -> str:
    """Confidences of the right and of the wrong answers, one above the other on one axis. NaN is left out.

    thresholds: (confidence from which an answer is given, its label).
    """
    scored = np.isfinite(confidence)
    values, right = confidence[scored], correct[scored].astype(bool)
    edges = equal_edges(values, _HISTOGRAM_BINS, unit=True)

    def draw(figure: Figure) -> None:
        rows = figure.subplots(2, 1, sharex=True)
        for axes, mask, name, colour in ((rows[0], right, "right", RIGHT), (rows[1], ~right, "wrong", WRONG)):
            axes.stairs(np.histogram(values[mask], edges)[0], edges, fill=True, color=colour)
            axes.set_title(f"{name} ({int(mask.sum()):,})", pad=3, color=colour)
            count_axis(axes)
            for place, _ in thresholds:
                axes.axvline(place, color=INK, linewidth=1, linestyle=(0, (4, 2)))
        for place, text in thresholds[:3]:
            left = place > (edges[0] + edges[-1]) / 2
            rows[0].annotate(
                label(text, 24),
                (place, rows[0].get_ylim()[1]),
                xytext=(-3 if left else 3, -1),
                textcoords="offset points",
                ha="right" if left else "left",
                va="top",
            )
        rows[1].set_xlabel("confidence")
        figure.supylabel("answers", fontsize=9)

    return svg(draw, 2.9, title)


def forest(
    rows: Sequence[Dot],
    xlabel: str,
    title: str,
    *,
    reference: float | None = 0.5,
    first: str | None = None,
) -> str:
    """A dot with its interval for every (name, value, low, high), the highest on top; the one named `first` in blue.

    Rows without a value are left out; an interval that is not known is not drawn.
    """
    known = sorted((row for row in rows if np.isfinite(row[1])), key=lambda row: row[1])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if reference is not None:
            axes.axvline(reference, color=CHANCE, linewidth=1, linestyle="--")
        for place, (name, value, low, high) in enumerate(known):
            colour = KEPT if name == first or first is None else INK
            if np.isfinite(low) and np.isfinite(high):
                axes.plot([low, high], [place, place], color=colour, linewidth=1.6, alpha=0.55)
            axes.plot(value, place, "o", color=colour, markersize=5)
            axes.annotate(
                f"{value:.3f}", (value, place), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=8
            )
        axes.set_yticks(range(len(known)), [label(row[0], 28) for row in known])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(-0.6, len(known) - 0.2)
        axes.spines["left"].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
        axes.set_xlabel(xlabel)

    return svg(draw, 0.75 + 0.3 * max(1, len(known)), title)


def _short(number: float) -> str:
    return (
        f"{number / 1e6:.1f}M" if number >= 999_500 else f"{number / 1e3:.0f}k" if number >= 9_950 else f"{number:.0f}"
    )

"""Figures as SVG text for the reports: arrays in, one `<svg>` element out. Nothing is read, shown or kept.

Figures are small (about 420 pixels wide) so that their text is readable on a telephone without zooming; a report puts
several side by side. Text stays text: it can be searched, copied and read in any script the browser has a font for.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Curve = tuple[Floats, Floats]
"""Steps in ascending order, and a value for each; NaN where it was not a number."""

KEPT, DROPPED, INK, MISSING = "#1f6fb4", "#c3cad3", "#24292f", "#e4e7eb"
TRAINING, RAW, VALIDATION = KEPT, "#a9c8e4", "#c2571a"
_WIDTH = 4.4
_BINS = 40
_LENGTH_BINS = 24
_FEW = 10
_MOST_POINTS = 1000
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "stitch-ray",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8b949e",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def histograms(series: Mapping[str, Floats], kept: NDArray[np.bool_], xlabel: str, title: str) -> str:
    """One histogram a row on a common axis, the kept examples in colour. series: name -> (examples,)."""
    edges = _edges(np.concatenate(list(series.values())))

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(series), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (name, values) in zip(rows, series.items(), strict=True):
            _stacked(axes, values, kept, edges)
            if len(series) > 1:
                axes.set_title(_label(name, 48), pad=3)
        rows[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0, handlelength=1.2)
        rows[-1].set_xlabel(xlabel)
        figure.supylabel("examples", fontsize=9)

    return _svg(draw, 2.7 if len(series) == 1 else 0.75 + 0.88 * len(series), title)


def lengths(tokens: NDArray[np.int64], kept: NDArray[np.bool_], title: str) -> str:
    """How long the kept and the dropped examples are, and the share that is kept at every length. tokens >= 1."""
    values = np.maximum(tokens, 1).astype(np.float64)
    span = np.geomspace(values.min(), values.max() + 1, _LENGTH_BINS + 1)
    edges = np.unique(np.append(np.floor(span[:-1]), np.ceil(span[-1])))

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True)
        _stacked(top, values, kept, edges)
        top.set_ylabel("examples")
        top.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0, handlelength=1.2)
        total, chosen = np.histogram(values, edges)[0], np.histogram(values[kept], edges)[0]
        for many, face in ((total >= _FEW, KEPT), ((total > 0) & (total < _FEW), "white")):
            middle = np.sqrt(edges[:-1] * edges[1:])[many]
            rate = chosen[many] / total[many]
            bottom.plot(middle, rate, "o", color=KEPT, markerfacecolor=face, markersize=4.5, clip_on=False)
        bottom.axhline(float(kept.mean()), color=INK, linewidth=0.9, linestyle="--")
        bottom.set_ylim(0, 1)
        bottom.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        bottom.set_ylabel("kept")
        bottom.set_xscale("log")
        bottom.set_xlim(edges[0] * 0.95, edges[-1] * 1.05)
        bottom.set_xticks(_log_ticks(edges[0], edges[-1]))
        bottom.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        bottom.xaxis.set_minor_formatter(NullFormatter())
        bottom.xaxis.set_minor_locator(NullLocator())
        bottom.set_xlabel("tokens (log scale)")

    return _svg(draw, 4.0, title)


def correlations(matrix: Floats, labels: Sequence[str], title: str) -> str:
    """A square of rank correlations from -1 (red) to 1 (blue), each with its number; NaN is a dash."""
    return _heat_map(matrix, labels, labels, ("RdBu", -1.0, 1.0), "{:.2f}", title)


def shares(matrix: Floats, rows: Sequence[str], columns: Sequence[str], title: str, xlabel: str) -> str:
    """Shares between 0 (white) and 1 (dark), in percent."""
    return _heat_map(matrix, rows, columns, ("Blues", 0.0, 1.0), "{:.0%}", title, xlabel)


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

    return _svg(draw, 2.9, title)


def loss_panels(training: Mapping[str, Curve], validation: Mapping[str, Curve], title: str) -> str:
    """Training and validation loss of every task in a small picture of its own, each with its own loss axis."""

    def draw(figure: Figure) -> None:
        for axes, name in _panels(figure, list(training), share=False):
            _loss(axes, training[name], validation.get(name, (np.empty(0), np.empty(0))))

    return _svg(draw, _panels_height(len(training)), title)


def weight_panels(weights: Mapping[str, Curve], title: str) -> str:
    """The weight of every task on common axes; the dashed line is an equal share."""
    equal = 1 / len(weights)
    highest = max(float(values.max(initial=equal)) for _, values in weights.values())

    def draw(figure: Figure) -> None:
        for axes, name in _panels(figure, list(weights), share=True):
            axes.axhline(equal, color=INK, linewidth=0.8, linestyle="--")
            axes.plot(*thinned(weights[name]), color=TRAINING, linewidth=1.3, **_dots(weights[name]))
            axes.set_ylim(0, 1.08 * highest)

    return _svg(draw, _panels_height(len(weights)), title)


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

    return _svg(draw, 3.4, title)


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

    return _svg(draw, 3.2 if changed else 2.6, title)


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
        axes.set_title(_label(names[place], 26), pad=3)
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


def _heat_map(
    matrix: Floats,
    rows: Sequence[str],
    columns: Sequence[str],
    scale: tuple[str, float, float],
    number: str,
    title: str,
    xlabel: str = "",
) -> str:
    name, low, high = scale
    colours = mpl.colormaps[name].with_extremes(bad=MISSING)
    row_names, column_names = [_label(text, 26) for text in rows], list(columns)
    if max(map(len, column_names)) > 44 / len(columns):  # too long to stand side by side: number them
        column_names = [f"({position + 1})" for position in range(len(columns))]
        row_names = [f"{text} ({position + 1})" for position, text in enumerate(row_names)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        # A mesh of rectangles, not an image: an image would be a bitmap inside the SVG.
        axes.pcolormesh(np.ma.masked_invalid(matrix), cmap=colours, vmin=low, vmax=high, edgecolors="white")
        axes.invert_yaxis()
        for (row, column), value in np.ndenumerate(matrix):
            text = number.format(value) if np.isfinite(value) else "–"
            red, green, blue, _ = colours((value - low) / (high - low)) if np.isfinite(value) else (1, 1, 1, 1)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            size = 9 if len(columns) <= 9 else 7
            axes.text(
                column + 0.5,
                row + 0.5,
                text,
                ha="center",
                va="center",
                color="white" if dark else INK,
                fontsize=size,
            )
        axes.set_xticks(np.arange(len(columns)) + 0.5, column_names)
        axes.set_yticks(np.arange(len(rows)) + 0.5, row_names)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(xlabel)

    return _svg(draw, max(1.2, 0.38 * len(rows)) + (0.5 if xlabel else 0.3), title)


def _stacked(axes: Axes, values: Floats, kept: NDArray[np.bool_], edges: Floats) -> None:
    total, chosen = np.histogram(values, edges)[0], np.histogram(values[kept], edges)[0]
    axes.stairs(total, edges, baseline=chosen, fill=True, color=DROPPED, label="dropped")
    axes.stairs(chosen, edges, fill=True, color=KEPT, label="kept")
    axes.set_ylim(0, max(1, total.max()) * 1.05)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _edges(values: Floats) -> Floats:
    """Equal bins over the values; one bin in the middle of a wider axis when they are all the same."""
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5, high + 0.5
        return np.linspace(low, high, 22)
    return np.linspace(low, high, _BINS + 1)


def _log_ticks(low: float, high: float) -> list[float]:
    """At most six round numbers between `low` and `high`."""
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [step * 10.0**power for power in range(9) for step in steps]
        inside = [tick for tick in ticks if low <= tick <= high and tick.is_integer()]
        if len(inside) >= 3:
            return inside if len(inside) <= 6 else inside[:: -(-len(inside) // 6)]
    return [float(low)] if high - low < 3 else [float(low), float(high)]


def _label(text: str, longest: int) -> str:
    """One printable line of at most `longest` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def _svg(draw: Callable[[Figure], None], height: float, title: str) -> str:
    """Draw on a fresh figure without pyplot, and return the element with ids of its own, fit for inline use."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # Matplotlib measures with its own font, which lacks many scripts; the browser draws the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(_WIDTH, height), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)  # would hold for the whole page
    own = f"f{hashlib.sha256((title + svg).encode()).hexdigest()[:8]}-"
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{own}", svg)
    size = re.search(r'viewBox="([^"]+)"', svg)
    assert size
    head = f'<svg viewBox="{size[1]}" role="img" aria-label="{escape(title)}">'
    return head + svg[svg.index(">") + 1 :].replace("xlink:href", "href").rstrip()

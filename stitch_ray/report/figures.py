"""Figures as SVG text for the reports: arrays in, one `<svg>` element out. Nothing is read, shown or kept.

Figures are small (about 420 pixels wide) so that their text is readable on a telephone without zooming; a report puts
several side by side. Text stays text: it can be searched, copied and read in any script the browser has a font for.
"""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

Floats = NDArray[np.float64]

KEPT, DROPPED, INK, MISSING = "#1f6fb4", "#c3cad3", "#24292f", "#e4e7eb"
WIDTH = 4.4
_BINS = 40
_LENGTH_BINS = 24
_FEW = 10
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
                axes.set_title(label(name, 48), pad=3)
        rows[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0, handlelength=1.2)
        rows[-1].set_xlabel(xlabel)
        figure.supylabel("examples", fontsize=9)

    return svg(draw, 2.7 if len(series) == 1 else 0.75 + 0.88 * len(series), title)


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

    return svg(draw, 4.0, title)


def correlations(matrix: Floats, labels: Sequence[str], title: str) -> str:
    """A square of rank correlations from -1 (red) to 1 (blue), each with its number; NaN is a dash."""
    return _heat_map(matrix, labels, labels, ("RdBu", -1.0, 1.0), "{:.2f}", title)


def shares(matrix: Floats, rows: Sequence[str], columns: Sequence[str], title: str, xlabel: str) -> str:
    """Shares between 0 (white) and 1 (dark), in percent."""
    return _heat_map(matrix, rows, columns, ("Blues", 0.0, 1.0), "{:.0%}", title, xlabel)


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
    row_names, column_names = [label(text, 26) for text in rows], list(columns)
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

    return svg(draw, max(1.2, 0.38 * len(rows)) + (0.5 if xlabel else 0.3), title)


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


def label(text: str, longest: int) -> str:
    """One printable line of at most `longest` characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def svg(draw: Callable[[Figure], None], height: float, title: str) -> str:
    """Draw on a fresh figure without pyplot, and return the element with ids of its own, fit for inline use."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # Matplotlib measures with its own font, which lacks many scripts; the browser draws the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
        FigureCanvasSVG(figure)
        draw(figure)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<style.*?</style>", "", text, count=1, flags=re.DOTALL)  # would hold for the whole page
    own = f"f{hashlib.sha256((title + text).encode()).hexdigest()[:8]}-"
    text = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{own}", text)
    size = re.search(r'viewBox="([^"]+)"', text)
    assert size
    head = f'<svg viewBox="{size[1]}" role="img" aria-label="{escape(title)}">'
    return head + text[text.index(">") + 1 :].replace("xlink:href", "href").rstrip()

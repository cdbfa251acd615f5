"""The result of an evaluation: as rows, as JSON, and as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

_WIDTH = 140

_COLUMNS = {
    "AURC": "aurc",
    "E-AURC": "e_aurc",
    "AUGRC": "augrc",
    "AUACC": "auacc",
    "PRR": "prr",
    "PRR50": "prr_50",
    "Brier": "brier",
    "ECE": "ece",
}


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its 95 % interval. NaN: not defined on these answers, or no interval was asked for."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One score. `metrics` has auroc, aurc, e_aurc, augrc, auacc, prr, prr_50, coverage_at_risk_<risk>; of a probability
    also brier, ece, accuracy and balanced_accuracy. They are over the `scored` answers."""

    name: str
    metrics: dict[str, Interval]
    scored: int
    unscored: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What `evaluate` found. `notes`: what nobody who reads the numbers may miss."""

    rows: list[ScoreRow]
    notes: list[str]
    answers: int
    questions: int | None
    mean_residual: float
    bootstrap: int
    ece_bins: int

    def row(self, name: str) -> ScoreRow:
        """The row of one score. Raises KeyError."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: NaN is None."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Evaluation:
        """What `as_dict` gave, also after a round through JSON."""
        rows = [
            ScoreRow(
                name=row["name"],
                metrics={
                    key: Interval(**{k: _number(v) for k, v in cell.items()}) for key, cell in row["metrics"].items()
                },
                scored=row["scored"],
                unscored=row["unscored"],
            )
            for row in data["rows"]
        ]
        return Evaluation(**{**data, "rows": rows, "mean_residual": _number(data["mean_residual"])})

    def table(self) -> str:
        """Fixed-width text of at most 140 columns, for the console: one row a score, then the notes."""
        return _render(self)


def _render(evaluation: Evaluation) -> str:
    """One row a score. Columns that do not fit into 140 go below, with the names repeated; then the notes."""
    columns = [("score", [row.name for row in evaluation.rows])]
    columns.append(("AUROC", _cells(evaluation, "auroc", _with_interval)))
    columns += [(title, _cells(evaluation, key, lambda cell: _short(cell.value))) for title, key in _COLUMNS.items()]
    for key in _risk_keys(evaluation):
        columns.append((f"cov@{_trimmed(key.rsplit('_', 1)[1])} %", _cells(evaluation, key, _percent)))
    blocks, width = [[columns[0]]], _width(columns[0])
    for column in columns[1:]:
        if width + 2 + _width(column) > _WIDTH:
            blocks.append([columns[0]])
            width = _width(columns[0])
        blocks[-1].append(column)
        width += 2 + _width(column)
    parts = [_block(block) for block in blocks]
    return "\n".join([_caption(evaluation), *"\n\n".join(parts).split("\n"), *(f"! {n}" for n in evaluation.notes)])


def _caption(evaluation: Evaluation) -> str:
    grouped = evaluation.questions is not None
    answers = f"{evaluation.answers:,} answers" + (f" to {evaluation.questions:,} questions" if grouped else "")
    intervals = "no intervals"
    if evaluation.bootstrap:
        unit = "questions" if grouped else "answers"
        intervals = f"95 % intervals from {evaluation.bootstrap:,} resamples of {unit}"
    return f"{answers}, mean residual {evaluation.mean_residual:.3f}; {intervals}; ECE over {evaluation.ece_bins} bins"


def _risk_keys(evaluation: Evaluation) -> list[str]:
    keys = dict.fromkeys(key for row in evaluation.rows for key in row.metrics)
    return [key for key in keys if key.startswith("coverage_at_risk_")]


def _cells(evaluation: Evaluation, key: str, form: Callable[[Interval], str]) -> list[str]:
    def cell(row: ScoreRow) -> str:
        return "" if key not in row.metrics else form(row.metrics[key])

    return [cell(row) for row in evaluation.rows]


def _block(columns: list[tuple[str, list[str]]]) -> str:
    lines = zip(*([title, *cells] for title, cells in columns), strict=True)
    return "\n".join(
        "  ".join(
            text.ljust(_width(column)) if index == 0 else text.rjust(_width(column))
            for index, (text, column) in enumerate(zip(line, columns, strict=True))
        ).rstrip()
        for line in lines
    )


def _width(column: tuple[str, list[str]]) -> int:
    return max(len(column[0]), *map(len, column[1]), 1)


def _with_interval(cell: Interval) -> str:
    return _short(cell.value) + ("" if math.isnan(cell.low) else f" [{_short(cell.low)},{_short(cell.high)}]")


def _percent(cell: Interval) -> str:
    if math.isnan(cell.value):
        return "-"
    return f"{100 * cell.value:.0f}" + (
        "" if math.isnan(cell.low) else f" [{100 * cell.low:.0f},{100 * cell.high:.0f}]"
    )


def _short(value: float) -> str:
    """Three decimals without the leading zero; `-` where there is no number."""
    return "-" if math.isnan(value) else _trimmed(f"{value:.3f}")


def _trimmed(number: str) -> str:
    number = "0.000" if number == "-0.000" else number
    return number.replace("0.", ".", 1) if number.lstrip("-").startswith("0.") else number


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)

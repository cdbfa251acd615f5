"""What rating cost, from the rows that the actors return."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Usage:
    """Work done by one model in this run of the command; what an earlier run has rated is not in it.

    `tokens` counts the whole rated sequences, computed or shared. `seconds` is the wall time of rating, engine start
    included; `steady_seconds` runs from the first batch to the last; `busy` is the actors' share of it spent rating.
    """

    model: str
    path: str | None = None
    rows: int = 0
    sequences: int = 0
    tokens: int = 0
    actors: int = 0
    seconds: float = 0.0
    steady_seconds: float = 0.0
    busy: float | None = None


def usage(model: str, stats: Sequence[Mapping[str, Any]], seconds: float) -> Usage:
    """Sum up the rows of `Rater`."""
    if not stats:
        return Usage(model)
    started = min(float(row["started"]) for row in stats)
    steady = max(float(row["started"]) + float(row["seconds"]) for row in stats) - started
    actors = len({(row["node"], int(row["actor"])) for row in stats})
    working = sum(float(row["seconds"]) for row in stats)
    return Usage(
        model=model,
        path=str(stats[0]["path"]),
        rows=sum(int(row["rows"]) for row in stats),
        sequences=sum(int(row["sequences"]) for row in stats),
        tokens=sum(int(row["tokens"]) for row in stats),
        actors=actors,
        seconds=round(seconds, 3),
        steady_seconds=round(steady, 3),
        busy=round(working / (actors * steady), 4) if steady else None,
    )

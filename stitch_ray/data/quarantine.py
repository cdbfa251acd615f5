"""Rows that cannot be used: kept with source, line and reason, never dropped in silence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

_EXCERPT_CHARACTERS = 500


class BadRow(ValueError):
    """One input record cannot be used. The message is the reason that `quarantine.jsonl` shows."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """One line of `quarantine.jsonl`. `excerpt` holds at most 500 characters of the record."""

    source: str
    line: int
    reason: str
    excerpt: str = ""
    example_id: str | None = None

    @classmethod
    def of(cls, source: str, line: int, reason: str, raw: str = "", example_id: str | None = None) -> Quarantined:
        return cls(source, line, reason, raw[:_EXCERPT_CHARACTERS], example_id)

    def as_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}

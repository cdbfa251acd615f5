"""What of an answer's trace a client is shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_WORDS = frozenset(
    {"stage", "speaker", "route", "reason", "decision", "name", "finished", "changed_by", "kind", "action", "model"}
)
"""Keys whose strings are names that we gave. All other strings may be texts of models or of the question."""


def without_texts(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries without the text of any draft, turn or answer, wherever it stands in them."""
    return [_numbers(entry) for entry in entries]


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in entry.items():
        if isinstance(value, Mapping):
            kept[key] = _numbers(value)
        elif isinstance(value, bool | int | float | None) or (isinstance(value, str) and key in _WORDS):
            kept[key] = value
    return kept

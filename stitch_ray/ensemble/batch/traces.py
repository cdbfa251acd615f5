"""What the trace of a prediction tells about its two stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Stages:
    """Texts and confidences of both stages, None where there is none, and what the first one cost.

    `turns`: those of a dialogue, as the route told them.
    """

    draft: str | None
    draft_confidence: float | None
    refined: str | None
    final_confidence: float | None
    draft_calls: int
    draft_tokens: int
    draft_seconds: float
    turns: tuple[Mapping[str, Any], ...]


def read_trace(trace: Sequence[Mapping[str, Any]]) -> Stages:
    """Of a trace as `Prediction` has it; one from elsewhere may lack its texts."""
    named = {entry.get("stage"): entry for entry in trace if entry.get("stage") != "turn"}
    draft, score, rescore = (named.get(stage, {}) for stage in ("draft", "score", "rescore"))
    refined = draft.get("text") if rescore.get("same_as_draft") else rescore.get("text")
    return Stages(
        draft=draft.get("text"),
        draft_confidence=score.get("confidence"),
        refined=refined,
        final_confidence=rescore.get("confidence") if rescore else None,
        draft_calls=int(draft.get("calls") or 0),
        draft_tokens=int(draft.get("tokens") or 0),
        draft_seconds=float(draft.get("seconds") or 0) + float(score.get("seconds") or 0),
        turns=tuple(entry for entry in trace if entry.get("stage") == "turn"),
    )

"""Supervised fine-tuning: every answer of a conversation is learned, given all turns before it."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from stitch_ray.records import Example, Turn
from stitch_ray.training.objectives.base import Head, Rendered, Span


class SFT:
    """One record an example: its turns, with weight 1 on those of the assistant.

    A context stands behind the first question, after a blank line, so that instruction and input are both used.
    """

    name = "sft"
    head: Head = "causal_lm"

    def render(self, example: Example, rng: Random) -> Iterator[Rendered]:
        turns = _with_context(example)
        yield Rendered(tuple(Span(turn.content, float(turn.role == "assistant"), turn.role) for turn in turns))

    def question(self, example: Example) -> tuple[Turn, ...] | None:
        """All turns up to the last answer."""
        turns = _with_context(example)
        last = max((number for number, turn in enumerate(turns) if turn.role == "assistant"), default=0)
        return turns[: last + 1] if last else None


def _with_context(example: Example) -> tuple[Turn, ...]:
    turns = list(example.messages)
    asked = next((number for number, turn in enumerate(turns) if turn.role == "user"), None)
    if asked is not None and example.context:
        turns[asked] = Turn("user", f"{turns[asked].content}\n\n{example.context}")
    return tuple(turns)

"""What an objective is: it decides what is rendered of an example and which text carries loss.

Objectives are pure text. `encode` tokenises what they render, `losses` reduces it, and the training loop never asks
which objective it runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from random import Random
from typing import Literal, Protocol

from stitch_ray.records import Example, Turn

Head = Literal["causal_lm", "sequence_classification"]


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of text. `role` None: raw text, no template. A weight above 0 carries loss, in proportion."""

    text: str
    weight: float = 0.0
    role: str | None = None


@dataclass(frozen=True, slots=True)
class Rendered:
    """One record of the training data: turns, or raw text, but not both. `label`: classification heads only."""

    spans: tuple[Span, ...]
    label: float | None = None


class Objective(Protocol):
    """`render` makes any number of records of an example; all chance in it comes from `rng`.

    It raises `BadRow` with the reason for an example it cannot use. `question` is what a trained model can be asked:
    turns of which the last is the answer to compare with; None where the example holds no such question.
    """

    name: str
    head: Head

    def render(self, example: Example, rng: Random) -> Iterable[Rendered]: ...

    def question(self, example: Example) -> tuple[Turn, ...] | None: ...

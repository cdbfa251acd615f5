"""The meta-validator (EXAR, Longo et al. 2025): the model learns to say whether an answer is CORRECT or WRONG."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from stitch_ray.data.quarantine import BadRow
from stitch_ray.exclusion.prompts import validator_prompt
from stitch_ray.records import Example, Turn
from stitch_ray.training.objectives.base import Head, Rendered, Span
from stitch_ray.training.objectives.sft import SFT


class Validator:
    """One record an example: question and answer in one turn, the verdict as the reply that carries loss, weighted."""

    name = "validator"
    head: Head = "causal_lm"

    def render(self, example: Example, rng: Random) -> Iterator[Rendered]:
        turns = self.question(example)
        if turns is None:
            raise BadRow("objective validator needs an answer and its verdict (format judged_answer)")
        weights = [*[0.0] * (len(turns) - 1), example.weight]
        yield Rendered(
            tuple(Span(turn.content, weight, turn.role) for turn, weight in zip(turns, weights, strict=True))
        )

    def question(self, example: Example) -> tuple[Turn, ...] | None:
        """Whether the example's last answer is right, and the verdict as the answer to that."""
        turns = SFT().question(example)
        if turns is None or example.verdict is None or turns[-2].role != "user":
            return None
        return (*validator_prompt(turns[:-1], turns[-1].content), Turn("assistant", example.verdict))

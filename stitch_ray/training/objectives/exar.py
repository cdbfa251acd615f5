"""Exclusive-autoregressive fine-tuning (EXAR, Longo et al. 2025): the gold answer, told which answers are wrong."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from stitch_ray.data.quarantine import BadRow
from stitch_ray.exclusion.prompts import exclusion_prompt
from stitch_ray.records import Example, Turn
from stitch_ray.training.objectives.base import Head, Rendered, Span
from stitch_ray.training.objectives.sft import SFT


class Exar:
    """Records of an example, all with the gold answer: without exclusions, and with all `excluded` in one prompt.

    With two or more wrong answers there is a third record with some of them, drawn, since a model that is asked again
    meets one wrong answer before it meets several. Their order is drawn. A gold answer among the excluded is a BadRow:
    the published pipeline put the wrong answer in the place of the gold one, which taught the model to repeat it.
    """

    name = "exar"
    head: Head = "causal_lm"

    def render(self, example: Example, rng: Random) -> Iterator[Rendered]:
        turns = self.question(example)
        if turns is None:
            raise BadRow("the example asks no question that is answered")
        asked, gold = turns[:-1], turns[-1].content
        if any(answer.strip() == gold.strip() for answer in example.excluded):
            raise BadRow(f"the answer {gold.strip()[:40]!r} is to be given and excluded at a time")
        wrong = list(dict.fromkeys(answer.strip() for answer in example.excluded if answer.strip()))
        rng.shuffle(wrong)
        sizes = sorted({0, len(wrong)} | ({rng.randrange(1, len(wrong))} if len(wrong) > 1 else set()))
        for size in sizes:
            prompt = exclusion_prompt(asked, wrong[:size])
            spans = [Span(turn.content, 0.0, turn.role) for turn in prompt]
            yield Rendered((*spans, Span(gold, 1.0, "assistant")))

    def question(self, example: Example) -> tuple[Turn, ...] | None:
        """The bare question: nothing is excluded at first."""
        turns = SFT().question(example)
        return None if turns is None or turns[-2].role != "user" else turns

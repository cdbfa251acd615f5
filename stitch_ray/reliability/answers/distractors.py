"""Wrong and half-right answers written on demand (after Stitch's sampler), as training material for a scorer.

Whoever writes them is shown the reference, so they are not samples of any model's own answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from string import Template
from typing import Protocol

from stitch_ray.config.sample_answers import DistractorsConfig
from stitch_ray.engines.base import EngineError, Generation, Request, Sampling
from stitch_ray.records import Turn, content_hash
from stitch_ray.reliability.answers.replies import Reply, ReplyError, parse_answers


@dataclass(frozen=True, slots=True, kw_only=True)
class DistractorItem:
    """A question to write answers to. `item_id` names it in errors and makes its seed."""

    item_id: str
    question: str
    reference: str
    context: str | None = None


class Generate(Protocol):
    """`Engine.generate`, or `OpenAIEngine.generate_many`."""

    def __call__(self, requests: Sequence[Request], /) -> list[list[Generation] | EngineError]: ...


@dataclass(slots=True)
class DistractorCounts:
    """asked: questions. retried: further replies asked for. repaired: questions whose JSON had to be mended. failed:
    questions without answers. repeats: answers dropped because the same reply had them already."""

    asked: int = 0
    retried: int = 0
    repaired: int = 0
    failed: int = 0
    repeats: int = 0


@dataclass(frozen=True, slots=True)
class Distractors:
    """`answers`: for every item its answers, or none. `failures`: item id -> why it has none."""

    answers: tuple[tuple[str, ...], ...]
    failures: dict[str, str]
    counts: DistractorCounts = field(default_factory=DistractorCounts)


def ask(
    generate: Generate, items: Sequence[DistractorItem], config: DistractorsConfig, *, seed: int = 0
) -> Distractors:
    """`config.num` answers for every item; fewer where a reply repeats itself.

    A reply that cannot be used, and an EngineError that may pass, is asked for again with another seed, `attempts`
    times in all. At temperature 0 another seed changes nothing, so a useless reply is final.
    An answer that equals the reference is kept: its label tells.
    """
    counts = DistractorCounts(asked=len(items))
    found: dict[int, tuple[str, ...]] = {}
    failures: dict[int, str] = {}
    pending = list(range(len(items)))
    for attempt in range(config.attempts):
        if not pending:
            break
        counts.retried += len(pending) if attempt else 0
        replies = generate([distractor_request(items[index], config, attempt, seed) for index in pending])
        again = []
        for index, generated in zip(pending, replies, strict=True):
            try:
                reply = _read(generated, config.num)
            except (EngineError, ReplyError) as error:
                passing = error.retryable if isinstance(error, EngineError) else config.temperature > 0
                failures[index] = error.reason if isinstance(error, EngineError) else str(error)
                again += [index] if passing else []
                continue
            failures.pop(index, None)
            found[index] = _distinct(reply.answers)
            counts.repaired += reply.repaired
            counts.repeats += len(reply.answers) - len(found[index])
        pending = again
    counts.failed = len(failures)
    return Distractors(
        answers=tuple(found.get(index, ()) for index in range(len(items))),
        failures={items[index].item_id: reason for index, reason in sorted(failures.items())},
        counts=counts,
    )


def distractor_request(item: DistractorItem, config: DistractorsConfig, attempt: int, seed: int) -> Request:
    """The prompt for one item. Its seed depends on item and attempt alone, not on what it is asked together with."""
    described = {"question": item.question, "context": item.context, "reference": item.reference}
    shown = {name: text for name, text in described.items() if text is not None}
    text = prompt_text().substitute(num=config.num, item=json.dumps(shown, ensure_ascii=False, indent=1))
    return Request(
        request_id=item.item_id,
        prompt=(Turn("user", text),),
        sampling=Sampling(
            max_tokens=config.max_tokens,
            temperature=config.temperature,
            seed=int(content_hash([seed, item.item_id, attempt])[:8], 16),
        ),
    )


@cache
def prompt_text() -> Template:
    return Template(resources.files("stitch_ray.prompts").joinpath("distractors.txt").read_text("utf-8").rstrip())


def _read(generated: list[Generation] | EngineError, num: int) -> Reply:
    if isinstance(generated, EngineError):
        raise generated
    return parse_answers(generated[0].text, num, cut=generated[0].finish_reason == "length")


def _distinct(answers: Sequence[str]) -> tuple[str, ...]:
    """Without repeats, but for case and white space; the first of each is kept."""
    kept: dict[str, str] = {}
    for answer in answers:
        kept.setdefault(" ".join(answer.split()).casefold(), answer)
    return tuple(kept.values())

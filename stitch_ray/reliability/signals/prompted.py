"""Signals that ask the model about an answer: P(True) and a confidence in words."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib import resources
from string import Template

import numpy as np
from numpy.typing import NDArray

from stitch_ray.engines.base import Engine, EngineError, Request, Sampling
from stitch_ray.records import Turn

Turns = tuple[Turn, ...]

_REPLY_TOKENS = 12
_NUMBER = re.compile(r"(\d{1,3}(?:\.\d+)?) ?(%?)\.?")


def p_true(
    engine: Engine, asked: Sequence[tuple[Turns, str]], problems: Counter[str] | None = None
) -> NDArray[np.float64]:
    """Probability that the model calls each (question, answer) true (Kadavath et al. 2022, Sec. 3), (asked,) in [0, 1].

    See `probability_of`. No sampled answers are shown beside the one in question. NaN for a blank answer, and where the
    engine refuses; `problems` counts the latter by reason.
    """
    values = np.full(len(asked), math.nan)
    slots = _slots(asked)
    prompts = [_prompt("p_true.txt", *key) for key in slots]
    for own, found in zip(slots.values(), probability_of(engine, prompts, "True", "False"), strict=True):
        if isinstance(found, EngineError):
            _count(problems, "p_true", found)
        else:
            values[own] = found
    return values


def probability_of(
    engine: Engine, prompts: Sequence[Turns], word: str, other: str, *, adapter: str | None = None
) -> list[float | EngineError]:
    """P(word) / (P(word) + P(other)) as the reply to each prompt, in [0, 1], or why the engine refuses.

    A word's probability is the sum over its spelling with and without a space before it: a template decides which of
    them begins a reply. Nothing is generated. `adapter`: the one that replies.
    """
    forms = reply_forms(word, other)
    requests = [
        Request(request_id=f"{word}-{number}", prompt=prompt, continuation=text, adapter=adapter)
        for number, prompt in enumerate(prompts)
        for text in forms
    ]
    found = engine.loglikelihood(requests) if requests else []
    return [from_likelihoods(found[start : start + len(forms)]) for start in range(0, len(found), len(forms))]


def reply_forms(word: str, other: str) -> tuple[str, ...]:
    """The continuations whose likelihoods `from_likelihoods` takes, in its order."""
    return (f" {word}", f" {other}", word, other)


def from_likelihoods(found: Sequence[tuple[float, bool] | EngineError]) -> float | EngineError:
    """The probability of the first word; an error if neither spelling of the pair could be had."""
    first, second = [], []
    for one, two in zip(found[::2], found[1::2], strict=True):
        if not isinstance(one, EngineError) and not isinstance(two, EngineError):
            first.append(one[0])
            second.append(two[0])
    if not first:
        return next(one for one in found if isinstance(one, EngineError))
    difference = np.logaddexp.reduce(second) - np.logaddexp.reduce(first)
    return float(1 / (1 + np.exp(np.clip(difference, -700, 700))))


def verbalized_confidence(
    engine: Engine, asked: Sequence[tuple[Turns, str]], problems: Counter[str] | None = None
) -> NDArray[np.float64]:
    """The confidence that the model puts in words for each (question, answer), (asked,) in [0, 1], greedily decoded.

    NaN for a blank answer, where the engine refuses, and for a reply that `parse_percentage` does not take; `problems`
    counts the last two by reason.
    """
    values = np.full(len(asked), math.nan)
    slots = _slots(asked)
    sampling = Sampling(max_tokens=_REPLY_TOKENS)
    requests = [
        Request(request_id=f"verbalized-{number}", prompt=_prompt("verbalized_confidence.txt", *key), sampling=sampling)
        for number, key in enumerate(slots)
    ]
    for own, found in zip(slots.values(), engine.generate(requests) if requests else [], strict=True):
        if isinstance(found, EngineError):
            _count(problems, "verbalized_confidence", found)
            continue
        value = parse_percentage(found[0].text)
        if math.isnan(value) and problems is not None:
            problems["verbalized_confidence: the reply is no number from 0 to 100"] += 1
        values[own] = value
    return values


def parse_percentage(reply: str) -> float:
    """A reply that is a number from 0 to 100, as a share; NaN for any other.

    Read is the first line that is not blank: a number, "%" or a full stop behind it, and nothing else ("85", "85 %.").
    A number with decimals up to 1 and no "%" could mean a share as well as a percentage ("0.85", "1.0"): NaN.
    """
    lines = reply.strip().splitlines()
    match = _NUMBER.fullmatch(lines[0].strip()) if lines else None
    if match is None:
        return math.nan
    number, sign = float(match[1]), match[2]
    if number > 100 or ("." in match[1] and number <= 1 and not sign):
        return math.nan
    return number / 100


def _slots(asked: Sequence[tuple[Turns, str]]) -> dict[tuple[Turns, str], list[int]]:
    """Positions of every distinct question and answer that is not blank: asked once."""
    slots: dict[tuple[Turns, str], list[int]] = {}
    for position, (turns, answer) in enumerate(asked):
        if answer.strip():
            slots.setdefault((turns, answer.strip()), []).append(position)
    return slots


def _prompt(name: str, turns: Turns, answer: str) -> Turns:
    """The conversation with its last turn replaced by the question about the answer to it."""
    return (*turns[:-1], Turn("user", _template(name).substitute(question=turns[-1].content, answer=answer)))


@cache
def _template(name: str) -> Template:
    return Template(resources.files("stitch_ray.prompts").joinpath(name).read_text("utf-8").strip())


def _count(problems: Counter[str] | None, signal: str, error: EngineError) -> None:
    if problems is not None:
        problems[f"{signal}: {error.reason}"] += 1

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

_FORMS = ((" True", " False"), ("True", "False"))
_REPLY_TOKENS = 12
_NUMBER = re.compile(r"(\d{1,3}(?:\.\d+)?) ?(%?)\.?")


def p_true(
    engine: Engine, asked: Sequence[tuple[Turns, str]], problems: Counter[str] | None = None
) -> NDArray[np.float64]:
    """Probability that the model calls each (question, answer) true (Kadavath et al. 2022, Sec. 3), (asked,) in [0, 1].

    P(True) / (P(True) + P(False)), each word's probability being the sum over its spelling with and without a space
    before it: a template decides which of them begins a reply. No sampled answers are shown beside the one in question.
    NaN for a blank answer, and where the engine refuses; `problems` counts the latter by reason.
    """
    values = np.full(len(asked), math.nan)
    slots = _slots(asked)
    requests = [
        Request(request_id=f"p_true-{number}", prompt=_prompt("p_true.txt", *key), continuation=word)
        for number, key in enumerate(slots)
        for form in _FORMS
        for word in form
    ]
    found = iter(engine.loglikelihood(requests) if requests else [])
    for own in slots.values():
        likelihoods = [[next(found), next(found)] for _ in _FORMS]
        true, false = [], []
        for is_true, is_false in likelihoods:
            if not isinstance(is_true, EngineError) and not isinstance(is_false, EngineError):
                true.append(is_true[0])
                false.append(is_false[0])
        if true:
            difference = np.logaddexp.reduce(false) - np.logaddexp.reduce(true)
            values[own] = 1 / (1 + np.exp(np.clip(difference, -700, 700)))
        else:
            _count(
                problems, "p_true", next(one for form in likelihoods for one in form if isinstance(one, EngineError))
            )
    return values


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

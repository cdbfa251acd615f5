"""Members whose skill is known: what they answer is drawn, but always the same for the same question."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from stitch_ray.engines.base import Generation, Request
from stitch_ray.ensemble.remote import RemoteAuxiliary
from stitch_ray.ensemble.types import Answer, Question

KNOWS, MISLEADS = 0.55, 0.08
"""How often an auxiliary knows the answer, and how often it is sure of a wrong one; else it keeps what was said."""

SURENESS = 1.8
"""The scorer's log-odds are drawn around plus this for a right answer and minus this for a wrong one, with deviation 1."""


def right(question: str) -> str:
    """The answer to `question <number>`."""
    return f"right {question.rsplit(maxsplit=1)[-1]}"


def uniform(*parts: str) -> float:
    """In (0, 1), from a hash of the parts."""
    drawn = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).digest()
    return (int.from_bytes(drawn, "big") + 0.5) / 2**64


@dataclass(frozen=True)
class SkilledPrimary:
    """Right on a share `skill` of the questions."""

    skill: float
    fingerprint: str = "primary"
    names: frozenset[str] = frozenset()

    async def answer(self, question: Question) -> Answer:
        knows = uniform("primary", question.question) < self.skill
        return Answer(text=right(question.question) if knows else "wrong at first")

    async def signals(self, question: Question, text: str, samples: Sequence[str]) -> Answer:
        return Answer(text=text)


@dataclass(frozen=True)
class SkilledScorer:
    fingerprint: str = "scorer"
    signals: frozenset[str] = frozenset()

    async def score(self, question: Question, text: str, signals: Mapping[str, float | None]) -> float:
        noise = NormalDist().inv_cdf(uniform("scorer", question.question, text))
        centre = SURENESS if text == right(question.question) else -SURENESS
        return 1 / (1 + math.exp(-(centre + noise)))


def skilled_auxiliary(name: str) -> RemoteAuxiliary:
    """Reads question and last answer from the prompt of the dialogue, as a model would."""

    async def call(method: str, request: Request) -> list[Generation]:
        assert not isinstance(request.prompt, str)
        data = _data(request.prompt[-1].content)
        question = data["question"]
        drawn = uniform(name, question)
        before = data["said"][-1]["answer"] if data["said"] else data["draft"]
        mine = right(question) if drawn < KNOWS else "wrong at last" if drawn > 1 - MISLEADS else before
        reply = json.dumps({"comment": "", "answer": mine})
        return [Generation(text=reply, token_ids=(1,), finish_reason="stop", prompt_tokens=1)]

    described = {"name": name, "fingerprint": name, "dtype": "none", "max_context": 4096, "num_parameters": 1}
    return RemoteAuxiliary(call, described)


def _data(text: str) -> dict[str, Any]:
    """The JSON object that stands in a speaker's prompt."""
    found: dict[str, Any] = json.JSONDecoder().raw_decode(text, text.index("{"))[0]
    return found

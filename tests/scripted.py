"""Members of an ensemble that do what a test tells them."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from stitch_ray.engines.base import EngineInfo, Generation, Request, TokenStatistics
from stitch_ray.ensemble.types import Answer, Question
from stitch_ray.reliability.policy import NO_ROUTE, Fingerprints, Policy, Target


def said(answer: str, comment: str = "a reason") -> str:
    return json.dumps({"comment": comment, "answer": answer})


class ScriptedEngine:
    """Gives `replies` one after the other: texts, exceptions to raise, or seconds to take. Keeps the requests."""

    def __init__(self, *replies: str | Exception | float, name: str = "engine", finish: str = "stop") -> None:
        self.info = EngineInfo(
            model=name,
            fingerprint=f"fingerprint of {name}",
            dtype="float32",
            max_context=512,
            num_parameters=None,
            methods=frozenset({"generate"}),
        )
        self.requests: list[Request] = []
        self.cancelled = 0
        self._replies = list(replies)
        self._finish: Any = finish

    async def generate(self, request: Request) -> list[Generation]:
        self.requests.append(request)
        reply = self._replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, float):
            await self._sleep(reply)
            reply = said("late")
        text = str(reply)
        return [Generation(text=text, token_ids=tuple(range(10)), finish_reason=self._finish, prompt_tokens=100)]

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def loglikelihood(self, request: Request) -> tuple[float, bool]:
        raise NotImplementedError

    async def token_statistics(self, request: Request) -> TokenStatistics:
        raise NotImplementedError

    async def stream(self, request: Request) -> AsyncIterator[str]:
        for generation in await self.generate(request):
            yield generation.text

    async def close(self) -> None: ...


class ScriptedPrimary:
    """Answers `draft`. `fails`, `seconds`: what its every call raises, or takes."""

    fingerprint = "primary"

    def __init__(self, draft: str = "Rome", *, fails: Exception | None = None, seconds: float = 0.0) -> None:
        self.draft, self.fails, self.seconds = draft, fails, seconds
        self.asked: list[str] = []
        self.measured: list[str] = []

    async def answer(self, question: Question) -> Answer:
        self.asked.append(question.question)
        return await self._done(self.draft, ("a sample",))

    async def signals(self, question: Question, text: str, samples: Sequence[str]) -> Answer:
        self.measured.append(text)
        return await self._done(text, tuple(samples))

    async def _done(self, text: str, samples: tuple[str, ...]) -> Answer:
        if self.seconds:
            await asyncio.sleep(self.seconds)
        if self.fails is not None:
            raise self.fails
        return Answer(text=text, signals={"perplexity": 1.5, "p_true": math.nan}, calls=1, tokens=50, samples=samples)


class ScriptedScorer:
    """Confidence by answer: a number, None, an exception to raise, or seconds to take as a text such as "60 s"."""

    fingerprint = "scorer"
    signals = frozenset({"perplexity"})

    def __init__(self, confidences: Mapping[str, float | Exception | str | None]) -> None:
        self.confidences = confidences
        self.scored: list[tuple[str, Mapping[str, float | None]]] = []

    async def score(self, question: Question, text: str, signals: Mapping[str, float | None]) -> float | None:
        self.scored.append((text, signals))
        found = self.confidences[text]
        if isinstance(found, Exception):
            raise found
        if isinstance(found, str):
            await asyncio.sleep(float(found.split()[0]))
            return 1.0
        return found


def policy_for(
    threshold: float | None, *, route: str = NO_ROUTE, auxiliaries: tuple[str, ...] = (), target_risk: float = 0.1
) -> Policy:
    """One promise for all tasks, made for scripted members."""
    target = Target(
        task=None,
        target_risk=target_risk,
        delta=0.1,
        threshold=threshold,
        n_calibration=100,
        num_accepted=50,
        empirical_risk=0.01,
        coverage=0.5,
        p_value=0.01,
        method="ltt",
        reason=None if threshold is not None else "not reached",
    )
    return Policy((target,), Fingerprints("primary", auxiliaries, "scorer", route), {})

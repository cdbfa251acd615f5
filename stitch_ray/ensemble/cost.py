"""What calls of models cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from stitch_ray.engines.base import AsyncEngine, EngineInfo, Generation, Request, TokenStatistics


def tokens_of(answers: Sequence[Generation]) -> int:
    """Tokens read, the prompt once, and written. Words stand for tokens that a server does not tell."""
    return max((answer.prompt_tokens for answer in answers), default=0) + sum(map(_written, answers))


class Metered:
    """An engine as one answer uses it: with the adapter of its task, and counted. `render` makes ids of prompts."""

    def __init__(self, engine: AsyncEngine, render: Callable[[Request], Request], adapter: str | None) -> None:
        self._engine = engine
        self._render = render
        self._adapter = adapter
        self.calls = 0
        self.tokens = 0

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    async def generate(self, request: Request) -> list[Generation]:
        answers = await self._engine.generate(self._ready(request))
        self._count(tokens_of(answers))
        return answers

    async def loglikelihood(self, request: Request) -> tuple[float, bool]:
        ready = self._ready(request)
        found = await self._engine.loglikelihood(ready)
        self._count(len(ready.prompt) + 1)  # the words asked about are a token in most vocabularies
        return found

    async def token_statistics(self, request: Request) -> TokenStatistics:
        ready = self._ready(request)
        found = await self._engine.token_statistics(ready)
        self._count(len(ready.prompt) + len(found.logprobs))
        return found

    def _ready(self, request: Request) -> Request:
        return self._render(replace(request, adapter=self._adapter))

    def _count(self, tokens: int) -> None:
        self.calls += 1
        self.tokens += tokens


def _written(answer: Generation) -> int:
    if answer.token_ids:
        return len(answer.token_ids)
    if answer.completion_tokens is not None:
        return answer.completion_tokens
    return len(answer.text.split()) if answer.logprobs is None else len(answer.logprobs)

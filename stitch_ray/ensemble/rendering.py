"""A member's engine, asynchronous: conversations go through the member's template, as `sample-answers` renders them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

from stitch_ray.data.quarantine import BadRow
from stitch_ray.engines.base import AsyncEngine, EngineError, EngineInfo, Generation, Request, TokenStatistics
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.records import Turn
from stitch_ray.reliability.answers.questions import prompt_ids


class RenderedEngine:
    """`engine` with every prompt of turns rendered by `template`. One that does not take a conversation is an EngineError.

    `adapters`: templates by adapter, for each may have been trained with its own. `fold_system`: where the template has
    no system role, its text goes in front of the user's first turn.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        template: ChatTemplate,
        info: EngineInfo,
        *,
        adapters: Mapping[str, ChatTemplate] = {},
        fold_system: bool = False,
    ) -> None:
        self.info = info
        self._engine = engine
        self._template = template
        self._adapters = adapters
        self._fold = fold_system and not _takes_system(template)

    def rendered(self, request: Request) -> Request:
        """`request` with token ids as its prompt. Raises EngineError."""
        if isinstance(request.prompt, str):
            return request
        turns = tuple(turn for turn in request.prompt if isinstance(turn, Turn))
        if not turns:
            return request
        template = self._template if request.adapter is None else self._adapters.get(request.adapter, self._template)
        try:
            return replace(request, prompt=prompt_ids(_folded(turns) if self._fold else turns, template))
        except BadRow as error:
            raise EngineError(request.request_id, str(error)) from error

    async def generate(self, request: Request) -> list[Generation]:
        return await self._engine.generate(self.rendered(request))

    async def loglikelihood(self, request: Request) -> tuple[float, bool]:
        return await self._engine.loglikelihood(self.rendered(request))

    async def token_statistics(self, request: Request) -> TokenStatistics:
        return await self._engine.token_statistics(self.rendered(request))

    def stream(self, request: Request) -> AsyncIterator[str]:
        return self._engine.stream(self.rendered(request))

    async def close(self) -> None:
        await self._engine.close()


def _takes_system(template: ChatTemplate) -> bool:
    try:
        text = template.render((Turn("system", "instruction"), Turn("user", "question")), add_generation_prompt=True)
    except BadRow:
        return False
    return "instruction" in text


def _folded(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    system = [turn.content for turn in turns if turn.role == "system"]
    rest = [turn for turn in turns if turn.role != "system"]
    first = next((number for number, turn in enumerate(rest) if turn.role == "user"), None)
    if not system or first is None:
        return turns
    rest[first] = Turn("user", "\n\n".join([*system, rest[first].content]))
    return tuple(rest)

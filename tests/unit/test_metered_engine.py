"""What calls of models cost: every call once, the prompt of several samples once, and words where tokens are not told."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from stitch_ray.engines.base import EngineError, Generation, Request, TokenStatistics
from stitch_ray.ensemble.cost import Metered, tokens_of
from tests.scripted import ScriptedEngine


def answer(text: str = "one two three", **values: Any) -> Generation:
    return Generation(**{"text": text, "token_ids": (), "finish_reason": "stop", "prompt_tokens": 7, **values})


@pytest.mark.parametrize(
    ("answers", "tokens"),
    [
        ([answer(token_ids=(1, 2))], 7 + 2),
        ([answer(token_ids=(1, 2)), answer(token_ids=(3,))], 7 + 2 + 1),
        ([answer(completion_tokens=5)], 7 + 5),
        ([answer(completion_tokens=0)], 7),
        ([answer(logprobs=(-1.0, -2.0, -3.0, -4.0))], 7 + 4),
        ([answer()], 7 + 3),
        ([], 0),
    ],
    ids=["ids", "samples", "told", "told none", "logprobs", "words", "nothing"],
)
def test_tokens_are_counted_by_what_an_engine_tells_of_them(answers: list[Generation], tokens: int) -> None:
    assert tokens_of(answers) == tokens


class Engine(ScriptedEngine):
    async def loglikelihood(self, request: Request) -> tuple[float, bool]:
        self.requests.append(request)
        return -1.0, True

    async def token_statistics(self, request: Request) -> TokenStatistics:
        self.requests.append(request)
        return TokenStatistics(logprobs=(-1.0, -2.0), entropies=None, margins=(0.5, 0.5))


def rendered(request: Request) -> Request:
    return replace(request, prompt=(1, 2, 3, 4))


def test_calls_and_tokens_of_every_method_add_up() -> None:
    engine = Engine("yes")
    metered = Metered(engine, rendered, None)
    request = Request(request_id="q", prompt="text", continuation="x")

    async def run() -> list[Any]:
        return [
            await metered.generate(request),
            await metered.loglikelihood(request),
            await metered.token_statistics(request),
        ]

    generated, likelihood, statistics = asyncio.run(run())
    assert (generated[0].text, likelihood, statistics.logprobs) == ("yes", (-1.0, True), (-1.0, -2.0))
    assert metered.calls == 3
    assert metered.tokens == (100 + 10) + (4 + 1) + (4 + 2)
    assert metered.info is engine.info


def test_a_request_goes_out_rendered_and_with_the_adapter_of_its_task() -> None:
    engine = Engine("yes")
    seen: list[str | None] = []

    def render(request: Request) -> Request:
        seen.append(request.adapter)  # the template is that of the adapter
        return rendered(request)

    asyncio.run(Metered(engine, render, "blue").generate(Request(request_id="q", prompt="text", adapter="red")))
    assert seen == ["blue"]
    assert (engine.requests[0].prompt, engine.requests[0].adapter) == ((1, 2, 3, 4), "blue")


def test_a_call_that_failed_is_not_counted() -> None:
    metered = Metered(Engine(EngineError("q", "too long")), rendered, None)
    with pytest.raises(EngineError, match="too long"):
        asyncio.run(metered.generate(Request(request_id="q", prompt="text")))
    assert (metered.calls, metered.tokens) == (0, 0)

"""The primary: its greedy answer, with the signals of `sample-answers`, and the signals of answers it did not give."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

from stitch_ray.config.ensemble import EnsembleConfig
from stitch_ray.config.sample_answers import SamplesConfig
from stitch_ray.engines.base import AsyncEngine, Generation, Request
from stitch_ray.ensemble.adapters import Adapters
from stitch_ray.ensemble.asking import Asked, asked
from stitch_ray.ensemble.cost import Metered
from stitch_ray.ensemble.online_signals import OnlineSignals, check_signals
from stitch_ray.ensemble.types import Answer, Question
from stitch_ray.reliability.answers.sampling import GREEDY, SAMPLE, requests_for
from stitch_ray.reliability.signals.compute import SignalItem

T = TypeVar("T")


class PrimaryModel:
    """`engine` as the primary of `config`. `names`: signals that come with an answer; `render`: prompts to token ids.

    Raises UserError, naming the key, for signals that the configuration leaves off or the engine cannot give.
    """

    def __init__(
        self,
        config: EnsembleConfig,
        engine: AsyncEngine,
        names: frozenset[str],
        *,
        fingerprint: str,
        render: Callable[[Request], Request] = lambda request: request,
        adapters: Adapters | None = None,
        seed: int = 0,
    ) -> None:
        check_signals(config, names)
        self.fingerprint = fingerprint
        self.names = names
        self.tasks = frozenset[str]() if adapters is None else adapters.tasks
        self._engine = engine
        self._render = render
        self._adapters = adapters
        self._seed = seed
        self._signals = OnlineSignals(names, config.signals)
        self._is_server = config.primary.endpoint is not None
        self._samples = SamplesConfig(
            greedy=True,
            num=config.signals.samples if self._signals.from_samples else 0,
            temperature=config.signals.temperature,
            top_p=config.signals.top_p,
            max_tokens=config.primary.max_tokens,
            stop=config.primary.stop,
        )

    async def answer(self, question: Question, *, adapter: str | None = None) -> Answer:
        """The greedy answer. `adapter`: the task whose adapter answers; None: that of the question's task, if any.

        Raises EngineError, and ValueError for a question that is none.
        """
        shown = asked(question)
        async with self._using(question, adapter) as name:
            engine = Metered(self._engine, self._render, name)
            requests = requests_for(shown, self._samples, self._seed, together=self._is_server)
            lots = await _together([engine.generate(self._told(one.kind, one.request)) for one in requests])
            answers = {
                kind: [answer for one, lot in zip(requests, lots, strict=True) if one.kind == kind for answer in lot]
                for kind in (GREEDY, SAMPLE)
            }
            draft = answers[GREEDY][0]
            samples = tuple(answer.text for answer in answers[SAMPLE])
            signals = await self._signals.of(_item(shown, draft), samples, engine)
        return Answer(text=draft.text, signals=signals, calls=engine.calls, tokens=engine.tokens, samples=samples)

    async def signals(
        self, question: Question, text: str, samples: Sequence[str], *, adapter: str | None = None
    ) -> Answer:
        """`text` with its signals, as if it were the primary's; `samples` are those of the draft. Raises as `answer`."""
        shown = asked(question)
        async with self._using(question, adapter) as name:
            engine = Metered(self._engine, self._render, name)
            item = SignalItem(
                answer_id="", question_id=shown.example_id, turns=shown.turns, answer=text, kind="refined"
            )
            signals = await self._signals.of(item, samples, engine)
        return Answer(text=text, signals=signals, calls=engine.calls, tokens=engine.tokens, samples=tuple(samples))

    async def close(self) -> None:
        self._signals.close()
        await self._engine.close()

    def _using(self, question: Question, adapter: str | None) -> AbstractAsyncContextManager[str | None]:
        if self._adapters is None:
            return nullcontext()
        return self._adapters.using(question.task if adapter is None else adapter)

    def _told(self, kind: str, request: Request) -> Request:
        """Only the draft's tokens are measured; a server does not even count them otherwise."""
        stats = kind == GREEDY and (
            self._signals.from_tokens or (self._is_server and "answer_length" in self._signals.names)
        )
        return replace(request, sampling=replace(request.sampling, token_stats=stats))


def _item(shown: Asked, draft: Generation) -> SignalItem:
    return SignalItem(
        answer_id="",
        question_id=shown.example_id,
        turns=shown.turns,
        answer=draft.text,
        kind=GREEDY,
        token_ids=draft.token_ids or None,
        logprobs=draft.logprobs,
        entropies=draft.entropies,
        margins=draft.margins,
    )


async def _together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, or the first exception, with the rest cancelled."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()

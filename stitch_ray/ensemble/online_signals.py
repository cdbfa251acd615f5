"""Signals of one answer as it is given: those that `sample-answers` computes, from as few calls as they take."""

from __future__ import annotations

import asyncio
import math
from asyncio import AbstractEventLoop
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

from stitch_ray.config.ensemble import EnsembleConfig, OnlineSignalsConfig
from stitch_ray.config.reliability import SIGNAL_NAMES, SignalName
from stitch_ray.config.sample_answers import SignalsConfig
from stitch_ray.engines.base import EngineError, EngineInfo, Request
from stitch_ray.ensemble.cost import Metered
from stitch_ray.errors import UserError
from stitch_ray.reliability.signals.compute import SignalItem, compute_signals, needs_engine, unsupported
from stitch_ray.reliability.signals.equivalence import Equivalence, load_equivalence
from stitch_ray.reliability.signals.registry import FROM_PROMPTS, FROM_SAMPLES, FROM_TOKENS

_THREADS = 4


def check_signals(config: EnsembleConfig, names: frozenset[str]) -> None:
    """Raises UserError, naming the key, for signals that the scorer needs and this ensemble cannot or may not give."""
    unknown = sorted(names - set(SIGNAL_NAMES))
    if unknown:
        raise UserError(f"scorer: it needs signals that nobody here computes: {', '.join(unknown)}")
    wanted, online = ordered(names), config.signals
    kind = config.primary.model.engine if config.primary.model else "endpoint"
    missing = unsupported(wanted, kind)
    if missing:
        raise UserError(f"primary: the scorer needs {', '.join(missing)}, which cannot be had from {kind}")
    sampled, prompted = FROM_SAMPLES & names, FROM_PROMPTS & names
    if sampled and not online.samples:
        raise UserError(
            f"signals.samples: the scorer needs {', '.join(sorted(sampled))}, which compare samples; "
            "give samples.num of its sample-answers"
        )
    if prompted and not online.prompted:
        raise UserError(f"signals.prompted: the scorer needs {', '.join(sorted(prompted))}; write prompted: true")
    of_tokens = (FROM_TOKENS | {"answer_length"}) & names
    if kind == "endpoint" and config.route != "none" and of_tokens:
        raise UserError(
            f"primary.endpoint: the scorer needs {', '.join(sorted(of_tokens))} of refined answers, and a "
            "server tells nothing about texts it did not write; write route: none, or give a local model"
        )


def ordered(names: frozenset[str]) -> list[SignalName]:
    return [name for name in SIGNAL_NAMES if name in names]


class OnlineSignals:
    """Computes the signals `names`. The model that compares samples, if there is one, is loaded here."""

    def __init__(self, names: frozenset[str], config: OnlineSignalsConfig) -> None:
        self.names = names
        self._own = ordered(names - FROM_SAMPLES)
        self._sampled = ordered(names & FROM_SAMPLES)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="signals")
        self._comparing = asyncio.Lock()
        self._equivalence: Equivalence | None = None
        if self._sampled:
            similarity = SignalsConfig(
                names=[], similarity=config.similarity, encoder=config.encoder, min_cosine=config.min_cosine
            )
            self._equivalence = load_equivalence(similarity)

    @property
    def from_tokens(self) -> bool:
        """Whether statistics of an answer's tokens are of use."""
        return bool(FROM_TOKENS & self.names)

    @property
    def from_samples(self) -> bool:
        return bool(self._sampled)

    async def of(self, item: SignalItem, samples: Sequence[str], engine: Metered) -> dict[str, float | None]:
        """Signal -> value, None where it is not defined or could not be had. Raises retryable EngineErrors."""
        item = await self._with_statistics(item, engine)
        loop = asyncio.get_running_loop()
        found: dict[SignalName, Any] = {}
        if FROM_PROMPTS & self.names:
            found |= await self._prompted(item, engine)
        elif self._own:
            found |= compute_signals(self._own, [item])
        if self._sampled:
            beside = [
                replace(_bare(item), answer_id=f"sample-{n}", answer=s, kind="sample") for n, s in enumerate(samples)
            ]
            async with self._comparing:  # one model, not made for two threads
                compare = partial(compute_signals, self._sampled, [_bare(item), *beside], equivalence=self._equivalence)
                found |= await loop.run_in_executor(self._threads, compare)
        values = {name: float(column[0]) for name, column in found.items()}
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _prompted(self, item: SignalItem, engine: Metered) -> dict[SignalName, Any]:
        """All signals but those from samples; a thread waits for what the engine is asked."""
        loop = asyncio.get_running_loop()
        seen: Any = _Seen(engine, loop)
        try:
            return await loop.run_in_executor(self._threads, partial(compute_signals, self._own, [item], engine=seen))
        finally:
            seen.leave()

    async def _with_statistics(self, item: SignalItem, engine: Metered) -> SignalItem:
        """By the asynchronous engine, so that other questions share the forward."""
        names = [name for name in self._own if name not in FROM_PROMPTS]
        if not needs_engine(names, [item]) or "token_statistics" not in engine.info.methods:
            return item
        continuation = item.answer if item.token_ids is None else item.token_ids
        request = Request(request_id=f"{item.question_id}/statistics", prompt=item.turns, continuation=continuation)
        try:
            told = await engine.token_statistics(request)
        except EngineError as error:
            if error.retryable:
                raise
            return item
        return replace(
            item,
            logprobs=told.logprobs if item.logprobs is None else item.logprobs,
            entropies=told.entropies if item.entropies is None else item.entropies,
            margins=told.margins if item.margins is None else item.margins,
        )


class _Seen:
    """An asynchronous engine, seen from a thread beside its event loop: as much of it as prompted signals use."""

    def __init__(self, engine: Metered, loop: AbstractEventLoop) -> None:
        self._engine = engine
        self._loop = loop
        self._asking: Future[list[Any]] | None = None
        self._left = False

    def leave(self) -> None:
        """Ask no longer: who waits for an answer that nobody wants would hold its thread."""
        self._left = True
        if self._asking is not None:
            self._asking.cancel()

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    def generate(self, requests: Sequence[Request]) -> list[Any]:
        return self._wait(self._engine.generate, requests)

    def loglikelihood(self, requests: Sequence[Request]) -> list[Any]:
        return self._wait(self._engine.loglikelihood, requests)

    def token_statistics(self, requests: Sequence[Request]) -> list[Any]:
        return self._wait(self._engine.token_statistics, requests)

    def _wait(self, ask: Callable[[Request], Coroutine[Any, Any, Any]], requests: Sequence[Request]) -> list[Any]:
        async def together() -> list[Any]:
            return await asyncio.gather(*map(ask, requests), return_exceptions=True)

        if self._left:
            raise CancelledError
        self._asking = asyncio.run_coroutine_threadsafe(together(), self._loop)
        results = self._asking.result()
        for result in results:
            if isinstance(result, BaseException) and (not isinstance(result, EngineError) or result.retryable):
                raise result
        return results


def _bare(item: SignalItem) -> SignalItem:
    return replace(item, token_ids=None, logprobs=None, entropies=None, margins=None)

"""The members of an ensemble that live elsewhere, seen through a `call`; see `hosts` for what answers it.

`call` is `await call("method", *args, **kwargs)`, and `described` what the host's `describe` returned. How a call
travels, and how often it is repeated, is the caller's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

from stitch_ray.engines.base import EngineError, EngineInfo, Generation, Request, TokenStatistics
from stitch_ray.ensemble.asking import asked
from stitch_ray.ensemble.budget import BudgetExceeded, DeadlineExceeded
from stitch_ray.ensemble.types import Answer, Question, ScorerUnavailable

Call = Callable[..., Awaitable[Any]]


class RemotePrimary:
    """A `PrimaryHost`. What goes wrong on the way is raised as it is, EngineError where the model gave no answer."""

    def __init__(self, call: Call, described: Mapping[str, Any]) -> None:
        self._call = call
        self._adapters = frozenset(described["adapters"])
        self.fingerprint: str = described["fingerprint"]
        self.names = frozenset(described["signals"])

    async def answer(self, question: Question) -> Answer:
        found: Answer = await self._call("answer", question, adapter=self._adapter(question))
        return found

    async def signals(self, question: Question, text: str, samples: Sequence[str]) -> Answer:
        adapter = self._adapter(question)
        found: Answer = await self._call("signals", question, text, tuple(samples), adapter=adapter)
        return found

    def _adapter(self, question: Question) -> str | None:
        return question.task if question.task in self._adapters else None


class RemoteAuxiliary:
    """An `AuxiliaryHost` as an engine that only answers. A host that cannot be reached is a retryable EngineError."""

    def __init__(self, call: Call, described: Mapping[str, Any]) -> None:
        self._call = call
        self.info = EngineInfo(
            model=described["name"],
            fingerprint=described["fingerprint"],
            dtype=described["dtype"],
            max_context=described["max_context"],
            num_parameters=described["num_parameters"],
            methods=frozenset({"generate", "stream"}),
        )

    async def generate(self, request: Request) -> list[Generation]:
        found: list[Generation] = await self._ask("generate", request)
        return found

    async def compare(self, request: Request, word: str, other: str) -> tuple[float, int]:
        """Which of two replies is the likelier; see `exclude_route.Validator`."""
        found: tuple[float, int] = await self._ask("compare", request, word, other)
        return found

    async def _ask(self, method: str, request: Request, *args: Any) -> Any:
        try:
            return await self._call(method, request, *args)
        except (EngineError, DeadlineExceeded, BudgetExceeded):
            raise
        except Exception as error:
            reason = f"{self.info.model} cannot be reached ({type(error).__name__})"
            raise EngineError(request.request_id, reason, retryable=True) from error

    async def loglikelihood(self, request: Request) -> tuple[float, bool]:
        raise EngineError(request.request_id, "an auxiliary only answers")

    async def token_statistics(self, request: Request) -> TokenStatistics:
        raise EngineError(request.request_id, "an auxiliary only answers")

    async def stream(self, request: Request) -> AsyncIterator[str]:
        for generation in await self.generate(request):
            yield generation.text

    async def close(self) -> None:
        """Nothing: the host is not ours to close."""


class RemoteScorer:
    """A `ScorerHost`. Raises ScorerUnavailable if it cannot be reached, ValueError for what it refuses to read."""

    def __init__(self, call: Call, described: Mapping[str, Any]) -> None:
        self._call = call
        self.fingerprint: str = described["fingerprint"]
        self.signals = frozenset(described["signals"])

    async def score(self, question: Question, text: str, signals: Mapping[str, float | None]) -> float | None:
        shown = asked(question)
        request = {"question": shown.question, "answer": text, "context": shown.context, "signals": dict(signals)}
        try:
            found: Mapping[str, Any] = await self._call("score", request)
        except (ValueError, DeadlineExceeded, BudgetExceeded):
            raise
        except Exception as error:
            raise ScorerUnavailable(f"the scorer cannot be reached ({type(error).__name__})") from error
        return found["confidence"]

"""What a member of the ensemble is in a process of its own: actors of `predict` and replicas of `serve` are made of these.

Plain asynchronous classes that take a configuration as a mapping, so that they can be started anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stitch_ray.config.ensemble import EnsembleConfig, MemberConfig
from stitch_ray.engines.base import EngineError, Generation, Request
from stitch_ray.ensemble.exclude_route import compare
from stitch_ray.ensemble.members import load_auxiliary, load_primary
from stitch_ray.ensemble.rendering import RenderedEngine
from stitch_ray.ensemble.scoring import GatheredScoring
from stitch_ray.ensemble.types import Answer, Question
from stitch_ray.reliability.scorer.combined import ReliabilityScorer


class PrimaryHost:
    """The primary. `names`: signals that the scorer needs. Raises UserError where it cannot give them."""

    def __init__(self, config: Mapping[str, Any], names: list[str], seed: int = 0) -> None:
        checked = EnsembleConfig.model_validate(config)
        self._name = checked.primary.name
        self._model = load_primary(checked, frozenset(names), seed=seed)

    async def answer(self, question: Question, adapter: str | None = None) -> Answer:
        """`adapter`: the task whose adapter answers; None: that of the question's task, if it has one."""
        return await self._model.answer(question, adapter=adapter)

    async def signals(
        self, question: Question, text: str, samples: tuple[str, ...], adapter: str | None = None
    ) -> Answer:
        return await self._model.signals(question, text, samples, adapter=adapter)

    async def describe(self) -> dict[str, Any]:
        """Name, fingerprint, signals that come with an answer, and the tasks that have an adapter."""
        return {
            "name": self._name,
            "fingerprint": self._model.fingerprint,
            "signals": sorted(self._model.names),
            "adapters": sorted(self._model.tasks),
        }

    async def close(self) -> None:
        await self._model.close()


class AuxiliaryHost:
    """One of those that refine."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._engine = load_auxiliary(MemberConfig.model_validate(config))

    async def generate(self, request: Request) -> list[Generation]:
        return await self._engine.generate(request)

    async def compare(self, request: Request, word: str, other: str) -> tuple[float, int]:
        """Which of two replies is the likelier; see `exclude_route.Validator`."""
        if not isinstance(self._engine, RenderedEngine):
            raise EngineError(request.request_id, "a server does not tell how likely a reply is")
        return await compare(self._engine, request, word, other)

    async def describe(self) -> dict[str, Any]:
        info = self._engine.info
        return {
            "name": info.model,
            "fingerprint": info.fingerprint,
            "dtype": info.dtype,
            "max_context": info.max_context,
            "num_parameters": info.num_parameters,
            "methods": sorted(info.methods),
        }

    async def close(self) -> None:
        await self._engine.close()


class ScorerHost:
    """The scorer in a run folder of `train-scorer`. Calls that wait for one forward share the next."""

    def __init__(self, folder: str, *, batch_tokens: int | None = None, num_threads: int | None = None) -> None:
        self._scorer = ReliabilityScorer.load(folder, batch_tokens=batch_tokens, num_threads=num_threads)
        self._scoring = GatheredScoring(self._scorer)

    async def score(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """{question, answer, context?, signals?} -> {confidence, stack, encoder, reason}; see `score_requests`.

        Raises ValueError for a request that is none.
        """
        return await self._scoring.score(request)

    async def describe(self) -> dict[str, Any]:
        """The scorer's fingerprint, and the signals that a request must bring."""
        return {"fingerprint": self._scorer.fingerprint, "signals": sorted(self._scorer.signals)}

"""Who answers the questions of a `predict` job: an ensemble on pools of actors, or one that is served."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from stitch_ray.config.ensemble import EnsembleConfig
from stitch_ray.config.predict import ServedConfig
from stitch_ray.engines.base import EngineError, Request, Sampling
from stitch_ray.ensemble.asking import asked as as_asked
from stitch_ray.ensemble.asking import seed_for
from stitch_ray.ensemble.batch.actors import ActorPoolCall
from stitch_ray.ensemble.batch.questions import Asked
from stitch_ray.ensemble.batch.traces import read_trace
from stitch_ray.ensemble.budget import BudgetExceeded, DeadlineExceeded
from stitch_ray.ensemble.predictor import build_predictor
from stitch_ray.ensemble.remote import RemoteAuxiliary, RemotePrimary, RemoteScorer
from stitch_ray.ensemble.types import Limits, Prediction, RouteFailed, ScorerUnavailable
from stitch_ray.records import content_hash
from stitch_ray.reliability.policy import Policy

_NO_DEADLINE_S = 1e9
"""Time says nothing about a question here: it mostly waits for the others. Calls and tokens are limited."""
_SERVED_TIMEOUT_S = 600.0
_FAILS = (EngineError, ScorerUnavailable, RouteFailed, DeadlineExceeded, BudgetExceeded, ValueError)
"""What makes one question fail. Anything else is a fault of the job."""


@dataclass(frozen=True, slots=True)
class Alone:
    """What an auxiliary says to the bare question; text None: nothing."""

    text: str | None
    tokens: int | None
    seconds: float


class Respondent(Protocol):
    async def predict(self, asked: Asked) -> Prediction | str:
        """The prediction, or why this question got none."""
        ...

    async def ask_auxiliary(self, number: int, asked: Asked) -> Alone:
        """The answer of one auxiliary to the bare question."""
        ...

    def check(self) -> None:
        """Raises RuntimeError if what was answered so far cannot be trusted to be the models' doing."""
        ...


@dataclass(frozen=True, slots=True)
class Pool:
    """Actors that host one member, and what they say of themselves."""

    name: str
    actors: tuple[Any, ...]
    described: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Connection:
    """All that it takes to reach the ensemble from any process; calling it makes the respondent."""

    ensemble: EnsembleConfig
    primary: Pool
    auxiliaries: tuple[Pool, ...]
    scorer: Pool
    policy: Policy | None
    target_risk: float | None
    both_stages: bool
    seed: int

    def __call__(self) -> EnsembleRespondent:
        return EnsembleRespondent(self)


class EnsembleRespondent:
    """The predictor that also serves, on pools of actors."""

    def __init__(self, to: Connection) -> None:
        self._to = to
        pools = (to.primary, *to.auxiliaries, to.scorer)
        self._calls = [ActorPoolCall(pool.name, pool.actors) for pool in pools]
        self._auxiliaries = [
            RemoteAuxiliary(call, pool.described) for call, pool in zip(self._calls[1:-1], to.auxiliaries, strict=True)
        ]
        # A question whose refinement fails must not be missing from calibration: it would be chosen by its difficulty.
        ensemble = to.ensemble.model_copy(update={"on_failure": "abstain"}) if to.both_stages else to.ensemble
        self._predictor = build_predictor(
            ensemble,
            RemotePrimary(self._calls[0], to.primary.described),
            self._auxiliaries,
            RemoteScorer(self._calls[-1], to.scorer.described),
        )
        limits = to.ensemble.limits
        self._limits = Limits(deadline_s=_NO_DEADLINE_S, max_calls=limits.max_calls, max_tokens=limits.max_tokens)

    async def predict(self, asked: Asked) -> Prediction | str:
        to = self._to
        try:
            if to.both_stages:
                return await self._predictor.both_stages(
                    asked.question, policy=to.policy, target_risk=to.target_risk, limits=self._limits
                )
            assert to.policy is not None
            return await self._predictor.predict(
                asked.question, policy=to.policy, target_risk=to.target_risk, limits=self._limits
            )
        except EngineError as error:
            return error.reason
        except _FAILS as error:
            return str(error) or type(error).__name__

    async def ask_auxiliary(self, number: int, asked: Asked) -> Alone:
        own = as_asked(asked.question)
        request = Request(
            request_id=f"{asked.question.example_id}/alone-{number}",
            prompt=own.turns,
            sampling=Sampling(
                max_tokens=self._to.ensemble.primary.max_tokens,
                stop=tuple(self._to.ensemble.primary.stop),
                seed=seed_for(own.asked, f"alone-{number}", 0, self._to.seed),
            ),
        )
        started = time.monotonic()
        try:
            generation = (await self._auxiliaries[number].generate(request))[0]
        except EngineError:
            return Alone(None, None, time.monotonic() - started)
        tokens = generation.prompt_tokens + len(generation.token_ids)
        return Alone(generation.text, tokens, time.monotonic() - started)

    def check(self) -> None:
        lost = [call.lost for call in self._calls if call.lost is not None]
        if lost:
            raise RuntimeError(f"a pool of actors was lost: {'; '.join(lost)}")


@dataclass(frozen=True, slots=True)
class ServedConnection:
    """All that it takes to ask a served ensemble; calling it makes the respondent."""

    target: ServedConfig
    target_risk: float | None
    concurrency: int

    def __call__(self) -> ServedRespondent:
        return ServedRespondent(self)


class ServedRespondent:
    """The ensemble behind a URL."""

    def __init__(self, to: ServedConnection) -> None:
        from stitch_ray.client import AsyncClient

        self._to = to
        self._client = AsyncClient(
            to.target.url,
            token_env=to.target.token_env,
            timeout_s=_SERVED_TIMEOUT_S,
            max_retries=to.target.max_retries,
            max_connections=to.concurrency,
        )

    async def predict(self, asked: Asked) -> Prediction | str:
        from stitch_ray.client import ApiError, ClientError

        one = asked.question
        options: dict[str, Any] = {
            "context": one.context,
            "task": one.task,
            "history": [{"role": turn.role, "content": turn.content} for turn in one.history] or None,
            "target_risk": self._to.target_risk,
        }
        try:
            reply = await self._client.predict(
                one.question,
                request_id=f"predict-{content_hash([one.example_id, asked.asked])}",
                include_trace=True,
                **{name: value for name, value in options.items() if value is not None},
            )
        except ApiError as error:
            if error.status in (401, 403, 404):
                raise RuntimeError(f"target.url: {error}") from error
            return str(error)
        except ClientError as error:
            return str(error)
        stages = read_trace(reply.trace)
        return Prediction(
            example_id=one.example_id,
            question=one.question,
            context=one.context,
            task=one.task,
            draft=stages.draft,
            draft_confidence=stages.draft_confidence,
            refined=stages.refined,
            final_confidence=stages.final_confidence,
            answer=reply.answer,
            confidence=reply.confidence,
            decision=reply.decision,
            reason=reply.reason,  # type: ignore[arg-type]
            route=reply.route,
            target_risk=reply.target_risk,
            calls=reply.calls,
            tokens=reply.tokens,
            policy_version=reply.policy_version,
            model_version=reply.model_version,
            trace=reply.trace,
            seconds=reply.seconds,
        )

    async def ask_auxiliary(self, number: int, asked: Asked) -> Alone:
        raise AssertionError("baselines are refused with target")

    def check(self) -> None:
        """A server that fails fails its questions."""

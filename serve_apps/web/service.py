"""What the routes call: one question in, one answer or a documented error out."""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pydantic import ValidationError

from serve_apps.web.bodies import FeedbackBody, PredictBody, ScoreBody, check_texts
from serve_apps.web.errors import ApiError, invalid, overloaded, unavailable
from serve_apps.web.trace import without_texts
from stitch_ray.engines.base import EngineError
from stitch_ray.ensemble.budget import BudgetExceeded, DeadlineExceeded
from stitch_ray.ensemble.types import (
    Emit,
    Event,
    Limits,
    Prediction,
    Question,
    RouteFailed,
    Scorer,
    ScorerUnavailable,
)
from stitch_ray.reliability.policy import Policy, UnknownTarget

logger = logging.getLogger("ray.serve")

_BATCH_AT_ONCE = 32

_OF_MEMBERS = ("scorer_unavailable", "route_failed", "deadline")
"""Reasons of abstentions that a member's going away can have."""


class Answers(Protocol):
    """The predictor, as far as it is needed here."""

    model_version: str

    async def predict(
        self,
        question: Question,
        *,
        policy: Policy,
        target_risk: float | None = None,
        limits: Limits = Limits(),
        emit: Emit | None = None,
    ) -> Prediction: ...


class Rater(Protocol):
    """Scores an answer that somebody gave: the primary's signals of it, then the scorer."""

    async def rate(self, question: Question, answer: str) -> float | None: ...


class Watcher(Protocol):
    """Is told of every answer, and of labels that come back."""

    def answered(self, prediction: Prediction) -> None: ...

    async def labelled(self, label: FeedbackBody) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Active:
    """What may change between two requests, and never within one. `path`: where the policy was read from."""

    policy: Policy
    path: str
    target_risk: float | None
    limits: Limits


class Service:
    """`active` is set before the first request, and may be replaced at any time.

    outdated: whether members have gone over to another version while this service was made for the one before. What
    fails then says nothing about the question: the client is told to ask again, and not that nobody can tell.
    """

    active: Active

    def __init__(
        self,
        predictor: Answers,
        rater: Rater,
        watcher: Watcher,
        *,
        max_characters: int,
        max_batch: int,
        outdated: Callable[[], bool] = lambda: False,
    ) -> None:
        self.predictor = predictor
        self._rater = rater
        self._watcher = watcher
        self._max_characters = max_characters
        self._max_batch = max_batch
        self._outdated = outdated
        self._batch_room = asyncio.Semaphore(_BATCH_AT_ONCE)

    async def predict(self, body: PredictBody, request_id: str, emit: Emit | None = None) -> dict[str, Any]:
        """The response to one question. Raises ApiError."""
        active = self.active
        self.check(body)
        shown = None if emit is None else _shown(emit, with_texts=body.include_trace)
        try:
            prediction = await self.predictor.predict(
                body.as_question(request_id),
                policy=active.policy,
                target_risk=active.target_risk if body.target_risk is None else body.target_risk,
                limits=_least(active.limits, body),
                emit=shown,
            )
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise as_api_error(error, request_id) from error
        if prediction.reason in _OF_MEMBERS and self._outdated():
            raise unavailable("the models are being replaced by another version; ask again")
        self._watcher.answered(prediction)
        return as_response(prediction, with_texts=body.include_trace)

    def check(self, body: PredictBody) -> None:
        """Raises ApiError for what can be told before anything is asked: lengths, and a promise that is not made."""
        check_texts(self._max_characters, question=body.question, context=body.context, history=body.history)
        active = self.active
        try:
            active.policy.target(body.task, active.target_risk if body.target_risk is None else body.target_risk)
        except UnknownTarget as error:
            raise invalid(str(error), param="target_risk") from error

    async def predict_batch(self, items: Sequence[Any], request_id: str) -> list[dict[str, Any]]:
        """A response or an error for each item, in their order. Their ids are `request_id`, a dash and their place."""
        if len(items) > self._max_batch:
            raise ApiError(
                413, "too_large", f"the batch has {len(items)} questions; at most {self._max_batch} are taken"
            )

        async def one(item: Any, item_id: str) -> dict[str, Any]:
            try:
                body = PredictBody.model_validate(item)
                if body.stream:
                    raise invalid("stream: questions of a batch are not streamed")
                async with self._batch_room:
                    return await self.predict(body, item_id)
            except ValidationError as error:
                return invalid(explain(error.errors(include_input=False, include_url=False))).body()
            except ApiError as error:
                return error.body()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item, f"{request_id}-{place}")) for place, item in enumerate(items)]
        return [task.result() for task in tasks]

    async def score(self, body: ScoreBody, request_id: str) -> dict[str, Any]:
        check_texts(self._max_characters, question=body.question, context=body.context, answer=body.answer)
        question = Question(example_id=request_id, question=body.question, context=body.context, task=body.task)
        try:
            async with asyncio.timeout(self.active.limits.deadline_s):
                score = await self._rater.rate(question, body.answer)
                return {"confidence": self.active.policy.confidence(score, "draft")}
        except TimeoutError as error:
            raise _deadline(self.active.limits.deadline_s) from error
        except asyncio.CancelledError:
            raise
        except Exception as error:
            raise as_api_error(error, request_id) from error

    async def feedback(self, body: FeedbackBody) -> dict[str, Any]:
        return await self._watcher.labelled(body)


@dataclass(frozen=True, slots=True)
class PrimaryRater:
    """`primary` and `scorer` as the predictor has them."""

    primary: Any
    scorer: Scorer

    async def rate(self, question: Question, answer: str) -> float | None:
        signals: Mapping[str, float | None] = {}
        if self.scorer.signals:
            signals = (await self.primary.signals(question, answer, ())).signals
        return await self.scorer.score(question, answer, signals)


def as_response(prediction: Prediction, *, with_texts: bool) -> dict[str, Any]:
    trace = list(prediction.trace) if with_texts else without_texts(prediction.trace)
    return {
        "id": prediction.example_id,
        "answer": prediction.answer,
        "confidence": prediction.confidence,
        "decision": prediction.decision,
        "reason": prediction.reason,
        "route": prediction.route,
        "calls": prediction.calls,
        "tokens": prediction.tokens,
        "target_risk": prediction.target_risk,
        "policy_version": prediction.policy_version,
        "model_version": prediction.model_version,
        "seconds": prediction.seconds,
        "trace": trace,
    }


def as_api_error(error: Exception, request_id: str) -> ApiError:
    """What a client is told. Texts of models and questions never stand in it, nor in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return _of_engine(error)
    if isinstance(error, DeadlineExceeded):
        return ApiError(504, "deadline", str(error))
    if isinstance(error, ScorerUnavailable | RouteFailed):
        return unavailable(str(error))
    if isinstance(error, UnknownTarget | BudgetExceeded | ValueError):
        return invalid(str(error))
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("request %s failed: %s\n%s", request_id, type(error).__name__, frames)
    return ApiError(500, "internal", f"the server failed ({type(error).__name__}); its log has request {request_id}")


def _of_engine(error: EngineError) -> ApiError:
    """A member that is full or away may answer later; what a model refuses for good is in the question."""
    busy = getattr(error, "retry_after_s", None)
    if busy is not None:
        return overloaded(error.reason, retry_after_s=busy)
    return unavailable(error.reason) if error.retryable else invalid(f"no answer can be had: {error.reason}")


def explain(problems: Sequence[Mapping[str, Any]], prefix: str = "") -> str:
    """Pydantic's problems in one line, without what was sent: it may be long, and secret."""
    shown = []
    for problem in problems:
        key = ".".join(str(part) for part in problem["loc"] if part != "body")
        message = (
            "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"].removeprefix("Value error, ")
        )
        shown.append(f"{prefix}{key}: {message}" if key else message)
    return "; ".join(shown)


def _least(limits: Limits, body: PredictBody) -> Limits:
    asked = {"deadline_s": body.deadline_s, "max_calls": body.max_calls, "max_tokens": body.max_tokens}
    return replace(limits, **{name: min(value, getattr(limits, name)) for name, value in asked.items() if value})


def _shown(emit: Emit, *, with_texts: bool) -> Emit:
    """Passes on all events but the last, which is the response, and texts only where they were asked for."""

    async def pass_on(event: Event) -> None:
        if event.kind != "final":
            await emit(event if with_texts else Event(event.kind, without_texts([event.data])[0]))

    return pass_on


def _deadline(seconds: float) -> ApiError:
    return ApiError(504, "deadline", f"no answer within {seconds:g} s")

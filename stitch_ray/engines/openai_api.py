"""A server that speaks the OpenAI chat API, as an asynchronous engine. Knows nothing of Ray."""

from __future__ import annotations

import asyncio
import random
from asyncio import AbstractEventLoop
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from openai import APIConnectionError, APIStatusError, AsyncOpenAI, OpenAIError

from stitch_ray.config.reliability import EndpointConfig
from stitch_ray.engines.base import EngineError, EngineInfo, Generation, Request, TokenStatistics
from stitch_ray.engines.endpoint import bearer_token, check_endpoint, connect, endpoint_fingerprint, own_headers
from stitch_ray.engines.openai_chat import chat_body, read_completion, read_piece, sample_seed
from stitch_ray.errors import UserError
from stitch_ray.retry_after import retry_after_s

__all__ = ["METHODS", "OpenAIEngine", "check_endpoint", "endpoint_fingerprint"]

METHODS = frozenset({"generate", "stream"})
_RETRYABLE = frozenset({408, 409, 429})  # and 5xx
_UNKNOWN_CONTEXT = 2**31 - 1

T = TypeVar("T")
OnResult = Callable[[int, "list[Generation] | EngineError"], None]


class OpenAIEngine:
    """Answers of the model that `config` names.

    An attempt that ends in 408, 409, 429, 5xx, no connection, no end within `timeout_s` or a reply that is no chat
    completion is repeated up to `max_retries` times. Before attempt k + 1 it waits for what the server asked for in
    Retry-After, else `first_wait_s` * 2^(k-1) seconds less a random half of it, at most `longest_wait_s`; a server that
    asks for more than that gets no further attempt. Waiting keeps its place among the `concurrency` requests, so that
    a busy server sees fewer of them. Whatever fails for good is an EngineError, `retryable` if it was one of these.

    The server reports no token ids (`token_ids` is empty) and no entropies, its context length is unknown (it refuses
    what is too long), and only its URL and model name can be fingerprinted, not its weights.

    Raises UserError if the URL is none or the variable with the bearer token is not set.
    """

    info: EngineInfo

    def __init__(self, config: EndpointConfig, *, first_wait_s: float = 0.5, longest_wait_s: float = 60.0) -> None:
        bearer_token(config)
        if not config.url.startswith(("http://", "https://")):
            raise UserError(f"endpoint.url: {config.url!r} must begin with http:// or https://")
        self._config = config
        self._first_wait_s, self._longest_wait_s = first_wait_s, longest_wait_s
        self._connections: WeakKeyDictionary[AbstractEventLoop, _Connection] = WeakKeyDictionary()
        self._one_by_one = False  # the server turned out to give one sample a call
        self.info = EngineInfo(
            model=config.name,
            fingerprint=endpoint_fingerprint(config),
            dtype="unknown",
            max_context=_UNKNOWN_CONTEXT,
            num_parameters=None,
            methods=METHODS,
        )

    def generate_many(
        self, requests: Sequence[Request], *, on_result: OnResult | None = None
    ) -> list[list[Generation] | EngineError]:
        """Results in the order of `requests`, `concurrency` of them under way at a time. Not for use in an event loop.

        `on_result(index, result)` is called as each arrives; what it raises ends the call.
        """

        async def run() -> list[list[Generation] | EngineError]:
            try:
                return await self._generate_all(requests, on_result)
            finally:
                await self.close()

        return asyncio.run(run())

    async def generate(self, request: Request) -> list[Generation]:
        """`num_samples` answers; at temperature 0 one answer, repeated. Cancelling aborts the request at the server.

        Sample i has a seed of its own, made of the request's seed and i. A server that takes no `n`, or gives fewer
        samples than that, is asked for one at a time. `text` ends before the first stop string. `logprobs` and
        `margins` are those the server reports for the tokens of `text`, None where it reports none.

        Raises EngineError, also for a prompt that is no conversation.
        """
        sampling = request.sampling
        wanted = 1 if sampling.temperature == 0 else sampling.num_samples
        body = chat_body(self._config.model, request)
        async with self._connection().slots:
            answers: list[Generation] = []
            if wanted > 1 and not self._one_by_one:
                answers = await self._several(request, body, wanted)
            while len(answers) < wanted:
                answers += await self._call(request, body | sample_seed(sampling, len(answers)))
        return answers * sampling.num_samples if sampling.temperature == 0 else answers[:wanted]

    async def loglikelihood(self, request: Request) -> tuple[float, bool]:
        raise EngineError(request.request_id, "an endpoint cannot score a given continuation")

    async def token_statistics(self, request: Request) -> TokenStatistics:
        raise EngineError(request.request_id, "an endpoint cannot score a given continuation")

    async def stream(self, request: Request) -> AsyncIterator[str]:
        """The answer in pieces as they arrive, all within `timeout_s`. Retried until it begins; raises EngineError."""
        if request.sampling.num_samples != 1:
            raise EngineError(request.request_id, "a stream has one answer; set num_samples to 1")
        plain = replace(request, sampling=replace(request.sampling, token_stats=False))
        body = chat_body(self._config.model, plain) | sample_seed(request.sampling, 0) | {"stream": True}
        connection = self._connection()
        async with connection.slots:
            loop = asyncio.get_running_loop()
            deadline = 0.0

            async def start() -> Any:
                nonlocal deadline
                deadline = loop.time() + self._config.timeout_s
                async with asyncio.timeout_at(deadline):
                    return await connection.client.chat.completions.create(
                        **body, extra_headers=own_headers(self._config)
                    )

            chunks = await self._retried(request, start)
            try:
                async with aclosing(aiter(chunks)) as pieces:
                    while True:
                        async with asyncio.timeout_at(deadline):
                            try:
                                chunk = await anext(pieces)
                            except StopAsyncIteration:
                                return
                        try:
                            piece = read_piece(chunk)
                        except AttributeError as error:
                            raise ValueError(str(error)) from error
                        if piece:
                            yield piece
            except (OpenAIError, TimeoutError, ValueError) as error:
                raise self._failure(request, error).error from error
            finally:
                await chunks.close()

    async def close(self) -> None:
        """Close the connections of the running event loop."""
        connection = self._connections.pop(asyncio.get_running_loop(), None)
        if connection is not None:
            await connection.client.close()

    async def _generate_all(
        self, requests: Sequence[Request], on_result: OnResult | None
    ) -> list[list[Generation] | EngineError]:
        results: list[list[Generation] | EngineError | None] = [None] * len(requests)
        waiting = iter(range(len(requests)))

        async def work() -> None:
            for index in waiting:
                result: list[Generation] | EngineError
                try:
                    result = await self.generate(requests[index])
                except EngineError as error:
                    result = error
                results[index] = result
                if on_result is not None:
                    on_result(index, result)

        workers = [asyncio.create_task(work()) for _ in range(min(self._config.concurrency, len(requests)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
        assert None not in results
        return results  # type: ignore[return-value]

    async def _several(self, request: Request, body: Mapping[str, Any], wanted: int) -> list[Generation]:
        """As many of `wanted` answers as one call gives; none where the server refuses `n`."""
        try:
            answers = await self._call(request, {**body, "n": wanted, **sample_seed(request.sampling, 0)})
        except _RefusedError:
            answers = []  # if the fault lies elsewhere, asking for one will tell
        self._one_by_one = self._one_by_one or len(answers) < wanted
        return answers

    async def _call(self, request: Request, body: Mapping[str, Any]) -> list[Generation]:
        client = self._connection().client

        async def attempt() -> list[Generation]:
            async with asyncio.timeout(self._config.timeout_s):
                completion = await client.chat.completions.create(**body, extra_headers=own_headers(self._config))
            try:
                return read_completion(request, completion)
            except (AttributeError, TypeError) as error:  # the client does not check what it is sent
                raise ValueError(str(error)) from error

        return await self._retried(request, attempt)

    async def _retried(self, request: Request, attempt: Callable[[], Awaitable[T]]) -> T:
        for number in range(self._config.max_retries + 1):
            try:
                return await attempt()
            except EngineError:
                raise
            except (OpenAIError, TimeoutError, ValueError) as error:
                failure = self._failure(request, error)
                if not failure.error.retryable or number == self._config.max_retries:
                    raise failure.error from error
                await asyncio.sleep(self._wait_s(request, number, failure))
        raise AssertionError("unreachable")

    def _wait_s(self, request: Request, number: int, failure: _Failure) -> float:
        """Random, lest all clients of a busy server return at once. Raises where the server asks for too long a wait."""
        if failure.retry_after_s is None:
            return min(self._longest_wait_s, self._first_wait_s * 2**number) * random.uniform(0.5, 1)
        if failure.retry_after_s > self._longest_wait_s:
            reason = f"{failure.error.reason}; the server asks to wait {failure.retry_after_s:g} s"
            raise EngineError(request.request_id, reason, retryable=True) from failure.error
        return failure.retry_after_s + random.uniform(0, self._first_wait_s)

    def _failure(self, request: Request, error: Exception) -> _Failure:
        def failed(reason: str, retryable: bool) -> EngineError:
            kind = EngineError if retryable or not refused else _RefusedError
            token = bearer_token(self._config)
            return kind(request.request_id, reason.replace(token, "***") if token else reason, retryable=retryable)

        refused = False
        match error:
            case APIStatusError(status_code=status):
                refused = status in (400, 422)
                retryable = (status in _RETRYABLE or status >= 500) and error.code != "insufficient_quota"
                said = error.body.get("message") if isinstance(error.body, dict) else None
                return _Failure(
                    failed(f"HTTP {status}: {said or error.message}", retryable),
                    retry_after_s(error.response.headers.get("retry-after")),
                )
            case APIConnectionError(__cause__=cause) if not isinstance(cause, TimeoutError):
                return _Failure(failed(f"no connection to {self._config.url} ({cause or error})", True))
            case TimeoutError() | APIConnectionError():
                return _Failure(failed(f"no answer within {self._config.timeout_s:g} s", True))
            case _:
                return _Failure(failed(f"the reply is no chat completion ({error})", True))

    def _connection(self) -> _Connection:
        """Of this event loop: neither connections nor semaphores can be used in two."""
        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            client = connect(self._config)
            self._connections[loop] = _Connection(client, asyncio.Semaphore(self._config.concurrency))
        return self._connections[loop]


@dataclass(frozen=True, slots=True)
class _Connection:
    client: AsyncOpenAI
    slots: asyncio.Semaphore


@dataclass(frozen=True, slots=True)
class _Failure:
    error: EngineError
    retry_after_s: float | None = None


class _RefusedError(EngineError):
    """The server does not take the request as it is."""

"""The client of a served ensemble."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, TypeVar

import httpx

from stitch_ray.client.attempts import Attempts, unreachable
from stitch_ray.client.errors import ApiError
from stitch_ray.client.events import read_events
from stitch_ray.client.protocol import (
    ID_HEADER,
    Call,
    Lost,
    base_url,
    check_id,
    is_loopback,
    no_reply,
    question_body,
    read_batch,
    read_field,
    read_json,
    read_object,
    read_reply,
)
from stitch_ray.client.reply import Reply
from stitch_ray.errors import UserError

T = TypeVar("T")
Event = tuple[str, dict[str, Any]]


class AsyncClient:
    """A client for one event loop; close it, or use it with `async with`.

    A call that meets 429, 503, no connection or a reply that breaks off is made again up to `max_retries` times within
    `timeout_s`, with the same request id: questions have no side effects, and a label may be told twice. Nothing else is
    repeated. Calls raise ApiError, Unreachable or TimedOut, all ClientError.

    token_env: environment variable with the bearer token, in place of `token`; UserError if it is not set.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        token: str | None = None,
        token_env: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 4,
        first_wait_s: float = 0.2,
        max_connections: int = 100,
    ) -> None:
        self.url = base_url(url)
        token = token or (_token(token_env) if token_env else None)
        self._timeout_s, self._max_retries, self._first_wait_s = timeout_s, max_retries, first_wait_s
        self._http = httpx.AsyncClient(
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=None,  # of a whole call, not of one read: a server that sends a byte now and then is late too
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            trust_env=not is_loopback(self.url),  # a proxy of the environment cannot reach this machine's loopback
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._http.aclose()

    async def predict(self, question: str, *, request_id: str | None = None, **options: Any) -> Reply:
        """Ask one question. `options`: context, task, history ([{role, content}], oldest first), target_risk (one of
        the policy's), include_trace (texts of drafts and turns that nobody checked), deadline_s, max_calls, max_tokens.
        """
        call = _call("POST", "/v1/predict", question_body(question, **options), request_id)
        return await self._made(call, lambda value: read_reply(call, value))

    async def predict_batch(
        self, questions: Sequence[str | Mapping[str, Any]], *, request_id: str | None = None
    ) -> list[Reply | ApiError]:
        """Ask several: texts, or the arguments of `predict` with `question`. In order; a question that failed has its
        ApiError in its place.
        """
        bodies = [question_body(**({"question": asked} if isinstance(asked, str) else asked)) for asked in questions]
        call = _call("POST", "/v1/predict/batch", bodies, request_id)
        return await self._made(call, lambda value: read_batch(call, value, len(bodies)))

    async def stream(self, question: str, *, request_id: str | None = None, **options: Any) -> AsyncIterator[Event]:
        """(event, data) as they happen: `stage`, `turn`, and last `final` with the reply as a dict. Options as `predict`.

        Closing the iterator early cancels the work on the server. If the connection breaks, `restart` comes and the
        question is asked again: what came before it is void.
        """
        call = _call("POST", "/v1/predict", {**question_body(question, **options), "stream": True}, request_id)
        attempts = self._attempts(call)
        while True:
            started, retry_after = False, None
            try:
                response = await attempts.in_time(self._http.send(self._request(call), stream=True))
                try:
                    retry_after = response.headers.get("retry-after")
                    await attempts.in_time(_check_stream(call, response))
                    events = read_events(response.aiter_lines())
                    while (event := await attempts.in_time(anext(events, None))) is not None:
                        name, data = event
                        if name == "error":
                            raise ApiError.inside(data, call.request_id)
                        if name == "final":
                            read_reply(call, data)
                        started = True
                        yield event
                        if name == "final":
                            return
                    raise Lost("the stream broke off")
                finally:
                    await response.aclose()
            except (ApiError, Lost) as error:
                wait_s = attempts.wait_s(error, retry_after)
            except httpx.TransportError as error:
                wait_s = attempts.wait_s(_lost(error))
            await asyncio.sleep(wait_s)
            if started:
                yield "restart", {}

    async def score(
        self, question: str, answer: str, *, context: str | None = None, task: str | None = None
    ) -> float | None:
        """The confidence in an answer of one's own; None if it cannot be scored."""
        given = {"context": context, "task": task}
        body = {"question": question, "answer": answer, **{k: v for k, v in given.items() if v is not None}}
        call = Call("POST", "/v1/score", body)
        confidence: float | None = await self._made(call, lambda value: read_field(call, value, "confidence"))
        return confidence

    async def feedback(self, id: str, correct: bool) -> None:
        """Say whether the answer to request `id` was right. Raises ApiError 404 for an id that the server does not know,
        409 for one that was labelled otherwise.
        """
        call = Call("POST", "/v1/feedback", {"id": id, "correct": correct})
        await self._made(call, lambda value: read_field(call, value, "recorded"))

    async def policy(self) -> dict[str, Any]:
        """What is promised: targets, the active one, fingerprints."""
        return await self._object(Call("GET", "/v1/policy"))

    async def curve(self, task: str | None = None) -> dict[str, Any]:
        """{num, thresholds, coverage, risk, active} of the calibration answers. ApiError 404 if they were not kept."""
        return await self._object(Call("GET", "/v1/policy/curve", params={"task": task} if task is not None else {}))

    async def models(self) -> list[str]:
        """Names for the OpenAI API."""
        call = Call("GET", "/v1/models")
        found = await self._made(call, lambda value: read_field(call, value, "data"))
        return [model["id"] for model in found]

    async def health(self) -> dict[str, Any]:
        """{status, ready, ...}, also of a server that is not ready. Asked once."""
        call = Call("GET", "/healthz")
        attempts = self._attempts(call)
        try:
            response = await attempts.in_time(self._http.send(self._request(call)))
            status = 200 if response.status_code == 503 and _is_json(response) else response.status_code
            return read_object(call, read_json(call, status, response.headers, response.content))
        except httpx.TransportError as error:
            raise unreachable(call, _lost(error), 1) from error
        except Lost as error:
            raise unreachable(call, error, 1) from error

    async def _object(self, call: Call) -> dict[str, Any]:
        return await self._made(call, lambda value: read_object(call, value))

    async def _made(self, call: Call, read: Callable[[Any], T]) -> T:
        attempts = self._attempts(call)
        while True:
            retry_after = None
            try:
                response = await attempts.in_time(self._http.send(self._request(call)))
                retry_after = response.headers.get("retry-after")
                return read(read_json(call, response.status_code, response.headers, response.content))
            except (ApiError, Lost) as error:
                wait_s = attempts.wait_s(error, retry_after)
            except httpx.TransportError as error:
                wait_s = attempts.wait_s(_lost(error))
            await asyncio.sleep(wait_s)

    def _attempts(self, call: Call) -> Attempts:
        return Attempts(call, timeout_s=self._timeout_s, max_retries=self._max_retries, first_wait_s=self._first_wait_s)

    def _request(self, call: Call) -> httpx.Request:
        headers = {ID_HEADER: call.request_id}
        return self._http.build_request(
            call.method, self.url + call.path, headers=headers, params=call.params, json=call.body
        )


def _call(method: str, path: str, body: Any, request_id: str | None) -> Call:
    return Call(method, path, body) if request_id is None else Call(method, path, body, request_id=request_id)


async def _check_stream(call: Call, response: httpx.Response) -> None:
    """Raises as `read_json` for anything but a stream of events."""
    if response.status_code != 200:
        read_json(call, response.status_code, response.headers, await response.aread())
    if not response.headers.get("content-type", "").startswith("text/event-stream"):
        raise no_reply(call, "the reply is no stream of events")
    check_id(call, response.headers.get(ID_HEADER))


def _lost(error: httpx.TransportError) -> Lost:
    return Lost(str(error) or type(error).__name__)


def _is_json(response: httpx.Response) -> bool:
    return bool(response.headers.get("content-type", "").startswith("application/json"))


def _token(variable: str) -> str:
    token = os.environ.get(variable, "").strip()
    if not token:
        raise UserError(f"token_env: the environment variable {variable} is not set; put the server's token into it")
    return token

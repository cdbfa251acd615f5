"""What every request passes first: its id, its token, the size of its body, and whether there is room for it."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.web.errors import ApiError, overloaded

logger = logging.getLogger("ray.serve")

OPEN_PATHS = frozenset({"/", "/favicon.ico", "/healthz"})
"""Need no token: they tell nothing but whether the service is up."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")

OnDone = Callable[[str, int, float], None]
"""(path, status, seconds): called once a request."""


class Guard:
    """ASGI middleware. `digests`: SHA-256 of the tokens that are accepted; none: no token is needed.

    The request's id is `scope["state"]["request_id"]`: the client's `x-request-id` if that is a plain word, else a new one.
    Every response has it; `behind_serve`: Ray Serve adds the client's own, so only one made here is added.
    A body is read whole, up to `max_body_bytes`, before anything else sees it. `in_flight` counts requests with a body.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        digests: Sequence[str],
        max_body_bytes: int,
        max_in_flight: int,
        behind_serve: bool = False,
        on_done: OnDone = lambda *_: None,
    ) -> None:
        self._app = app
        self._digests = tuple(digests)
        self._max_body_bytes = max_body_bytes
        self._max_in_flight = max_in_flight
        self._behind_serve = behind_serve
        self._on_done = on_done
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        headers = {name: value for name, value in scope["headers"] if name in _READ}
        request_id = request_id_of(headers.get(b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        echoed = self._behind_serve and headers.get(b"x-request-id") == request_id.encode()
        path = scope["path"]

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not echoed:
                    message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            try:
                self._check_token(path, headers.get(b"authorization"))
                if scope["method"] in ("POST", "PUT", "PATCH"):
                    body = await self._read(receive, headers.get(b"content-length"))
                    await self._with_room(scope, replayed(body, receive), answer)
                else:
                    await self._app(scope, receive, answer)
            except ApiError as error:
                await error.response(path)(scope, receive, answer)
        finally:
            seconds = time.perf_counter() - started
            self._on_done(path, status, seconds)
            if status >= 500:
                logger.warning("request %s: status %d after %.3f s", request_id, status, seconds)

    async def _with_room(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.in_flight >= self._max_in_flight:
            raise overloaded(
                f"{self.in_flight} requests are under way here, which is as many as may be; ask again later"
            )
        self.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self.in_flight -= 1

    def _check_token(self, path: str, header: bytes | None) -> None:
        if not self._digests or path in OPEN_PATHS:
            return
        scheme, _, token = (header or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not accepted(token.strip(), self._digests):
            what = "a bearer token is needed" if not header else "this token is not accepted"
            raise ApiError(401, "unauthorized", what, headers=[("WWW-Authenticate", "Bearer")])

    async def _read(self, receive: Receive, content_length: bytes | None) -> bytes:
        most = self._max_body_bytes
        if content_length is not None and content_length.isdigit() and int(content_length) > most:
            raise ApiError(413, "too_large", f"the body has {int(content_length)} bytes; at most {most} are taken")
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "invalid_request", "the connection was closed before the body was there")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                raise ApiError(
                    413, "too_large", f"the body has more than {most} bytes, which are the most that are taken"
                )
            more = message.get("more_body", False)
        return b"".join(parts)


def request_id_of(header: bytes | None) -> str:
    """The client's id if it can stand in a header, a file and a log as it is; else a new one."""
    text = (header or b"").decode("latin-1")
    return text if _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex


def digest(token: bytes) -> str:
    return hashlib.sha256(token).hexdigest()


def accepted(token: bytes, digests: Sequence[str]) -> bool:
    """Whether the token's digest is among `digests`, in a time that does not tell which, or how nearly."""
    own = digest(token)
    return sum(hmac.compare_digest(own, known) for known in digests) > 0


def replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` once, then what the connection says: nothing until it is closed."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


_READ = frozenset({b"x-request-id", b"authorization", b"content-length"})

"""The page at /ui: an application of its own with a single replica, for a page keeps its sessions in one process."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve import Application
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_apps.tokens import page_token, read_tokens
from serve_apps.web.guard import accepted, digest
from stitch_ray.config.loading import validate
from stitch_ray.config.serve import ServeConfig

ROUTE = "/ui"


@serve.deployment
@serve.ingress()
class Page:
    """Calls the HTTP API at `url` like any client. `digests`: of the tokens that open it, as password or bearer token."""

    def __init__(self, url: str, token: str | None, title: str, digests: Sequence[str]) -> None:
        self._url, self._token, self._title, self._digests = url, token, title, tuple(digests)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        from fastapi import FastAPI

        from serve_apps.page import mount_page

        return Locked(mount_page(FastAPI(), self._url, self._token, self._title, path="/"), self._digests)


class Locked:
    """ASGI middleware: a browser asks for a password, which is a token; nothing is open to people without one."""

    def __init__(self, app: ASGIApp, digests: Sequence[str]) -> None:
        self._app = app
        self._digests = tuple(digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or not self._digests or self._opens(dict(scope["headers"])):
            await self._app(scope, receive, send)
            return
        refused = PlainTextResponse("a token is needed", 401, {"WWW-Authenticate": 'Basic realm="token as password"'})
        await refused(scope, receive, send)

    def _opens(self, headers: dict[bytes, bytes]) -> bool:
        scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            return accepted(value.strip(), self._digests)
        if scheme.lower() != b"basic":
            return False
        try:
            _, _, password = base64.b64decode(value, validate=True).partition(b":")
        except binascii.Error:
            return False
        return accepted(password, self._digests)


def build(config: ServeConfig, url: str | None = None) -> Application:
    """The page of the ensemble at `url`, by default where the configuration says that it listens."""
    tokens = read_tokens(config.http)
    page = Page.options(  # type: ignore[attr-defined]
        num_replicas=1,
        max_ongoing_requests=256,
        max_queued_requests=256,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": 0},
    )
    return page.bind(
        url or local_url(config.http.host, config.http.port),
        page_token(tokens),
        config.name,
        [digest(token.encode()) for token in tokens],
    )


def app_builder(args: dict[str, Any]) -> Application:
    """For Serve's YAML: the same `args` as the ensemble's. Raises UserError for keys that are wrong."""
    return build(validate(ServeConfig, args, "args"))


def local_url(host: str, port: int) -> str:
    """How a replica reaches the proxy of its own node."""
    everywhere = host in ("0.0.0.0", "::", "localhost")
    shown = "127.0.0.1" if everywhere else f"[{host}]" if ":" in host else host
    return f"http://{shown}:{port}"

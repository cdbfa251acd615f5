"""Every error that a client sees: a status, a type and a message that says what to do."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from starlette.responses import Response

OPENAI_PATHS = ("/v1/chat/", "/v1/models")
_OPENAI_TYPES = {
    "unauthorized": ("authentication_error", "invalid_api_key"),
    "overloaded": ("rate_limit_error", "overloaded"),
    "not_found": ("invalid_request_error", "not_found"),
    "invalid_request": ("invalid_request_error", None),
    "too_large": ("invalid_request_error", "too_large"),
}
"""Our type -> type and code of the OpenAI API. All others are server errors there."""


class ApiError(Exception):
    """`type` is one of unauthorized, not_found, conflict, too_large, invalid_request, overloaded, unavailable, deadline,
    internal. `param` and `code` are shown on the OpenAI routes only."""

    def __init__(
        self,
        status: int,
        type: str,
        message: str,
        *,
        retry_after_s: float | None = None,
        headers: Sequence[tuple[str, str]] = (),
        param: str | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.message = message
        self.retry_after_s = retry_after_s
        self.headers = tuple(headers)
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        return {"error": {"type": self.type, "message": self.message}}

    def openai_body(self) -> dict[str, Any]:
        kind, code = _OPENAI_TYPES.get(self.type, ("server_error", self.type))
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": self.code or code},
        }

    def response(self, path: str) -> Response:
        """As the clients of `path` expect it."""
        body = self.openai_body() if path.startswith(OPENAI_PATHS) else self.body()
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, round(self.retry_after_s)))
        return json_response(body, self.status, headers)


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """NaN is refused: it is no JSON. Half surrogate pairs, which no client could decode, are escaped."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return Response(text.encode(), status, headers, "application/json")


def invalid(message: str, *, param: str | None = None) -> ApiError:
    return ApiError(422, "invalid_request", message, param=param)


def overloaded(message: str, *, retry_after_s: float = 1.0) -> ApiError:
    return ApiError(429, "overloaded", message, retry_after_s=retry_after_s)


def unavailable(message: str, *, retry_after_s: float = 1.0) -> ApiError:
    return ApiError(503, "unavailable", message, retry_after_s=retry_after_s)

"""What may become of a request instead of a reply."""

from __future__ import annotations

_STATUS = {
    "unauthorized": 401,
    "not_found": 404,
    "too_large": 413,
    "invalid_request": 422,
    "overloaded": 429,
    "internal": 500,
    "unavailable": 503,
    "deadline": 504,
}
"""Of errors that come inside a batch or a stream, whose own status is 200."""

INVALID = "invalid_response"


class ClientError(Exception):
    """Any of the errors below."""


class ApiError(ClientError):
    """The server answered, with an error. `type` is the API's, or `invalid_response`: no reply of this API."""

    def __init__(self, status: int, type: str, message: str, request_id: str | None = None) -> None:
        super().__init__(status, type, message, request_id)
        self.status, self.type, self.message, self.request_id = status, type, message, request_id

    def __str__(self) -> str:
        of = f" (request {self.request_id})" if self.request_id else ""
        return f"HTTP {self.status} {self.type}: {self.message}{of}"

    @classmethod
    def inside(cls, values: object, request_id: str | None) -> ApiError:
        """The error of an entry of a batch or of an event: `{type, message}`, or `{error: {type, message}}`."""
        found = values.get("error", values) if isinstance(values, dict) else None
        if not isinstance(found, dict):
            return cls(200, INVALID, "an error without type and message", request_id)
        type = str(found.get("type"))
        return cls(_STATUS.get(type, 500), type, str(found.get("message")), request_id)


class Unreachable(ClientError, ConnectionError):
    """No connection, or it broke before the reply was complete, at every attempt."""


class TimedOut(ClientError, TimeoutError):
    """No reply within `timeout_s`, all attempts and waits included."""

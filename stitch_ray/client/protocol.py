"""What is sent, and how replies are read. No network in here."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from stitch_ray.client.errors import INVALID, ApiError
from stitch_ray.client.reply import Reply
from stitch_ray.errors import UserError

ID_HEADER = "x-request-id"
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
BUSY = frozenset({429, 502, 503})


@dataclass(frozen=True, slots=True)
class Call:
    """One request; `request_id` is the same in every attempt, so that the server's log shows them as one."""

    method: str
    path: str
    body: Any = None
    params: Mapping[str, str] = field(default_factory=dict)
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.request_id):
            raise ValueError(f"request_id {self.request_id!r} must be 1 to 128 of A-Z a-z 0-9 . _ -")


class Lost(Exception):
    """The reply did not arrive, or not whole."""


def question_body(
    question: str,
    *,
    context: str | None = None,
    task: str | None = None,
    history: Sequence[Mapping[str, str]] = (),
    target_risk: float | None = None,
    include_trace: bool = False,
    deadline_s: float | None = None,
    max_calls: int | None = None,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """The body of `POST /v1/predict`, without what is not given."""
    given = {
        "context": context,
        "task": task,
        "history": [dict(turn) for turn in history] or None,
        "target_risk": target_risk,
        "include_trace": include_trace or None,
        "deadline_s": deadline_s,
        "max_calls": max_calls,
        "max_tokens": max_tokens,
    }
    return {"question": question, **{name: value for name, value in given.items() if value is not None}}


def base_url(url: str) -> str:
    """Without a slash at its end. Raises UserError if it is none."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(f"url: {url!r} is no address of a server; write http://HOST:PORT")
    return url.rstrip("/")


def is_loopback(url: str) -> bool:
    return urlsplit(url).hostname in ("127.0.0.1", "localhost", "::1")


def read_json(call: Call, status: int, headers: Mapping[str, str], content: bytes) -> Any:
    """The value of a reply. Raises ApiError, or Lost where something between server and client answered in its place."""
    value = _parsed(content)
    if status >= 400:
        found = value.get("error") if isinstance(value, dict) else None
        if isinstance(found, dict) and "type" in found:
            raise ApiError(status, str(found["type"]), str(found.get("message")), call.request_id)
        if status in (500, 502):  # a proxy's own page: the gateway behind it died
            raise Lost(f"HTTP {status} from a proxy")
        text = content[:200].decode("utf-8", "replace").strip()
        raise ApiError(status, "unavailable" if status in BUSY else INVALID, text or "no reason given", call.request_id)
    if status >= 300:
        raise ApiError(status, INVALID, f"redirected to {headers.get('location')}", call.request_id)
    if value is None:
        raise Lost(f"a reply of {len(content)} bytes that is no JSON")
    check_id(call, headers.get(ID_HEADER))
    return value


def read_reply(call: Call, value: Any) -> Reply:
    """Raises ApiError for what is no reply, or is the reply to another request."""
    try:
        reply = Reply.of(value)
    except (ValueError, TypeError) as error:
        raise no_reply(call, str(error)) from error
    check_id(call, reply.id)
    return reply


def read_batch(call: Call, value: Any, count: int) -> list[Reply | ApiError]:
    """One entry a question, in order. Raises ApiError for what is no batch of replies."""
    if not isinstance(value, list) or len(value) != count:
        raise no_reply(call, f"no list of {count} replies")
    try:
        return [
            ApiError.inside(entry, call.request_id) if isinstance(entry, dict) and "error" in entry else Reply.of(entry)
            for entry in value
        ]
    except (ValueError, TypeError) as error:
        raise no_reply(call, str(error)) from error


def read_field(call: Call, value: Any, name: str) -> Any:
    """Raises ApiError if there is none."""
    if not isinstance(value, dict) or name not in value:
        raise no_reply(call, f"the reply has no {name}")
    return value[name]


def read_object(call: Call, value: Any) -> dict[str, Any]:
    """Raises ApiError for anything else."""
    if not isinstance(value, dict):
        raise no_reply(call, f"the reply is no object but {type(value).__name__}")
    return value


def no_reply(call: Call, why: str) -> ApiError:
    return ApiError(200, INVALID, why, call.request_id)


def check_id(call: Call, found: str | None) -> None:
    """Raises ApiError if the reply says that it is another request's."""
    if found is not None and found != call.request_id:
        raise no_reply(call, f"the reply is that of request {found}")


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None

"""Requests that no client should send, byte for byte, and how a server may answer them."""

from __future__ import annotations

import contextlib
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

_TIMEOUT_S = 5.0
_SERVE_FAILS = r"x-request-id: b'\xff\xfe'"
_REFUSED = frozenset({400, 408, 411, 413, 414, 422, 431})


@dataclass(frozen=True, slots=True)
class Reply:
    """status 0: the connection was closed without a word."""

    status: int
    head: str
    body: bytes


def hostile_requests() -> Iterator[tuple[str, bytes, frozenset[int]]]:
    """(what is wrong with it, bytes, statuses that are right). A closed connection is right for all that is no HTTP, and
    for what is refused while it is still being sent."""
    ok, invalid, large = frozenset({200}), frozenset({422}), frozenset({413})

    def predict(body: bytes, *headers: bytes) -> bytes:
        lines = [b"POST /v1/predict HTTP/1.1", b"host: x", b"content-type: application/json", b"connection: close"]
        return b"\r\n".join([*lines, b"content-length: %d" % len(body), *headers, b"", body])

    def of(**values: object) -> bytes:
        return predict(json.dumps({"question": "draft=0.9", **values}).encode())

    plain = b'{"question": "draft=0.9"}'
    yield "10 MB of JSON", of(context="x" * 10_000_000), large | {0}
    chunk = b"%x\r\n%s\r\n" % (65536, b"x" * 65536)
    head = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n"
    yield "10 MB in chunks, without a length", head + b"transfer-encoding: chunked\r\n\r\n" + 160 * chunk, large | {0}
    yield "a length that is not kept", head + b"content-length: 100\r\n\r\n" + plain, _REFUSED | {0}
    yield "a length that is no number", head + b"content-length: many\r\n\r\n" + plain, _REFUSED | {0}
    yield "a length and chunks", predict(plain, b"transfer-encoding: chunked"), _REFUSED | {0}
    yield "a negative length", head + b"content-length: -1\r\n\r\n" + plain, _REFUSED | {0}
    yield "nested lists", predict(b'{"question": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), invalid
    yield "nested objects", predict(b'{"a":' * 50_000 + b"1" + b"}" * 50_000), invalid
    yield "no UTF-8", predict(b'{"question": "\xff\xfe\xc3\x28"}'), invalid
    yield "UTF-16", predict('{"question": "draft=0.9"}'.encode("utf-16")), ok | invalid
    yield "no JSON", predict(b"question=1"), invalid
    yield "half of JSON", predict(plain[:-3]), invalid
    yield "nothing", predict(b""), invalid
    yield "two values", predict(plain + plain), invalid
    yield "NUL characters", predict(rb'{"question": "\u0000 draft=0.9 \u0000"}'), ok
    yield "half of a surrogate pair", predict(rb'{"question": "\ud800 draft=0.9"}'), ok | invalid
    yield "the same twice", predict(b'{"question": "a draft=0.9", "question": "b draft=0.9"}'), ok
    yield "an unknown key", of(__class__="x"), invalid
    for value in (None, 1, True, [], {}, ["draft=0.9"], "", " \n\t"):
        yield f"question: {value!r}", of(question=value), invalid
    for value in (float("nan"), float("inf"), -1, 0, 1, 1e308, 10**400, "0.1; drop", [0.1]):
        yield f"target_risk: {str(value)[:20]}", of(target_risk=value), ok | invalid if value == "0.1" else invalid
    for key in ("max_calls", "max_tokens", "deadline_s"):
        yield f"{key}: huge", of(**{key: 10**400}), ok | invalid
        yield f"{key}: -1", of(**{key: -1}), invalid
    yield "an exponent of a million digits", predict(b'{"question": "q", "max_calls": 1e999999999}'), invalid
    yield "an integer of 100,000 digits", predict(b'{"question": "q", "max_calls": ' + b"9" * 100_000 + b"}"), invalid
    yield "100,000 turns", of(history=[{"role": "user", "content": ""}] * 10_000), invalid | large
    yield "a role that is none", of(history=[{"role": "root", "content": "x"}]), invalid
    for value in (
        b"a\rset-cookie: x=1",
        b"../../etc/passwd",
        b"\xff\xfe",
        b"x" * 5000,
        b"${jndi:ldap://x}",
        b"a b",
        b"",
    ):
        yield f"x-request-id: {value[:20]!r}", predict(plain, b"x-request-id: " + value), ok | _REFUSED | {0}
    yield "a folded header", predict(plain, b"x-request-id: a", b" set-cookie: x=1"), ok | _REFUSED | {0}
    yield (
        "headers without end",
        predict(plain, *(b"x-%d: %s" % (n, b"y" * 1000) for n in range(200))),
        ok | _REFUSED | {0},
    )
    yield (
        "a path out of the tree",
        b"GET /../../etc/passwd HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        frozenset({400, 404}),
    )
    yield (
        "a method that is none",
        b"HACK /v1/predict HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        frozenset({0, 400, 405, 501}),
    )
    yield "no HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20, _REFUSED | {0}


def check_hostile(url: str, behind_serve: bool = False) -> int:
    """How many were sent. Fails unless each was refused as it should be, and the server answers as before.

    behind_serve: Ray 2.60 reads the request's id itself, as UTF-8, before any code of ours, and answers 500 if it is none.
    """
    sent, wrong = 0, []
    for what, request, statuses in hostile_requests():
        reply = send(url, request)
        sent += 1
        if reply.status not in statuses | ({500} if behind_serve and what == _SERVE_FAILS else set()):
            wrong.append(f"{what}: {reply.status}, not one of {sorted(statuses)}: {reply.body[:200]!r}")
        if any(line.lower().startswith("set-cookie") for line in reply.head.split("\r\n")):
            wrong.append(f"{what}: a header of the client's making came back")
        if reply.status == 422 and json.loads(reply.body)["error"]["type"] != "invalid_request":
            wrong.append(f"{what}: {reply.body[:200]!r}")
    assert not wrong, "\n".join(wrong)
    after = send(url, next(request for what, request, _ in hostile_requests() if what == "the same twice"))
    assert after.status == 200
    assert json.loads(after.body)["answer"] == "draft 0.9"
    return sent


def send(url: str, request: bytes) -> Reply:
    """What comes back until it is complete or the connection is closed; nothing comes if a server waits for more."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    received = b""
    with socket.create_connection((parts.hostname, parts.port or 80), timeout=_TIMEOUT_S) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before it was read to the end
            connection.sendall(request)
        with contextlib.suppress(OSError):
            if b"content-length: 100\r\n" in request:
                connection.shutdown(socket.SHUT_WR)
            while not _complete(received) and (piece := connection.recv(65536)):
                received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    status = re.match(rb"HTTP/1\.[01] (\d{3})", head)
    if b"transfer-encoding: chunked" in head.lower():
        body = b"".join(re.findall(rb"[0-9a-fA-F]+\r\n(.*?)\r\n", body, re.DOTALL))
    return Reply(int(status.group(1)) if status else 0, head.decode("latin-1"), body)


def _complete(received: bytes) -> bool:
    head, end, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    if length:
        return bool(end) and len(body) >= int(length.group(1))
    return bool(end) and b"transfer-encoding: chunked" in head.lower() and body.endswith(b"0\r\n\r\n")

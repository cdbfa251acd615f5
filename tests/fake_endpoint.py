"""A real HTTP server on this machine that speaks enough of the OpenAI chat API, and fails on demand."""

from __future__ import annotations

import json
import math
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], "str | dict[str, Any]"]
"""(request body, number of the sample) -> the text, or a whole choice."""


@dataclass(frozen=True)
class Fault:
    """What one request meets in place of an answer.

    status: an error with `headers`. stall_s: nothing is sent for so long, then the answer is. truncated: the JSON stops
    in the middle. dropped: the connection is closed without a word. raw: this text as it is, with status 200.
    """

    status: int | None = None
    headers: tuple[tuple[str, str], ...] = ()
    message: str = "injected"
    code: str | None = None
    stall_s: float = 0.0
    truncated: bool = False
    dropped: bool = False
    raw: str | None = None


@dataclass
class FakeEndpoint:
    """`faults` are met by the first requests, in order of arrival; then every request is answered.

    gives_n: whether `n` is honoured, ignored (one choice) or refused with 400. `seen`: every request's body, headers
    and time of arrival. `most_at_once`: largest number of requests under way together. `abandoned`: requests whose
    client left before it had its answer.
    """

    url: str
    answer: Answer
    faults: list[Fault] = field(default_factory=list)
    gives_n: str = "honoured"
    with_logprobs: bool = True
    delay_s: float = 0.0
    seen: list[dict[str, Any]] = field(default_factory=list)
    most_at_once: int = 0
    abandoned: int = 0
    models: tuple[str, ...] = ("fake",)
    _under_way: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closing: threading.Event = field(default_factory=threading.Event)


@contextmanager
def serving(answer: Answer | str | Callable[[str], str] = "yes", **options: Any) -> Iterator[FakeEndpoint]:
    """A running endpoint. `answer`: one text, a function of the last user turn, or one of (body, sample number)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    endpoint = FakeEndpoint(f"http://127.0.0.1:{server.server_address[1]}/v1", _as_answer(answer), **options)
    server.endpoint = endpoint  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint._closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _as_answer(answer: Any) -> Answer:
    if isinstance(answer, str):
        return lambda _body, _number: answer
    if answer.__code__.co_argcount == 1:
        return lambda body, _number: answer(body["messages"][-1]["content"])
    return answer  # type: ignore[no-any-return]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    _counted = False

    def do_GET(self) -> None:
        if self.path.endswith("/models"):
            self._note({})
            if not self._met(self._fault()):
                models = [
                    {"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in self._endpoint.models
                ]
                self._send(200, json.dumps({"object": "list", "data": models}))
        else:
            self._send(404, "{}")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        endpoint = self._endpoint
        self._note(body)
        with endpoint._lock:
            self._counted = True
            endpoint._under_way += 1
            endpoint.most_at_once = max(endpoint.most_at_once, endpoint._under_way)
        try:
            fault = self._fault()
            if not self._wait(endpoint.delay_s + (fault.stall_s if fault else 0)):
                self.close_connection = True
            elif not self._met(fault):
                self._answer(body, truncated=fault is not None and fault.truncated)
        finally:
            self._done()

    def _done(self) -> None:
        """Before anything is sent: a client that has its answer may be back before this thread runs again."""
        with self._endpoint._lock:
            self._endpoint._under_way -= self._counted
        self._counted = False

    def log_message(self, *_: object) -> None:
        pass

    @property
    def _endpoint(self) -> FakeEndpoint:
        return self.server.endpoint  # type: ignore[attr-defined, no-any-return]

    def _note(self, body: dict[str, Any]) -> None:
        seen = {"path": self.path, "body": body, "headers": dict(self.headers), "at": time.monotonic()}
        with self._endpoint._lock:
            self._endpoint.seen.append(seen)

    def _fault(self) -> Fault | None:
        with self._endpoint._lock:
            return self._endpoint.faults.pop(0) if self._endpoint.faults else None

    def _wait(self, seconds: float) -> bool:
        """False if the client left, or the server is closing, while it waited."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            readable, _, _ = select.select([self.connection], [], [], 0.01)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                with self._endpoint._lock:
                    self._endpoint.abandoned += 1
                return False
            if self._endpoint._closing.is_set():
                return False
        return True

    def _met(self, fault: Fault | None) -> bool:
        """Whether the fault was all there is to say."""
        if fault is None:
            return False
        if fault.dropped:
            self._done()
            self.close_connection = True
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return True
        if fault.status is not None:
            error = {"message": fault.message, "type": "injected", "code": fault.code, "param": None}
            self._send(fault.status, json.dumps({"error": error}), fault.headers)
            return True
        if fault.raw is not None:
            self._send(200, fault.raw)
            return True
        return False

    def _answer(self, body: dict[str, Any], *, truncated: bool) -> None:
        endpoint, count = self._endpoint, body.get("n", 1)
        if count > 1 and endpoint.gives_n == "refused":
            self._send(400, json.dumps({"error": {"message": "n must be 1", "code": None}}))
            return
        count = count if endpoint.gives_n == "honoured" else 1
        choices = [_choice(endpoint.answer(body, number), body, number, endpoint) for number in range(count)]
        if body.get("stream"):
            self._stream(choices[0]["message"]["content"], truncated)
            return
        completion = {
            "id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices,
            "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10},
        }  # fmt: skip
        text = json.dumps(completion)
        self._send(200, text[: len(text) // 2] if truncated else text)

    def _stream(self, text: str, broken: bool) -> None:
        self._done()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        words = text.split(" ")
        pieces = [word if place == 0 else f" {word}" for place, word in enumerate(words)]
        for piece in pieces[: len(pieces) // 2 if broken else None]:
            chunk = {
                "id": "x", "object": "chat.completion.chunk", "created": 0, "model": "fake",
                "choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}],
            }  # fmt: skip
            self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b'data: {"id": "x", "choi\n\n' if broken else b"data: [DONE]\n\n")

    def _send(self, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        data = text.encode()
        self._done()
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)


def _choice(answer: str | dict[str, Any], body: dict[str, Any], number: int, endpoint: FakeEndpoint) -> dict[str, Any]:
    if isinstance(answer, dict):
        return {"index": number, "finish_reason": "stop", **answer}
    logprobs = None
    if body.get("logprobs") and endpoint.with_logprobs:
        words = answer.split(" ") if answer else []
        tokens = [word if place == 0 else f" {word}" for place, word in enumerate(words)]
        logprobs = {"content": [*(_token(token) for token in tokens), _token("")]}  # as vLLM, with the end token
    message = {"role": "assistant", "content": answer}
    return {"index": number, "finish_reason": "stop", "message": message, "logprobs": logprobs}


def _token(text: str) -> dict[str, Any]:
    """A token taken with probability 0.7 before another with 0.2."""
    first, second = ({"token": token, "logprob": math.log(p), "bytes": None} for token, p in ((text, 0.7), ("?", 0.2)))
    return {**first, "top_logprobs": [second, first]}

"""Two calculators behind an OpenAI-compatible server on this machine: the auxiliaries of the demo.

They answer the made questions, which no model that is trained in a minute all can, and err now and then.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random
from typing import Any

from stitch_ray.errors import UserError

SKILLS = {"solver": 0.9, "checker": 0.95}
"""Name of a calculator -> share of the questions that it gets right. Which ones, follows from name and question."""

_QUESTION = re.compile(r'"question": "(?:median of (\d+)|remainder of (\d+) by 7)"')


@contextmanager
def expert_server(port: int = 0) -> Iterator[str]:
    """The base URL of a server that answers while the block runs, on the loopback interface; port 0: a free one.

    Raises UserError if the port is taken.
    """
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    except OSError as error:
        raise UserError(f"port {port} of this machine is taken ({error.strerror}); free it") from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def turn_of(expert: str, prompt: str) -> dict[str, str]:
    """Its turn in a dialogue whose prompt is `prompt`, or its bare answer to a question that stands alone."""
    found = _QUESTION.search(prompt) or _QUESTION.search(f'"question": "{prompt}"')
    if found is None:
        return {"comment": "I only calculate medians and remainders.", "answer": "?"}
    digits, number = found.groups()
    right = sorted(digits)[len(digits) // 2] if digits else str(int(number) % 7)
    rng = Random(f"{expert} {found[0]}")
    if rng.random() < SKILLS[expert]:
        return {"comment": f"I calculated it: {right}.", "answer": right}
    wrong = rng.choice([digit for digit in (digits or "0123456") if digit != right] or ["0"])
    return {"comment": f"It should be {wrong}.", "answer": wrong}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._reply(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in SKILLS]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        if body.get("model") not in SKILLS:
            self._reply(404, {"error": {"message": f"no such model: {body.get('model')!r}"}})
            return
        prompt = body["messages"][-1]["content"]
        turn = turn_of(body["model"], prompt)
        text = json.dumps(turn) if prompt != body["messages"][0]["content"] else turn["answer"]
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        words = sum(len(message["content"].split()) for message in body["messages"])
        usage = {"prompt_tokens": words, "completion_tokens": len(text.split())}
        self._reply(200, {"id": "made", "object": "chat.completion", "choices": [choice], "usage": usage})

    def log_message(self, *_: Any) -> None:
        pass

    def _reply(self, status: int, value: Any) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

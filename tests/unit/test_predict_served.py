"""`predict` over a served ensemble: what is asked, what becomes of the reply, and what pre-flight refuses."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from stitch_ray.config.loading import validate
from stitch_ray.config.predict import PredictConfig, ServedConfig
from stitch_ray.ensemble.batch import preflight
from stitch_ray.ensemble.batch.questions import Asked
from stitch_ray.ensemble.batch.respondents import ServedConnection
from stitch_ray.ensemble.batch.rows import prediction_row
from stitch_ray.ensemble.types import Prediction, Question
from stitch_ray.errors import UserError
from stitch_ray.records import Turn

POLICY = {
    "version": "v1",
    "targets": [{"target_risk": 0.1}, {"target_risk": 0.2}],
    "fingerprints": {"primary": "p", "auxiliaries": ["a", "b"], "scorer": "s", "route": "dialogue:x"},
    "model_version": "m1",
}


class Ensemble(ThreadingHTTPServer):
    """Answers every question; `asked` holds the bodies, `statuses` what to fail with first."""

    daemon_threads = True
    asked: list[dict[str, Any]]
    statuses: list[int]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Ensemble

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        found = {"/healthz": {"status": "ok", "ready": True}, "/v1/policy": POLICY}[self.path]
        self._reply(200, found)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.server.statuses:
            status = self.server.statuses.pop(0)
            self._reply(status, {"error": {"type": "overloaded", "message": "full"}})
            return
        self.server.asked.append(body)
        given = body["question"] != "unsure?"
        trace = [
            {"stage": "draft", "text": "Bach", "calls": 1, "tokens": 5, "seconds": 0.1, "unchecked": True},
            {"stage": "score", "confidence": 0.3, "seconds": 0.1},
            {"stage": "turn", "speaker": "anna", "text": "Homer", "comment": "", "changed": True},
            {"stage": "rescore", "text": "Homer", "confidence": 0.8, "unchecked": True},
        ]
        reply = {
            "id": self.headers["x-request-id"], "answer": "Homer" if given else None, "confidence": 0.8,
            "decision": "answer" if given else "abstain", "reason": "refined" if given else "unsure",
            "route": "dialogue", "calls": 3, "tokens": 40, "target_risk": 0.2, "policy_version": "v1",
            "model_version": "m1", "seconds": 0.4, "trace": trace,
        }  # fmt: skip
        self._reply(200, reply)

    def _reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if request_id := self.headers.get("x-request-id"):
            self.send_header("x-request-id", request_id)
        if status in (429, 503):
            self.send_header("retry-after", "0")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def served() -> Iterator[Ensemble]:
    server = Ensemble(("127.0.0.1", 0), Handler)
    server.asked, server.statuses = [], []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def asked(text: str) -> Asked:
    question = Question(example_id="q1", question=text, context="c", task="t", history=(Turn("user", "before"),))
    return Asked(question, "g", "test", "h", ("Homer",), "file", 1)


def ask(server: Ensemble, text: str = "who?", *, retries: int = 2) -> Prediction | str:
    async def once() -> Prediction | str:
        return await ServedConnection(ServedConfig(url=server.url, max_retries=retries), 0.2, 4)().predict(asked(text))  # type: ignore[call-arg]

    return asyncio.run(once())


def test_a_reply_becomes_the_same_row_as_a_prediction_of_the_job_itself(served: Ensemble) -> None:
    served.statuses = [503]
    found = ask(served)
    assert isinstance(found, Prediction)
    assert (found.draft, found.draft_confidence) == ("Bach", 0.3)
    assert (found.refined, found.final_confidence) == ("Homer", 0.8)
    row = prediction_row(found)
    assert (row["answer"], row["decision"], row["route"], row["policy_version"]) == (
        "Homer",
        "answer",
        "dialogue",
        "v1",
    )
    body = served.asked[0]
    assert body["history"] == [{"role": "user", "content": "before"}]
    assert (body["context"], body["task"], body["target_risk"]) == ("c", "t", 0.2)


def test_an_abstention_stays_one_and_a_server_that_stays_full_fails_the_question(served: Ensemble) -> None:
    found = ask(served, "unsure?")
    assert isinstance(found, Prediction)
    assert (found.answer, found.decision) == (None, "abstain")
    served.statuses = [429] * 3
    failed = ask(served, retries=1)
    assert isinstance(failed, str)
    assert "429" in failed


def config(path: Path, url: str, **values: Any) -> PredictConfig:
    path.write_text('{"question": "who?"}\n')
    data = {"paths": [str(path)], "format": "question"}
    return validate(PredictConfig, {"data": data, "target": {"url": url}, **values}, "config")


def test_preflight_asks_the_server_for_its_policy_and_refuses_a_risk_it_does_not_have(
    served: Ensemble, tmp_path: Path
) -> None:
    ready = preflight.check(config(tmp_path / "q.jsonl", served.url))
    assert ready.fingerprints.auxiliaries == ("a", "b")
    assert ready.work["policy"] == "v1"
    with pytest.raises(UserError, match=r"target_risk: 0\.5 was not calibrated .* 0\.1, 0\.2"):
        preflight.check(config(tmp_path / "q.jsonl", served.url, target_risk=0.5))


def test_a_server_that_is_not_there_is_said_with_its_address(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"target\.url: no ensemble answers at http://127\.0\.0\.1:9"):
        preflight.check(config(tmp_path / "q.jsonl", "http://127.0.0.1:9"))

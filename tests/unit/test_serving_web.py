"""The HTTP API over a service without Ray: what is let in, what is let out, and the errors between."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

from serve_apps.web.app import Frame, build_app
from serve_apps.web.bodies import FeedbackBody
from serve_apps.web.errors import ApiError
from serve_apps.web.guard import Guard, accepted, digest, request_id_of
from serve_apps.web.service import Active, Service
from serve_apps.web.trace import without_texts
from stitch_ray.engines.base import EngineError
from stitch_ray.ensemble.budget import DeadlineExceeded
from stitch_ray.ensemble.types import Emit, Event, Limits, Prediction, Question
from stitch_ray.reliability.policy import Fingerprints, Policy, Target
from stitch_ray.reliability.probability import Platt
from stitch_ray.reliability.stage_scale import StageScale

TOKEN = "a-token-that-is-long-enough"
SECRET = "nobody checked this"


def target(risk: float, threshold: float | None, task: str | None = None) -> Target:
    return Target(task, risk, 0.1, threshold, 100, 40, risk / 2, 0.4, 0.01, "learn_then_test", None)


POLICY = Policy((target(0.1, 0.7), target(0.2, 0.5), target(0.3, 0.4, "math")), Fingerprints("p", (), "s"), {})


def prediction(question: Question, **changes: Any) -> Prediction:
    made = Prediction(
        example_id=question.example_id,
        question=question.question,
        draft=SECRET,
        draft_confidence=0.9,
        answer="Paris is it",
        confidence=0.9,
        decision="answer",
        reason="confident",
        route="none",
        target_risk=0.1,
        calls=1,
        tokens=12,
        policy_version=POLICY.version,
        model_version="m1",
        trace=({"stage": "draft", "text": SECRET, "unchecked": True, "signals": {"perplexity": 1.5, "note": SECRET}},),
        seconds=0.01,
    )
    return replace(made, **changes)


class Scripted:
    """A predictor that does what `act` does, and remembers what it was asked."""

    model_version = "m1"

    def __init__(self) -> None:
        self.act: Callable[[Question], Any] = prediction
        self.asked: list[dict[str, Any]] = []
        self.cancelled = asyncio.Event()
        self.wait: asyncio.Event | None = None

    async def predict(
        self,
        question: Question,
        *,
        policy: Policy,
        target_risk: float | None = None,
        limits: Limits = Limits(),
        emit: Emit | None = None,
    ) -> Prediction:
        self.asked.append({"question": question, "target_risk": target_risk, "limits": limits, "policy": policy})
        if emit is not None:
            await emit(Event("stage", {"stage": "draft", "text": SECRET, "unchecked": True}))
        try:
            if self.wait is not None:
                await self.wait.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        found = self.act(question)
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, Prediction)
        if emit is not None:
            await emit(Event("final", {"answer": SECRET}))
        return found


class Watcher:
    def __init__(self) -> None:
        self.seen: list[Prediction] = []

    def answered(self, prediction: Prediction) -> None:
        self.seen.append(prediction)

    async def labelled(self, label: FeedbackBody) -> dict[str, Any]:
        if label.id == "gone":
            raise ApiError(404, "not_found", "no answer with id gone is remembered")
        return {"id": label.id, "recorded": True}


class Rater:
    async def rate(self, question: Question, answer: str) -> float | None:
        return None if answer == "?" else 0.25


class Gate:
    """A client of the app, the predictor behind it, and what the metrics were told."""

    def __init__(self, client: httpx.AsyncClient, predictor: Scripted, service: Service, done: list[Any]) -> None:
        self.client, self.predictor, self.service, self.done = client, predictor, service, done
        self.post = client.post
        self.get = client.get


@asynccontextmanager
async def gate(
    *, tokens: tuple[str, ...] = (), max_in_flight: int = 8, outdated: bool = False, **frame: Any
) -> AsyncIterator[Gate]:
    predictor, done = Scripted(), []
    service = Service(predictor, Rater(), Watcher(), max_characters=100, max_batch=3, outdated=lambda: outdated)
    service.active = Active(POLICY, "nowhere/policy.json", None, Limits(deadline_s=2.0, max_calls=8, max_tokens=100))

    async def healthy() -> tuple[bool, dict[str, Any]]:
        return True, {"ready": True}

    async def metrics() -> str:
        return "ray_stitch_requests_total 1\n"

    values = {"name": "stitch", "longest_answer": 32, "ui": True, "health": healthy, "metrics": metrics, **frame}
    app = Guard(
        build_app(service, Frame(**values)),
        digests=[digest(token.encode()) for token in tokens],
        max_body_bytes=2000,
        max_in_flight=max_in_flight,
        on_done=lambda *what: done.append(what),
    )
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://gate") as client:
        yield Gate(client, predictor, service, done)


def run(test: Callable[[], Any]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def test_an_answer_has_the_documented_fields_and_no_text_that_nobody_checked() -> None:
    async def test() -> None:
        async with gate() as g:
            response = await g.post("/v1/predict", json={"question": "Where?"}, headers={"x-request-id": "mine.1"})
            assert response.status_code == 200
            body = response.json()
            assert set(body) == {
                *("id", "answer", "confidence", "decision", "reason", "route", "calls", "tokens", "target_risk"),
                *("policy_version", "model_version", "seconds", "trace"),
            }
            assert (body["id"], body["answer"], response.headers["x-request-id"]) == ("mine.1", "Paris is it", "mine.1")
            assert SECRET not in response.text
            assert body["trace"] == [{"stage": "draft", "unchecked": True, "signals": {"perplexity": 1.5}}]
            with_trace = await g.post("/v1/predict", json={"question": "Where?", "include_trace": True})
            assert with_trace.json()["trace"][0] == {**prediction_trace(), "unchecked": True}

    run(test)


@pytest.mark.parametrize(
    ("reason", "outdated", "status"),
    [
        ("route_failed", True, 503),
        ("scorer_unavailable", True, 503),
        ("route_failed", False, 200),
        ("unsure", True, 200),
    ],
)
def test_while_the_models_are_replaced_what_fails_is_to_be_asked_again_and_is_no_abstention(
    reason: str, outdated: bool, status: int
) -> None:
    async def test() -> None:
        async with gate(outdated=outdated) as g:
            withheld = {"answer": None, "confidence": None, "decision": "abstain", "reason": reason}
            g.predictor.act = lambda question: prediction(question, **withheld)
            reply = await g.post("/v1/predict", json={"question": "Q?"})
            assert reply.status_code == status
            assert ("retry-after" in reply.headers) == (status == 503)
            told = reply.json()["error"]["type"] if status == 503 else reply.json()["reason"]
            assert told == ("unavailable" if status == 503 else reason)

    asyncio.run(test())


def test_a_scored_answer_has_the_confidence_that_the_policy_makes_of_its_score() -> None:
    async def test() -> None:
        async with gate() as g:
            asked = {"question": "Q?", "answer": "Paris"}
            assert (await g.post("/v1/score", json=asked)).json() == {"confidence": 0.25}
            scale = StageScale(draft=Platt(1.0, 2.0), refined=Platt(1.0, 0.0))
            g.service.active = replace(g.service.active, policy=replace(POLICY, scale=scale))
            found = (await g.post("/v1/score", json=asked)).json()["confidence"]
            assert found == pytest.approx(1 / (1 + 3 * math.exp(-2.0)))
            assert (await g.get("/v1/policy")).json()["scale"] == scale.to_dict()
            unscored = await g.post("/v1/score", json={**asked, "answer": "?"})
            assert unscored.json() == {"confidence": None}

    run(test)


def prediction_trace() -> dict[str, Any]:
    return dict(prediction(Question(example_id="x", question="x")).trace[0])


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"question": "  \n"},
        {"question": 3},
        {"question": "Q?", "temperature": 1},
        {"question": "Q?", "target_risk": 1.5},
        {"question": "Q?", "target_risk": 0.15},
        {"question": "Q?", "task": "math", "target_risk": 0.1},
        {"question": "Q?", "history": [{"role": "tool", "content": "x"}]},
        {"question": "Q?", "deadline_s": 0},
        {"question": "\ud800"},
        [],
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_asked(body: Any) -> None:
    async def test() -> None:
        async with gate() as g:
            response = await g.post("/v1/predict", content=json.dumps(body))
            assert response.status_code == 422, response.text
            assert response.json()["error"]["type"] == "invalid_request"
            assert g.predictor.asked == []

    run(test)


def test_a_risk_that_was_not_calibrated_is_answered_with_those_that_were() -> None:
    async def test() -> None:
        async with gate() as g:
            response = await g.post("/v1/predict", json={"question": "Q?", "target_risk": 0.15})
            assert "0.1, 0.2" in response.json()["error"]["message"]

    run(test)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"question": NaN}', b"null", b'"text"'])
def test_what_is_no_json_is_refused_in_the_documented_form(content: bytes) -> None:
    async def test() -> None:
        async with gate() as g:
            for path in ("/v1/predict", "/v1/predict/batch", "/v1/score", "/v1/feedback", "/v1/chat/completions"):
                response = await g.post(path, content=content, headers={"content-type": "application/json"})
                assert response.status_code == 422, (path, response.text)
                assert {"type", "message"} <= response.json()["error"].keys()

    run(test)


def test_limits_of_a_request_can_only_be_narrower_than_the_servers() -> None:
    async def test() -> None:
        async with gate() as g:
            narrow = {"question": "Q?", "deadline_s": 0.5, "max_calls": 3, "max_tokens": 9999}
            await g.post("/v1/predict", json=narrow)
            assert g.predictor.asked[0]["limits"] == Limits(deadline_s=0.5, max_calls=3, max_tokens=100)

    run(test)


def test_bodies_and_texts_beyond_the_limits_are_too_large_however_they_are_sent() -> None:
    async def test() -> None:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(50):
                yield b" " * 100

        async with gate() as g:
            at_once = await g.post("/v1/predict", content=b" " * 5000)
            in_chunks = await g.post("/v1/predict", content=chunks())
            long = [await g.post("/v1/predict", json={"question": "x" * 101})]
            long.append(await g.post("/v1/predict", json={"question": "Q", "context": "x" * 101}))
            turns = [{"role": "user", "content": "x" * 60}] * 2
            long.append(await g.post("/v1/predict", json={"question": "Q", "history": turns}))
            long.append(await g.post("/v1/predict/batch", json=[{"question": "Q"}] * 4))
            long.append(await g.post("/v1/score", json={"question": "Q", "answer": "x" * 101}))
            for response in (at_once, in_chunks, *long):
                assert response.status_code == 413, response.text
                assert response.json()["error"]["type"] == "too_large"
            assert g.predictor.asked == []

    run(test)


def test_a_token_is_needed_everywhere_but_where_nothing_is_told() -> None:
    async def test() -> None:
        async with gate(tokens=(TOKEN, "another-token-as-long")) as g:
            wrong = [{}, {"authorization": "Bearer nonsense"}, {"authorization": f"Basic {TOKEN}"}]
            wrong += [{"authorization": TOKEN}, {"authorization": f"Bearer {TOKEN}x"}, {"authorization": "Bearer "}]
            for headers in wrong:
                for path in ("/v1/models", "/v1/policy", "/metrics", "/openapi.json", "/nowhere"):
                    assert (await g.get(path, headers=headers)).status_code == 401, (path, headers)
                response = await g.post("/v1/predict", json={"question": "Q?"}, headers=headers)
                assert (response.status_code, response.json()["error"]["type"]) == (401, "unauthorized")
                assert response.headers["www-authenticate"] == "Bearer"
            assert g.predictor.asked == []
            assert (await g.get("/healthz")).status_code == 200
            for token in (TOKEN, "another-token-as-long"):
                response = await g.get("/v1/models", headers={"authorization": f"Bearer {token}"})
                assert response.status_code == 200

    run(test)


def test_more_requests_than_may_be_under_way_are_told_when_to_come_back() -> None:
    async def test() -> None:
        async with gate(max_in_flight=2) as g:
            g.predictor.wait = asyncio.Event()
            waiting = [asyncio.create_task(g.post("/v1/predict", json={"question": "Q?"})) for _ in range(2)]
            while len(g.predictor.asked) < 2:
                await asyncio.sleep(0)
            refused = await g.post("/v1/predict", json={"question": "Q?"})
            assert (refused.status_code, refused.json()["error"]["type"]) == (429, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            assert (await g.get("/healthz")).status_code == 200
            g.predictor.wait.set()
            assert [(await task).status_code for task in waiting] == [200, 200]
            assert (await g.post("/v1/predict", json={"question": "Q?"})).status_code == 200

    run(test)


@pytest.mark.parametrize(
    ("failure", "status", "kind"),
    [
        (EngineError("x", "the queue is full", retryable=True), 503, "unavailable"),
        (EngineError("x", "the prompt is too long"), 422, "invalid_request"),
        (DeadlineExceeded("no answer within 2 s"), 504, "deadline"),
        (RuntimeError(SECRET), 500, "internal"),
    ],
)
def test_failures_have_their_status_and_tell_no_text(failure: Exception, status: int, kind: str) -> None:
    async def test() -> None:
        async with gate() as g:
            g.predictor.act = lambda question: failure
            response = await g.post("/v1/predict", json={"question": "Q?"})
            assert (response.status_code, response.json()["error"]["type"]) == (status, kind)
            assert ("retry-after" in response.headers) == (status == 503)
            assert SECRET not in response.text
            assert g.done[-1][1] == status

    run(test)


def test_a_batch_is_answered_in_order_and_one_bad_item_harms_no_other() -> None:
    async def test() -> None:
        async with gate() as g:
            items = [{"question": "one"}, {"question": ""}, {"question": "three", "stream": True}]
            response = await g.post("/v1/predict/batch", json=items, headers={"x-request-id": "b"})
            first, second, third = response.json()
            assert (response.status_code, first["id"], first["decision"]) == (200, "b-0", "answer")
            assert second["error"]["type"] == third["error"]["type"] == "invalid_request"
            assert (await g.post("/v1/predict/batch", json=[])).json() == []

    run(test)


def test_a_stream_tells_what_happens_and_ends_with_the_response() -> None:
    async def test() -> None:
        async with gate() as g:
            response = await g.post("/v1/predict", json={"question": "Q?", "stream": True})
            names = [line for line in response.text.splitlines() if line.startswith("event:")]
            assert names == ["event: stage", "event: final"]
            assert response.headers["content-type"].startswith("text/event-stream")
            assert SECRET not in response.text
            final = json.loads(response.text.strip().splitlines()[-1].removeprefix("data: "))
            assert final["answer"] == "Paris is it"
            told = await g.post("/v1/predict", json={"question": "Q?", "stream": True, "include_trace": True})
            assert SECRET in told.text
            g.predictor.act = lambda question: EngineError("x", "gone", retryable=True)
            failed = await g.post("/v1/predict", json={"question": "Q?", "stream": True})
            assert "event: error" in failed.text
            unknown = await g.post("/v1/predict", json={"question": "Q?", "stream": True, "target_risk": 0.5})
            assert unknown.status_code == 422

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_when_the_client_leaves_the_work_ends(stream: bool) -> None:
    async def test() -> None:
        async with gate() as g:
            g.predictor.wait = asyncio.Event()
            body = json.dumps({"question": "Q?", "stream": stream}).encode()
            sent, left = [], asyncio.Event()
            messages = iter([{"type": "http.request", "body": body, "more_body": False}])

            async def receive() -> dict[str, Any]:
                for message in messages:
                    return message
                await left.wait()
                return {"type": "http.disconnect"}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {
                "type": "http",
                "asgi": {"version": "3.0", "spec_version": "2.3"},
                "http_version": "1.1",
                "method": "POST",
                "path": "/v1/predict",
                "raw_path": b"/v1/predict",
                "query_string": b"",
                "root_path": "",
                "headers": [(b"content-type", b"application/json")],
            }
            serving = asyncio.create_task(g.client._transport.app(scope, receive, send))  # type: ignore[attr-defined]
            while not g.predictor.asked:
                await asyncio.sleep(0)
            left.set()
            await g.predictor.cancelled.wait()
            await serving
            assert b"Paris is it" not in b"".join(message.get("body", b"") for message in sent)

    run(test)


def test_a_swap_of_the_policy_is_seen_by_the_next_request_only() -> None:
    async def test() -> None:
        async with gate() as g:
            await g.post("/v1/predict", json={"question": "Q?"})
            other = Policy((target(0.1, 0.95),), Fingerprints("p", (), "s"), {})
            g.service.active = replace(g.service.active, policy=other, target_risk=0.1)
            await g.post("/v1/predict", json={"question": "Q?"})
            first, second = g.predictor.asked
            assert (first["policy"], second["policy"]) == (POLICY, other)
            shown = (await g.get("/v1/policy")).json()
            assert (shown["version"], shown["active"]["threshold"]) == (other.version, 0.95)

    run(test)


def test_operations_and_unknown_paths() -> None:
    async def test() -> None:
        async with gate() as g:
            assert (await g.get("/")).headers["location"] == "/ui/"
            assert (await g.get("/metrics")).text.startswith("ray_stitch_")
            for response, status in [(await g.get("/nope"), 404), (await g.get("/v1/predict"), 405)]:
                assert (response.status_code, set(response.json()["error"])) == (status, {"type", "message"})
            assert (await g.get("/v1/policy/curve")).status_code == 404
            assert (await g.post("/v1/score", json={"question": "Q?", "answer": "A"})).json() == {"confidence": 0.25}
            assert (await g.post("/v1/score", json={"question": "Q?", "answer": "?"})).json() == {"confidence": None}
            assert (await g.post("/v1/feedback", json={"id": "a", "correct": True})).json()["recorded"] is True
            assert (await g.post("/v1/feedback", json={"id": "gone", "correct": True})).status_code == 404
        async with gate(ui=False) as g:
            assert (await g.get("/")).status_code == 404

    run(test)


CHAT = {"model": "stitch", "messages": [{"role": "user", "content": "Where?"}]}


def test_a_chat_is_the_last_question_and_the_turns_before_it() -> None:
    async def test() -> None:
        async with gate() as g:
            parts = [{"type": "text", "text": "And"}, {"type": "text", "text": "now?"}]
            messages = [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": "Where?"},
                {"role": "assistant", "content": "Paris"},
                {"role": "user", "content": parts},
            ]
            body = {**CHAT, "messages": messages, "selective": {"target_risk": 0.3, "task": "math"}, "temperature": 0.7}
            response = await g.post("/v1/chat/completions", json=body)
            assert response.status_code == 200, response.text
            asked = g.predictor.asked[0]
            assert (asked["question"].question, asked["target_risk"]) == ("And\nnow?", 0.3)
            assert [turn.role for turn in asked["question"].history] == ["system", "user", "assistant"]
            choice = response.json()["choices"][0]
            assert (choice["message"]["content"], choice["message"]["refusal"]) == ("Paris is it", None)
            assert response.json()["selective"]["decision"] == "answer"
            assert response.json()["usage"]["total_tokens"] == 12

    run(test)


def test_an_abstention_is_a_refusal_in_a_chat_also_when_streamed() -> None:
    async def test() -> None:
        async with gate() as g:
            g.predictor.act = lambda q: prediction(q, answer=None, decision="abstain", reason="unsure", confidence=0.2)
            message = (await g.post("/v1/chat/completions", json=CHAT)).json()["choices"][0]["message"]
            assert message["content"] == ""
            assert "not sure" in message["refusal"]
            streamed = await g.post("/v1/chat/completions", json={**CHAT, "stream": True})
            chunks = [json.loads(line[6:]) for line in streamed.text.splitlines() if line.startswith("data: {")]
            deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
            assert "".join(delta.get("content", "") for delta in deltas) == ""
            assert any(delta.get("refusal") for delta in deltas)
            assert chunks[-1]["selective"]["decision"] == "abstain"
            assert streamed.text.endswith("data: [DONE]\n\n")

    run(test)


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"model": "gpt-4"}, 404),
        ({"n": 2}, 422),
        ({"tools": [{"type": "function"}]}, 422),
        ({"logprobs": True}, 422),
        ({"stop": ["x"]}, 422),
        ({"response_format": {"type": "json_object"}}, 422),
        ({"max_tokens": 4}, 422),
        ({"messages": []}, 422),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 422),
        ({"messages": [{"role": "user", "content": " "}]}, 422),
    ],
)
def test_what_a_chat_could_only_get_silently_wrong_is_refused_as_openai_clients_expect(
    change: dict[str, Any], status: int
) -> None:
    async def test() -> None:
        async with gate() as g:
            response = await g.post("/v1/chat/completions", json={**CHAT, **change})
            assert response.status_code == status, response.text
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
            assert g.predictor.asked == []

    run(test)


def test_ids_of_clients_are_taken_only_where_they_can_stand_in_a_log() -> None:
    assert request_id_of(b"abc-1_2.3") == "abc-1_2.3"
    for bad in (None, b"", b"a b", b"a\nb", b"x" * 129, "é".encode()):
        assert len(request_id_of(bad)) == 32


def test_tokens_are_compared_by_digest() -> None:
    assert accepted(b"one", [digest(b"two"), digest(b"one")])
    assert not accepted(b"one", [digest(b"two"), "one"])
    assert not accepted(b"", [])


def test_no_string_of_a_trace_is_shown_unless_it_is_a_name_of_ours() -> None:
    entry = {"stage": "turn", "speaker": "first", "text": "t", "comment": "c", "anything": "new", "list": ["t"], "n": 1}
    assert without_texts([entry]) == [{"stage": "turn", "speaker": "first", "n": 1}]

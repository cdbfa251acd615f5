"""A server that speaks the HTTP API with set answers and fails on demand: for tests of the client, `ask` and the page."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse

from stitch_ray.reliability.cascade import replay

DRAFT, SECOND = (
    "The bridge was designed by Gustave Eiffel in 1884",
    "The viaduct was designed by Gustave Eiffel in 1880",
)
LAST = "The Garabit viaduct was designed by Gustave Eiffel in 1880"
SIGNALS = {"sequence_log_probability": -0.41, "mean_token_entropy": 0.83, "self_consistency": None}
TARGETS = [
    {"task": None, "target_risk": risk, "delta": 0.1, "threshold": threshold, "n_calibration": 400, "num_accepted": 260,
     "empirical_risk": 0.07, "coverage": 0.65, "p_value": 0.04, "method": "learn_then_test", "reason": None}
    for risk, threshold in ((0.1, 0.8), (0.05, 0.9), (0.01, None))
]  # fmt: skip
POLICY = {"version": "p0l1cy", "default": TARGETS[0], "targets": TARGETS, "fingerprints": {}, "joint_delta": 0.3,
          "active": TARGETS[0], "model_version": "m0del"}  # fmt: skip


def made_calibration(n: int = 400, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Two looks at answers, the second surer and more often right; confidences of two digits, so that some are equal."""
    rng = np.random.default_rng(seed)
    draft = np.round(rng.beta(3, 1.5, n), 2)
    final = np.round(np.clip(draft + rng.normal(0.08, 0.12, n), 0, 1), 2)
    return draft, (rng.random(n) > draft) * 1.0, final, (rng.random(n) > final) * 1.0


@dataclass(frozen=True)
class Fault:
    """What one request meets in place of its reply.

    status: with `headers` and `body`. dropped: the connection closes within the reply. truncated: half of the JSON.
    stall: nothing is sent until the client leaves. wrong_id: the id of another request. after_events: a stream breaks
    off after so many events.
    """

    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str | None = None
    dropped: bool = False
    truncated: bool = False
    stall: bool = False
    wrong_id: bool = False
    after_events: int | None = None


@dataclass
class FakeGateway:
    """`faults` are met by the first requests. `seen`: path, headers and body of every request; `left`: paths of those
    whose client left before the end. `calibration`: (draft confidence, draft loss, final confidence, final loss).
    """

    url: str
    app: FastAPI
    token: str | None = None
    faults: list[Fault] = field(default_factory=list)
    seen: list[dict[str, Any]] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    labels: dict[str, bool] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=lambda: json.loads(json.dumps(POLICY)))
    calibration: tuple[np.ndarray, ...] | None = field(default_factory=made_calibration)
    hold: threading.Event = field(default_factory=threading.Event)


def curve(calibration: tuple[np.ndarray, ...]) -> dict[str, Any]:
    thresholds = np.unique(np.concatenate([calibration[0], calibration[2]]))
    accepted, losses = replay(*calibration, thresholds)
    given = accepted.sum(1)
    return {
        "num": len(calibration[0]),
        "thresholds": thresholds.tolist(),
        "coverage": (given / len(calibration[0])).tolist(),
        "risk": [float(loss / count) if count else None for loss, count in zip(losses.sum(1), given, strict=True)],
    }


def reply_to(body: Mapping[str, Any], request_id: str, policy: Mapping[str, Any]) -> dict[str, Any]:
    """`Who`: refined in a dialogue; `Will`: refined and still not sure; anything else: a confident draft."""
    risk = body.get("target_risk") or policy["active"]["target_risk"]
    question, trace = body["question"], bool(body.get("include_trace"))
    draft = (
        DRAFT
        if question.startswith(("Who", "Will"))
        else f"Paris <b>not bold</b> ${{1+1}} {{{{value}}}} ({len(question)})"
    )
    base = {
        "id": request_id,
        "target_risk": risk,
        "policy_version": policy["version"],
        "model_version": "m0del",
        "seconds": 0.21,
    }
    first = [
        {
            "stage": "draft",
            "text": draft,
            "unchecked": True,
            "signals": SIGNALS,
            "calls": 1,
            "tokens": 31,
            "seconds": 0.05,
        },
        {"stage": "score", "confidence": 0.42 if draft == DRAFT else 0.93, "seconds": 0.004},
    ]
    turns = [
        {"stage": "turn", "number": 1, "speaker": "first", "text": SECOND, "comment": "A viaduct, and earlier.", "changed": True,
         "attempts": 1, "tokens": 90, "seconds": 0.06, "unchecked": True},
        {"stage": "turn", "number": 2, "speaker": "second", "text": LAST, "comment": "Name it.", "changed": True,
         "attempts": 2, "tokens": 120, "seconds": 0.07, "unchecked": True},
        {"stage": "turn", "number": 3, "speaker": "first", "text": LAST, "comment": "Agreed.", "changed": False,
         "attempts": 1, "tokens": 130, "seconds": 0.06, "unchecked": True},
    ]  # fmt: skip
    if draft != DRAFT:
        found = {
            "answer": draft,
            "confidence": 0.93,
            "decision": "answer",
            "reason": "confident",
            "route": "none",
            "calls": 1,
            "tokens": 31,
        }
        steps = [*first, {"stage": "decision", "decision": "answer", "reason": "confident", "seconds": 0.0}]
    else:
        unsure = question.startswith("Will")
        confidence = 0.55 if unsure else 0.88
        found = {"answer": None if unsure else LAST, "confidence": confidence, "decision": "abstain" if unsure else "answer",
                 "reason": "unsure" if unsure else "refined", "route": "dialogue", "calls": 5, "tokens": 371}  # fmt: skip
        steps = [*first, *turns, {"stage": "rescore", "confidence": confidence, "signals": SIGNALS, "seconds": 0.02},
                 {"stage": "decision", "decision": found["decision"], "reason": found["reason"], "seconds": 0.0}]  # fmt: skip
    if not trace:
        steps = [{key: value for key, value in step.items() if key not in ("text", "comment")} for step in steps]
    return {**base, **found, "trace": steps}


@contextmanager
def serving(prepare: Callable[[FakeGateway], object] | None = None, **options: Any) -> Iterator[FakeGateway]:
    """A running gateway on a free port; `prepare` may add to its `app` before it starts."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(128)  # who comes before the server is up waits
    gateway = FakeGateway(f"http://127.0.0.1:{listener.getsockname()[1]}", FastAPI(), **options)
    _routes(gateway)
    if prepare is not None:
        prepare(gateway)
    outer = _Faulty(gateway)
    server = uvicorn.Server(uvicorn.Config(outer, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield gateway
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _routes(gateway: FakeGateway) -> None:
    app = gateway.app

    @app.exception_handler(HTTPException)
    async def failed(_: Request, error: HTTPException) -> JSONResponse:
        type_ = {401: "unauthorized", 404: "not_found", 409: "conflict", 422: "invalid_request"}[error.status_code]
        return JSONResponse({"error": {"type": type_, "message": error.detail}}, error.status_code)

    def target_of(body: Mapping[str, Any]) -> None:
        risks = [target["target_risk"] for target in gateway.policy["targets"]]
        if body.get("target_risk") not in (None, *risks):
            raise HTTPException(422, f"no threshold was calibrated for {body['target_risk']}; calibrated are {risks}")

    @app.post("/v1/predict")
    async def predict(request: Request) -> Any:
        body = await request.json()
        target_of(body)
        found = reply_to(body, request.state.id, gateway.policy)
        if not body.get("stream"):
            return found
        fault = request.state.fault
        return StreamingResponse(_events(gateway, body, found, fault), media_type="text/event-stream")

    @app.post("/v1/predict/batch")
    async def batch(request: Request) -> Any:
        entries = []
        for body in await request.json():
            if not body["question"]:
                entries.append({"error": {"type": "invalid_request", "message": "an empty question"}})
            else:
                entries.append(reply_to(body, uuid.uuid4().hex, gateway.policy))
        return entries

    @app.post("/v1/score")
    async def score(_: Request) -> Any:
        return {"confidence": 0.61}

    @app.post("/v1/feedback")
    async def feedback(request: Request) -> Any:
        body = await request.json()
        if body["id"] == "unknown":
            raise HTTPException(404, "no such answer")
        if gateway.labels.setdefault(body["id"], body["correct"]) != body["correct"]:
            raise HTTPException(409, "labelled otherwise before")
        return {"id": body["id"], "recorded": True}

    @app.get("/v1/policy")
    async def policy() -> Any:
        return gateway.policy

    @app.get("/v1/policy/curve")
    async def points(task: str | None = None) -> Any:
        if gateway.calibration is None:
            raise HTTPException(404, "the policy's run has no calibration.parquet")
        return {**curve(gateway.calibration), "active": gateway.policy["active"]}

    @app.get("/favicon.ico", status_code=204)
    async def icon() -> None:
        """A browser asks for it."""

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": "stitch", "object": "model"}]}

    @app.get("/healthz")
    async def health() -> Any:
        return {"status": "ok", "ready": True}


async def _events(
    gateway: FakeGateway, body: Mapping[str, Any], found: dict[str, Any], fault: Fault | None
) -> AsyncIterator[str]:
    sent = 0
    try:
        for step in [*found["trace"], None]:
            if fault is not None and fault.after_events == sent:
                raise ConnectionResetError
            if body["question"].startswith("Will it hold"):
                while not gateway.hold.is_set():
                    await asyncio.sleep(0.01)
            kind = "final" if step is None else "turn" if step["stage"] == "turn" else "stage"
            yield f"event: {kind}\ndata: {json.dumps(found if step is None else step)}\n\n"
            sent += 1
    except asyncio.CancelledError:
        gateway.left.append("/v1/predict")
        raise


class _Faulty:
    """The API behind its token, its request ids and the faults."""

    def __init__(self, gateway: FakeGateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        gateway = self._gateway
        if scope["type"] != "http" or not scope["path"].startswith(("/v1", "/healthz")):
            await gateway.app(scope, receive, send)
            return
        body = b""
        while (message := await receive()).get("more_body") or message.get("body"):
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        gateway.seen.append({"path": scope["path"], "headers": headers, "body": json.loads(body) if body else None})
        fault = gateway.faults.pop(0) if gateway.faults else None
        request_id = "another" if fault and fault.wrong_id else headers.get("x-request-id", "made")
        scope.setdefault("state", {}).update(id=request_id, fault=fault)
        read = False

        async def receive_again() -> Any:
            nonlocal read
            if not read:
                read = True
                return {"type": "http.request", "body": body, "more_body": False}
            return await receive()

        async def send_marked(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            elif fault and fault.truncated:
                text = message.get("body", b"")
                message = {**message, "body": text[: len(text) // 2] + b" " * (len(text) - len(text) // 2)}
            elif fault and fault.dropped and message.get("body"):
                await send({**message, "body": message["body"][:5], "more_body": True})
                raise ConnectionResetError
            await send(message)

        app: Any = gateway.app
        if gateway.token and headers.get("authorization") != f"Bearer {gateway.token}":
            app = JSONResponse({"error": {"type": "unauthorized", "message": "no valid token"}}, 401)
        elif fault and fault.stall:
            while (await receive())["type"] != "http.disconnect":
                pass
            gateway.left.append(scope["path"])
            return
        elif fault and fault.status:
            text = (
                json.dumps({"error": {"type": "injected", "message": "injected"}}) if fault.body is None else fault.body
            )
            app = StreamingResponse(iter([text]), fault.status, dict(fault.headers), "application/json")
        await app(scope, receive_again, send_marked)

"""The HTTP API without Ray: the real guard, routes, service and predictor around scripted members, in a thread."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from serve_apps.web.app import Frame, build_app
from serve_apps.web.bodies import FeedbackBody
from serve_apps.web.errors import ApiError
from serve_apps.web.guard import Guard
from serve_apps.web.service import Active, PrimaryRater, Service
from stitch_ray.config.serve import ServeConfig
from stitch_ray.ensemble.predictor import build_predictor
from stitch_ray.ensemble.remote import RemoteAuxiliary, RemotePrimary, RemoteScorer
from stitch_ray.ensemble.types import Limits, Prediction
from stitch_ray.reliability.policy import Policy
from tests.serving.scripted import ScriptedAuxiliary, ScriptedPrimary, ScriptedScorer, scripted_config


class _Call:
    """Of a member in this process."""

    def __init__(self, deployment: Any, version: str) -> None:
        self._member = deployment.func_or_class(version)
        self.described = {"fingerprint": version, **self._member.described()}

    async def __call__(self, method: str, *args: Any, adapter: str | None = None) -> Any:
        return await self._member.call(None, method, args)


class _Watcher:
    def __init__(self) -> None:
        self.ids: set[str] = set()

    def answered(self, prediction: Prediction) -> None:
        self.ids.add(prediction.example_id)

    async def labelled(self, label: FeedbackBody) -> dict[str, Any]:
        if label.id not in self.ids:
            raise ApiError(404, "not_found", f"no answer with id {label.id} is remembered")
        return {"id": label.id, "recorded": True}


@contextmanager
def local_gateway(folder: Path, **http: Any) -> Iterator[str]:
    """Its URL. `http`: values of that section of the configuration; no token is needed."""
    config = scripted_config(folder, http=http)
    guard = Guard(
        build_app(_service(config), Frame("stitch", 16, False, _healthy, _metrics)),
        digests=(),
        max_body_bytes=config.http.max_body_bytes,
        max_in_flight=config.http.max_in_flight,
    )
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(guard, log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        assert httpx.get(f"{url}/healthz", trust_env=False).status_code == 200
        yield url
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def _service(config: ServeConfig) -> Service:
    names = [member.name for member in config.ensemble.auxiliaries]
    calls = [_Call(ScriptedPrimary, "primary-1"), *(_Call(ScriptedAuxiliary, f"{name}-1") for name in names)]
    scoring = _Call(ScriptedScorer, "scorer-1")
    primary, scorer = RemotePrimary(calls[0], calls[0].described), RemoteScorer(scoring, scoring.described)
    auxiliaries = [RemoteAuxiliary(call, call.described) for call in calls[1:]]
    predictor = build_predictor(config.ensemble, primary, auxiliaries, scorer)
    limits = {"max_characters": config.http.max_characters, "max_batch": config.http.max_batch}
    service = Service(predictor, PrimaryRater(primary, scorer), _Watcher(), **limits)
    service.active = Active(Policy.load(config.policy), config.policy, None, Limits(deadline_s=5.0))
    return service


async def _healthy() -> tuple[bool, dict[str, Any]]:
    return True, {"status": "ok", "ready": True}


async def _metrics() -> str:
    return "ray_stitch_requests_total 1\n"

"""A controller with workers, as FastChat is built: three processes that speak HTTP. As a program: one of them.

Clients ask the front; the front asks the controller which worker to ask, then asks that one; workers report to the
controller. No tokens, validation, scoring or metrics: what any server of this shape costs at least.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import aiohttp
from fastapi import FastAPI, Request

ROLES = ("controller", "worker", "front")
_HOST = "127.0.0.1"


@contextmanager
def running() -> Iterator[str]:
    """The URL that answers POST, for as long as the block lasts."""
    from serve_apps.deploying import free_port  # brings more along than the three processes need

    ports = [str(free_port(_HOST)) for _ in ROLES]
    with ExitStack() as stack:
        for role in ROLES:
            command = [sys.executable, "-m", "benchmarks.served.controller", role, *ports]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.terminate)
        url = f"http://{_HOST}:{ports[2]}/answer"
        _wait(url)
        yield url


def controller(addresses: dict[str, str]) -> FastAPI:
    app = FastAPI()
    waiting = {addresses["worker"]: 0}

    @app.post("/get_worker_address")
    async def pick(request: Request) -> dict[str, str]:
        await request.json()
        least = min(waiting, key=lambda name: waiting[name])
        return {"address": least}

    return app


def worker(addresses: dict[str, str]) -> FastAPI:
    app = FastAPI()

    @app.post("/generate")
    async def generate(request: Request) -> dict[str, Any]:
        question = (await request.json())["question"]
        return {"text": f"draft {question}", "error_code": 0}

    return app


def front(addresses: dict[str, str]) -> FastAPI:
    app = FastAPI()
    sessions: list[aiohttp.ClientSession] = []

    async def asked(url: str, body: dict[str, Any]) -> dict[str, Any]:
        if not sessions:
            sessions.append(aiohttp.ClientSession())
        async with sessions[0].post(url, json=body) as response:
            found: dict[str, Any] = await response.json()
            return found

    @app.post("/answer")
    async def answer(request: Request) -> dict[str, Any]:
        body = await request.json()
        place = await asked(f"{addresses['controller']}/get_worker_address", {"model": "scripted"})
        return await asked(f"{place['address']}/generate", body)

    return app


def _wait(url: str, seconds: float = 60) -> None:
    from urllib.error import URLError
    from urllib.request import Request as Sent
    from urllib.request import urlopen

    ends = time.monotonic() + seconds
    while True:
        try:
            urlopen(Sent(url, b'{"question": "up?"}', {"content-type": "application/json"}), timeout=5).close()
            return
        except URLError:  # the front answers 500 until the others are there
            if time.monotonic() > ends:
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    import uvicorn

    role, *taken = sys.argv[1:]
    at = dict(zip(ROLES, (f"http://{_HOST}:{port}" for port in taken), strict=True))
    app = {"controller": controller, "worker": worker, "front": front}[role](at)
    uvicorn.run(app, host=_HOST, port=int(taken[ROLES.index(role)]), log_level="critical")

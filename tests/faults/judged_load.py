"""Closed loops of clients in a thread, whose every response is judged, while the test breaks things."""

from __future__ import annotations

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import aiohttp

from stitch_ray.client import AsyncClient
from stitch_ray.client.errors import ApiError, ClientError
from tests.faults.judging import RIGHT, Asked, Report, judge, question

CLIENTS = 8
MOST_REQUESTS = 100_000


class Clients:
    """`report()`: of what was answered so far, or, after the block, of everything."""

    def __init__(self, url: str, thresholds: Mapping[str, float], options: Mapping[str, Any]) -> None:
        self.thresholds = dict(thresholds)
        self.retry_after = 0
        self._url = url
        self._ask: Callable[[int, random.Random], str] = options.get("ask", question)
        self._clients: int = options.get("clients", CLIENTS)
        self._through_client: bool = options.get("through_client", False)
        self._feedback: bool = options.get("feedback", False)
        self._pause_s: float = options.get("pause_s", 0.0)
        self._asked: list[Asked] = []
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    def report(self) -> Report:
        return Report(list(self._asked))

    @property
    def now(self) -> float:
        """On the clock of `Asked.at`."""
        return time.monotonic()

    def for_s(self, seconds: float) -> None:
        """Let them ask for so long; fails if they stopped by themselves."""
        time.sleep(seconds)
        assert self._thread.is_alive()

    async def _all(self) -> None:
        numbers = iter(range(MOST_REQUESTS))
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=100)
        async with (
            aiohttp.ClientSession(self._url, connector=connector, timeout=timeout) as session,
            AsyncClient(self._url) as client,
        ):
            send = self._send_client(client) if self._through_client else self._send_raw(session)
            await asyncio.gather(*(self._one(numbers, send) for _ in range(self._clients)))

    async def _one(self, numbers: Iterator[int], send: Callable[[str], Any]) -> None:
        drawn = random.Random(next(numbers))
        for number in numbers:
            if self._stopped.is_set():
                return
            text = self._ask(number, drawn)
            at = time.monotonic()
            verdict, response = await send(text)
            self._asked.append(Asked(text, at, time.monotonic() - at, verdict, response))
            if verdict != RIGHT and self._pause_s:
                await asyncio.sleep(self._pause_s)

    def _send_raw(self, session: aiohttp.ClientSession) -> Callable[[str], Any]:
        async def send(text: str) -> tuple[str, Any]:
            try:
                async with session.post("/v1/predict", json={"question": text}) as reply:
                    self.retry_after += "retry-after" in reply.headers
                    if reply.status != 200:
                        return str(reply.status), (await reply.text())[:300]
                    response = await reply.json()
                verdict = judge(text, response, self.thresholds)
                if self._feedback and verdict == RIGHT:
                    label = {"id": response["id"], "correct": True}
                    async with session.post("/v1/feedback", json=label) as told:
                        if told.status != 200:
                            return f"feedback {told.status}", (await told.text())[:300]
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                return type(error).__name__, str(error)
            return verdict, response

        return send

    def _send_client(self, client: AsyncClient) -> Callable[[str], Any]:
        async def send(text: str) -> tuple[str, Any]:
            try:
                reply = await client.predict(text)
            except ApiError as error:
                return str(error.status), str(error)
            except ClientError as error:
                return type(error).__name__, str(error)
            return judge(text, reply.raw, self.thresholds), reply.raw

        return send

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=120)
        assert not self._thread.is_alive(), "a client still waits for its response"


@contextmanager
def asking(url: str, thresholds: Mapping[str, float], **options: Any) -> Iterator[Clients]:
    """Eight clients that ask until the block ends.

    ask: what request `number` asks; clients: how many; through_client: with stitch_ray.client, else bare HTTP; feedback:
    every answer is labelled as well; pause_s: what a client waits after anything but a right response.
    """
    clients = Clients(url, thresholds, options)
    clients.start()
    try:
        yield clients
    finally:
        clients.stop()


def cycle(*texts: str) -> Callable[[int, random.Random], str]:
    """Ask these in turn, and between any two a question that orders no fault."""
    turns = itertools.cycle(texts)

    def ask(number: int, drawn: random.Random) -> str:
        return question(number, drawn) if number % 2 else f"{next(turns)} number={number}"

    return ask

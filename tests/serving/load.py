"""A closed loop of clients: each asks, waits for the answer, asks again."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass(slots=True)
class Load:
    """What came back. seconds: of every response; failures: by status, or by name of the exception."""

    responses: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    retry_after: int = 0

    def quantile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def closed_loop(
    url: str,
    body: Callable[[int], dict[str, Any]],
    *,
    clients: int,
    requests: int | None = None,
    until: asyncio.Event | None = None,
    path: str = "/v1/predict",
    headers: dict[str, str] | None = None,
) -> Load:
    """`requests` in all, or until `until` is set. body(number): what request `number` sends."""
    load, number = Load(), iter(range(requests if requests is not None else 10**9))
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, headers=headers, trust_env=False) as client:

        async def one() -> None:
            for place in number:
                if until is not None and until.is_set():
                    return
                started = time.perf_counter()
                try:
                    response = await client.post(path, json=body(place))
                except httpx.HTTPError as error:
                    load.failures[type(error).__name__] += 1
                    continue
                load.seconds.append(time.perf_counter() - started)
                load.statuses[response.status_code] += 1
                if response.status_code == 200:
                    load.responses.append(response.json())
                else:
                    load.failures[str(response.status_code)] += 1
                    load.retry_after += "retry-after" in response.headers

        await asyncio.gather(*(one() for _ in range(clients)))
    return load

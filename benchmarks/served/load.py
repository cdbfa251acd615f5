"""A closed loop of cheap clients: each asks over its own connection, waits for the answer, asks again."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp


@dataclass(slots=True)
class Load:
    """seconds: of every request; done_at: when it was answered, from the start; whole_s: from the first request to the
    last answer; wrong: answered 200, not as due; responses: in the order of the requests, if they are kept."""

    seconds: list[float] = field(default_factory=list)
    done_at: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    wrong: int = 0
    responses: list[dict[str, Any]] = field(default_factory=list)
    whole_s: float = 0.0

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.seconds) / self.whole_s

    def quantile_ms(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def facts(self) -> dict[str, Any]:
        """For the JSON beside the table."""
        return {
            "requests": len(self.seconds),
            "rate": self.rate,
            "p50_ms": self.quantile_ms(0.5),
            "p99_ms": self.quantile_ms(0.99),
            "statuses": {str(status): num for status, num in self.statuses.items()},
            "wrong": self.wrong,
        }

    def check(self) -> Load:
        """Raises RuntimeError if any request failed or was answered wrongly: its time means nothing."""
        if set(self.statuses) != {200} or self.wrong:
            raise RuntimeError(f"not all requests were answered: {dict(self.statuses)}, {self.wrong} wrong")
        return self


async def ask_all(
    url: str,
    bodies: Sequence[Mapping[str, Any]],
    *,
    clients: int,
    requests: int | None = None,
    seconds: float | None = None,
    headers: Mapping[str, str] | None = None,
    due: Mapping[str, Any] | None = None,
    keep: bool = False,
) -> Load:
    """`requests` in all, or as many as begin within `seconds`, over the bodies in turn. due: what each response holds."""
    load = Load()
    sent = [json.dumps(body).encode() for body in bodies]
    numbers = itertools.count() if requests is None else iter(range(requests))
    headers = {**(headers or {}), "content-type": "application/json"}
    connector = aiohttp.TCPConnector(limit=clients)
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def one() -> None:
            for number in numbers:
                started = time.perf_counter()
                if seconds is not None and started - began >= seconds:
                    return
                async with session.post(url, data=sent[number % len(sent)]) as response:
                    content = await response.read()
                ended = time.perf_counter()
                load.seconds.append(ended - started)
                load.done_at.append(ended - began)
                load.statuses[response.status] += 1
                if (due or keep) and response.status == 200:
                    found = json.loads(content)
                    load.wrong += any(found.get(key) != value for key, value in (due or {}).items())
                    if keep:
                        kept[number] = found

        kept: dict[int, dict[str, Any]] = {}
        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(clients)))
        load.whole_s = time.perf_counter() - began
    load.responses = [kept[number] for number in sorted(kept)]
    return load


def measure(url: str, bodies: Sequence[Mapping[str, Any]], **options: Any) -> Load:
    """As `ask_all`, from outside of any event loop."""
    return asyncio.run(ask_all(url, bodies, **options))

"""Server-sent events: what happens on the way to an answer, then the answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import StreamingResponse

from serve_apps.web.errors import ApiError
from stitch_ray.ensemble.types import Emit, Event

HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Answer = Callable[[Emit], Awaitable[dict[str, Any]]]


def event(name: str, data: Mapping[str, Any]) -> bytes:
    return f"event: {name}\ndata: {json.dumps(data, allow_nan=False, separators=(',', ':'))}\n\n".encode()


def stream(answer: Answer) -> StreamingResponse:
    """Events `stage`, `turn`, then `final` with the response, or `error`. `answer` is cancelled when the client leaves."""
    return StreamingResponse(events(answer), media_type="text/event-stream", headers=HEADERS)


async def events(answer: Answer) -> AsyncIterator[bytes]:
    """What is sent, one event at a time."""
    happened: asyncio.Queue[Event | None] = asyncio.Queue()
    task = asyncio.ensure_future(answer(happened.put))
    task.add_done_callback(lambda _: happened.put_nowait(None))
    try:
        while (one := await happened.get()) is not None:
            yield event(one.kind, one.data)
        try:
            yield event("final", task.result())
        except ApiError as error:
            yield event("error", error.body())
    finally:
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

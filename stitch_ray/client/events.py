"""Server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

from stitch_ray.client.protocol import Lost


async def read_events(lines: AsyncIterator[str]) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """(event, data) of each event; an event ends with an empty line, and one without it does not count.

    Raises Lost for data that is no JSON object.
    """
    name = "message"
    data: list[str] = []
    async for line in lines:
        key, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield name, _object("\n".join(data))
            name, data = "message", []
        elif key == "event":
            name = value
        elif key == "data":
            data.append(value)


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise Lost("an event that is no JSON") from error
    if not isinstance(values, dict):
        raise Lost(f"the data of an event is no object but {type(values).__name__}")
    return values

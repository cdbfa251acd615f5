"""The same calls in the same order as an ensemble makes, written by hand with Serve and nothing around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import Body, FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

ROUTE = "/bare"
CONFIDENT, DIALOGUE = {"calls": 2}, {"calls": 6}
"""Draft and score; with two turns, the primary's signals of the refined answer and a second score."""

_ORDER = {2: (0, 3), 6: (0, 3, 1, 2, 0, 3)}
"""By number of calls, the members that are called: primary, first and second auxiliary, scorer."""

api = FastAPI()


@serve.deployment
class Member:
    async def call(self, value: dict[str, Any]) -> dict[str, Any]:
        return value


@serve.deployment
@serve.ingress(api)
class Front:
    def __init__(self, members: Sequence[DeploymentHandle]) -> None:
        self._members = [member.options(method_name="call") for member in members]

    @api.post("/predict")
    async def predict(self, body: dict[str, Any] = Body(...)) -> dict[str, Any]:
        for place in _ORDER[body["calls"]]:
            body = await self._members[place].remote(body)
        return body


def build(options: dict[str, Any]) -> Application:
    """options: of every deployment, the same as the ensemble's."""
    members = [Member.options(name=f"Bare{number}", **options).bind() for number in range(4)]  # type: ignore[attr-defined]
    return Front.options(name="Front", **options).bind(members)  # type: ignore[attr-defined,no-any-return]

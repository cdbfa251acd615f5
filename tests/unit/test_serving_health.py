"""Which members answer: who is asked how often, and whom questions cannot do without."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from serve_apps import health
from serve_apps.calls import MemberUnavailable
from serve_apps.health import Health

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")


class Member:
    """`state`: answers, dies, or says nothing for ever."""

    def __init__(self, state: str = "answers") -> None:
        self.state = state
        self.asked = 0

    async def __call__(self, method: str) -> Any:
        assert method == "describe"
        self.asked += 1
        if self.state == "dies":
            raise MemberUnavailable("member", "dead")
        if self.state == "silent":
            await asyncio.Event().wait()
        return {"fingerprint": "f"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    found = SimpleNamespace(now=100.0)
    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: found.now))
    monkeypatch.setattr(health, "_TIMEOUT_S", 0.01)
    return found


def made(**states: str) -> tuple[Health, dict[str, Member]]:
    members = {name: Member(states.get(name, "answers")) for name in ("primary", "first", "second", "scorer")}
    return Health(members), members  # type: ignore[arg-type]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("away", "ready"), [("first", True), ("second", True), ("primary", False), ("scorer", False)])
@pytest.mark.parametrize("state", ["dies", "silent"])
def test_without_primary_or_scorer_no_question_can_be_answered(away: str, ready: bool, state: str) -> None:
    found, _ = made(**{away: state})
    answering, is_ready = asyncio.run(found.look())
    assert answering == {name: name != away for name in ("primary", "first", "second", "scorer")}
    assert is_ready is ready


def test_members_are_asked_once_a_second_however_many_look(clock: SimpleNamespace) -> None:
    found, members = made()

    async def many() -> None:
        for answering, ready in await asyncio.gather(*(found.look() for _ in range(20))):
            assert ready
            assert all(answering.values())

    asyncio.run(many())
    clock.now += 0.9
    members["scorer"].state = "dies"
    assert asyncio.run(found.look())[1]
    assert {member.asked for member in members.values()} == {1}
    clock.now += 0.2
    assert not asyncio.run(found.look())[1]
    assert {member.asked for member in members.values()} == {2}


def test_a_member_that_comes_back_is_seen(clock: SimpleNamespace) -> None:
    found, members = made(primary="silent")
    assert asyncio.run(found.look())[1] is False
    members["primary"].state = "answers"
    clock.now += 1.1
    assert asyncio.run(found.look()) == (dict.fromkeys(members, True), True)

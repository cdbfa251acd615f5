"""Adapters of the primary come and go with the questions; a question is always answered by its own."""

from __future__ import annotations

import asyncio
import random

import pytest

from stitch_ray.ensemble.adapters import Adapters, engine_name
from stitch_ray.errors import UserError

pytestmark = pytest.mark.numeric

TASKS = ["geography", "history", "music", "law v1.2"]


class Engine:
    """Loads at most `most`, and takes its time."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.loaded: list[str] = []
        self.loads = 0

    async def load(self, name: str, path: str) -> None:
        assert len(self.loaded) < self.most
        assert name not in self.loaded
        await asyncio.sleep(0)
        if path == "broken":
            raise UserError("broken: no adapter in this folder")
        self.loaded.append(name)
        self.loads += 1

    async def unload(self, name: str) -> None:
        await asyncio.sleep(0)
        self.loaded.remove(name)


def adapters(engine: Engine, most: int, **more: str) -> Adapters:
    return Adapters({**{task: f"/{task}" for task in TASKS}, **more}, most, engine.load, engine.unload)


@pytest.mark.parametrize("most", [1, 2, 4])
def test_an_adapter_stays_while_it_answers_and_no_more_are_loaded_than_allowed(most: int) -> None:
    engine = Engine(most)
    held = adapters(engine, most)
    rng = random.Random(0)

    async def ask(task: str | None) -> None:
        async with held.using(task) as name:
            assert name == (None if task is None else engine_name(task))
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
                assert name is None or name in engine.loaded

    async def run() -> None:
        async with asyncio.timeout(60):
            tasks = [asyncio.create_task(ask(rng.choice([*TASKS, None]))) for _ in range(200)]
            for task in rng.sample(tasks, 40):
                await asyncio.sleep(0)
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(one is None or isinstance(one, asyncio.CancelledError) for one in ended)

    asyncio.run(run())
    assert len(engine.loaded) <= most


def test_the_one_that_was_idle_longest_makes_room() -> None:
    engine = Engine(2)
    held = adapters(engine, 2)

    async def run() -> None:
        for task in ("geography", "history", "geography", "music"):
            async with held.using(task):
                pass

    asyncio.run(run())
    assert engine.loaded == [engine_name("geography"), engine_name("music")]
    assert engine.loads == 3


def test_an_adapter_that_cannot_be_loaded_fails_its_questions_only() -> None:
    engine = Engine(1)
    held = adapters(engine, 1, odd="broken")

    async def run() -> None:
        for _ in range(2):
            with pytest.raises(UserError, match="broken: no adapter"):
                async with held.using("odd"):
                    pass
        async with held.using("history") as name:
            assert name in engine.loaded

    asyncio.run(run())


def test_a_task_without_an_adapter_is_answered_by_the_model_alone() -> None:
    async def run() -> str | None:
        async with adapters(Engine(1), 1).using("astronomy") as name:
            return name

    assert asyncio.run(run()) is None

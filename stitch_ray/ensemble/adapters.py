"""Adapters of the primary, loaded when a question of their task comes; the one that was idle longest makes room."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager

from stitch_ray.records import content_hash


class Adapters:
    """`paths`: task -> folder. At most `most` are loaded; while all of those answer, another task waits."""

    def __init__(
        self,
        paths: Mapping[str, str],
        most: int,
        load: Callable[[str, str], Awaitable[None]],
        unload: Callable[[str], Awaitable[None]],
    ) -> None:
        self.tasks = frozenset(paths)
        self._paths = paths
        self._most = most
        self._load, self._unload = load, unload
        self._users: dict[str, int] = {}  # loaded tasks, the one used last at the end
        self._changing = asyncio.Lock()
        self._left = asyncio.Event()

    @asynccontextmanager
    async def using(self, task: str | None) -> AsyncIterator[str | None]:
        """The engine's name of the task's adapter, which stays loaded inside; None for a task without one."""
        if task is None or task not in self._paths:
            yield None
            return
        await self._take(task)
        try:
            yield engine_name(task)
        finally:
            self._leave(task)

    async def _take(self, task: str) -> None:
        if task in self._users:
            self._users[task] = self._users.pop(task) + 1
            return
        bringing = asyncio.ensure_future(self._bring(task))
        try:
            await asyncio.shield(bringing)
        except asyncio.CancelledError:
            # a load that was begun is brought to its end, lest engine and table differ
            bringing.add_done_callback(lambda done: None if done.exception() else self._leave(task))
            raise

    async def _bring(self, task: str) -> None:
        """Load the adapter and take it at once: an idle one would go before its question is asked."""
        async with self._changing:
            while task not in self._users and len(self._users) >= self._most:
                idle = next((one for one, users in self._users.items() if not users), None)
                if idle is None:
                    self._left.clear()
                    await self._left.wait()
                else:
                    del self._users[idle]
                    await self._unload(engine_name(idle))
            if task not in self._users:
                await self._load(engine_name(task), self._paths[task])
            self._users[task] = self._users.pop(task, 0) + 1

    def _leave(self, task: str) -> None:
        self._users[task] -= 1
        self._left.set()


def engine_name(task: str) -> str:
    """Names of tasks may hold what names of adapters must not."""
    return f"task-{content_hash(task)}"

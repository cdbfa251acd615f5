"""Prometheus text of the whole cluster, from the agents that Ray runs on every node."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable

import httpx
import ray

from serve_apps.web.errors import unavailable

PREFIXES = (
    "ray_stitch_",
    "ray_serve_deployment_queued_queries",
    "ray_serve_deployment_replica_healthy",
    "ray_serve_replica_processing_queries",
)
"""Ours, and of Serve's own, which are many, how much waits and how many replicas there are."""

_NODES_FOR_S = 10.0
_TIMEOUT_S = 5.0
_NAME = re.compile(r"# (?:HELP|TYPE) (\S+)|([a-zA-Z_:][a-zA-Z0-9_:]*)")
_SUFFIX = re.compile(r"_(?:bucket|sum|count)$")


class Agents:
    """Raises ApiError 503, naming the node, if one of them does not answer: half of the numbers would look like all."""

    def __init__(self) -> None:
        self._client = httpx.AsyncClient(timeout=_TIMEOUT_S, trust_env=False)
        self._nodes: list[str] = []
        self._asked_at = float("-inf")

    async def scrape(self) -> str:
        nodes = await self._addresses()
        texts = await asyncio.gather(*(self._one(node) for node in nodes))
        return merge(texts)

    async def _one(self, node: str) -> str:
        try:
            response = await self._client.get(f"http://{node}/metrics")
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise unavailable(
                f"the metrics agent of node {node} does not answer ({type(error).__name__})", retry_after_s=_TIMEOUT_S
            ) from error
        return response.text

    async def _addresses(self) -> list[str]:
        now = asyncio.get_running_loop().time()
        if now - self._asked_at > _NODES_FOR_S:
            nodes = await asyncio.to_thread(ray.nodes)
            self._nodes = [
                f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
                for node in nodes
                if node["Alive"] and node.get("MetricsExportPort")
            ]
            self._asked_at = now
        if not self._nodes:
            raise unavailable("no node of the cluster has a metrics agent", retry_after_s=_TIMEOUT_S)
        return self._nodes


def merge(texts: Iterable[str]) -> str:
    """One text of several, only with the families of `PREFIXES`: each with its help and type once, then all samples."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        for line in text.splitlines():
            found = _NAME.match(line)
            name = (found.group(1) or found.group(2)) if found else ""
            if not name.startswith(PREFIXES):
                continue
            if line.startswith("#"):
                known = heads.setdefault(name, [])
                if not any(one.split(" ", 2)[1] == line.split(" ", 2)[1] for one in known):
                    known.append(line)
            else:
                family = name if name in heads else _SUFFIX.sub("", name)
                samples.setdefault(family, []).append(line)
    lines = [line for family, rows in samples.items() for line in (*heads.get(family, ()), *rows)]
    return "".join(f"{line}\n" for line in lines)

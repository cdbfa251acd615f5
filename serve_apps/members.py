"""The deployments that hold models: the hosts of `ensemble.hosts`, as replicas that refuse what is not meant for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve

from serve_apps.calls import WrongVersion


class Member:
    """What all members have in common. `_host` is made by the subclass, `_version` is the fingerprint it describes."""

    _host: Any
    _version: str
    _methods: frozenset[str]

    async def call(self, version: str | None, method: str, args: Sequence[Any]) -> Any:
        """`method` of the host. Raises WrongVersion if the caller was checked for another `version`."""
        if version is not None and version != self._version:
            raise WrongVersion(f"asked for version {version}, and this replica holds {self._version}")
        if method not in self._methods:
            raise AttributeError(f"a member has no method {method!r}")
        return await getattr(self._host, method)(*args)


@serve.deployment
class Primary(Member):
    """One replica holds the primary. Calls for an adapter go, as far as possible, to a replica that has it in memory."""

    _methods = frozenset({"answer", "signals", "describe"})

    async def __init__(self, config: Mapping[str, Any], names: list[str], seed: int, max_adapters: int) -> None:  # type: ignore[misc]
        from stitch_ray.ensemble.hosts import PrimaryHost

        self._host = PrimaryHost(dict(config), names, seed)
        self._version = (await self._host.describe())["fingerprint"]
        # The host keeps as many adapters itself, least recently used out first; this only tells Serve which.
        self._hold = serve.multiplexed(max_num_models_per_replica=max_adapters)(_held)

    async def call(self, version: str | None, method: str, args: Sequence[Any]) -> Any:
        adapter = serve.get_multiplexed_model_id()
        if not adapter:
            return await super().call(version, method, args)
        await self._hold(adapter)
        return await super().call(version, method, (*args, adapter))


@serve.deployment
class Auxiliary(Member):
    """One replica holds an auxiliary: a local model, or the way to a server."""

    _methods = frozenset({"generate", "compare", "describe"})

    async def __init__(self, config: Mapping[str, Any]) -> None:  # type: ignore[misc]
        from stitch_ray.ensemble.hosts import AuxiliaryHost

        self._host = AuxiliaryHost(dict(config))
        self._version = (await self._host.describe())["fingerprint"]


async def _held(adapter: str) -> str:
    return adapter

"""Starting the actors of an ensemble: one pool a member, and the scorer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from stitch_ray import ray_session
from stitch_ray.config.ensemble import EnsembleConfig, MemberConfig
from stitch_ray.ensemble.batch.preflight import Ready
from stitch_ray.errors import UserError

_MOST_CALLS = 4096
"""Calls that one actor has under way or waiting; its engine makes batches of them."""


def needed_resources(ensemble: EnsembleConfig) -> dict[str, float]:
    """CPUs and GPUs of all model actors together. Scorer, servers and predictors take none: they wait most of the time."""
    models = list(ensemble.local_models())
    needed = {"CPU": float(sum(model.replicas * model.num_threads for model in models))}
    gpus = float(sum(model.replicas * model.num_gpus for model in models))
    return needed | ({"GPU": gpus} if gpus else {})


def check_cluster(ensemble: EnsembleConfig) -> None:
    """Refuse, with the numbers, an ensemble that does not fit the cluster."""
    each = ", ".join(
        f"{model.name} {model.replicas * model.num_threads} CPU"
        + (f" {model.replicas * model.num_gpus:g} GPU" if model.num_gpus else "")
        for model in ensemble.local_models()
    )
    what = f"the ensemble ({each})" if each else "the ensemble"
    ray_session.require(
        {**needed_resources(ensemble), "CPU": max(1.0, needed_resources(ensemble)["CPU"])},
        what,
        hint="Lower replicas, num_threads or num_gpus",
    )


@contextmanager
def started(ready: Ready) -> Iterator[dict[str, Any]]:
    """Pools of a run for the life of the block: {primary, auxiliaries, scorer}. Raises UserError for a model that cannot
    be loaded or is not what pre-flight saw."""
    import ray

    from stitch_ray.ensemble.batch.respondents import Pool
    from stitch_ray.ensemble.hosts import AuxiliaryHost, PrimaryHost, ScorerHost

    config = ready.config
    ensemble = config.ensemble
    assert ensemble is not None
    actors: list[Any] = []

    def start(host: Any, member: MemberConfig | None, *arguments: Any, **options: Any) -> list[Any]:
        own = _placement(member)
        mine = [ray.remote(host).options(**own).remote(*arguments, **options) for _ in range(_replicas(member))]
        actors.extend(mine)
        return mine

    try:
        values = ensemble.model_dump(mode="json", exclude_none=True)
        pools = [start(PrimaryHost, ensemble.primary, values, sorted(ready.signals), config.seed)]
        for member in ensemble.auxiliaries:
            pools.append(start(AuxiliaryHost, member, member.model_dump(mode="json", exclude_none=True)))
        pools.append(start(ScorerHost, None, config.scorer, num_threads=1))
        try:
            described = ray.get([pool[0].describe.remote() for pool in pools])
        except ray.exceptions.ActorDiedError as error:
            raise _why_not_started(error) from error
        names = [*(member.name for member in ensemble.members), "scorer"]
        _check_described(ready, [one["fingerprint"] for one in described])
        made = [Pool(name, tuple(pool), of) for name, pool, of in zip(names, pools, described, strict=True)]
        yield {"primary": made[0], "auxiliaries": tuple(made[1:-1]), "scorer": made[-1]}
    finally:
        for actor in actors:
            ray.kill(actor)


def _why_not_started(error: Exception) -> Exception:
    """What an actor raised while it was made, of which Ray keeps nothing but the text."""
    last = str(error).strip().splitlines()[-1]
    name, _, message = last.partition(": ")
    return UserError(message) if name == f"{UserError.__module__}.{UserError.__qualname__}" else RuntimeError(last)


def _placement(member: MemberConfig | None) -> dict[str, Any]:
    from stitch_ray.ensemble.batch.actors import MAX_RESTARTS

    model = None if member is None else member.model
    options: dict[str, Any] = {
        "num_cpus": model.num_threads if model else 0,
        "max_restarts": MAX_RESTARTS,
        "max_concurrency": _MOST_CALLS,
    }
    return options | ({"num_gpus": model.num_gpus} if model and model.num_gpus else {})


def _replicas(member: MemberConfig | None) -> int:
    return member.model.replicas if member is not None and member.model is not None else 1


def _check_described(ready: Ready, found: list[str]) -> None:
    marks = ready.fingerprints
    expected = [marks.primary, *(marks.auxiliaries or ()), marks.scorer]
    assert ready.config.ensemble is not None
    names = [*(member.name for member in ready.config.ensemble.members), "the scorer"]
    for name, saw, is_now in zip(names, expected, found, strict=True):
        if saw != is_now:
            raise UserError(f"{name} is {is_now} and was {saw} before its actor started: its files change; run again")

"""From the configuration of an ensemble to its members, loaded in this process."""

from __future__ import annotations

from dataclasses import replace

from stitch_ray.config.base import ModelConfig
from stitch_ray.config.ensemble import EnsembleConfig, MemberConfig, PrimaryConfig
from stitch_ray.engines.base import AsyncEngine, EngineError
from stitch_ray.engines.batching import BatchingEngine
from stitch_ray.engines.openai_api import OpenAIEngine
from stitch_ray.engines.registry import load_engine
from stitch_ray.engines.threaded import ThreadedEngine
from stitch_ray.ensemble.adapters import Adapters, engine_name
from stitch_ray.ensemble.fingerprints import adapter_members, local_member, primary_fingerprint
from stitch_ray.ensemble.online_signals import check_signals
from stitch_ray.ensemble.primary import PrimaryModel
from stitch_ray.ensemble.rendering import RenderedEngine
from stitch_ray.errors import UserError


def load_primary(config: EnsembleConfig, names: frozenset[str], *, seed: int = 0) -> PrimaryModel:
    """The primary. `names`: signals that its answers come with; `seed`: of the samples they may take.

    Raises UserError if the model cannot be loaded, or the signals cannot be had.
    """
    check_signals(config, names)
    member = config.primary
    if member.endpoint is not None:
        engine = OpenAIEngine(member.endpoint)
        return PrimaryModel(config, engine, names, fingerprint=engine.info.fingerprint, seed=seed)
    assert member.model is not None
    known, adapters = local_member(member), adapter_members(member)
    fingerprint = primary_fingerprint(member)
    inner = load_engine_async(member.model)
    rendered = RenderedEngine(
        inner,
        known.prompter.chat_template(),
        inner.info,
        adapters={engine_name(task): one.prompter.chat_template() for task, one in adapters.items()},
    )
    return PrimaryModel(
        config,
        rendered,
        names,
        fingerprint=fingerprint,
        render=rendered.rendered,
        adapters=_adapters(member, inner) if adapters else None,
        seed=seed,
    )


def load_auxiliary(member: MemberConfig) -> AsyncEngine:
    """One of the two that refine; `info.fingerprint` is that of its answers. Raises UserError."""
    if member.endpoint is not None:
        return OpenAIEngine(member.endpoint)
    assert member.model is not None
    known = local_member(member, "auxiliaries")
    inner = load_engine_async(member.model)
    info = replace(inner.info, fingerprint=known.fingerprint)
    return RenderedEngine(inner, known.prompter.chat_template(), info, fold_system=True)


def load_engine_async(model: ModelConfig) -> ThreadedEngine:
    """A local model that answers awaited requests together."""
    engine = load_engine(model)
    if model.engine == "vllm":
        from stitch_ray.engines.vllm_async import AsyncVllmEngine
        from stitch_ray.engines.vllm_engine import VllmEngine

        assert isinstance(engine, VllmEngine)
        return AsyncVllmEngine(engine)
    return BatchingEngine(engine)


def _adapters(primary: PrimaryConfig, engine: ThreadedEngine) -> Adapters:
    async def load(name: str, path: str) -> None:
        try:
            await engine.call(lambda model: model.load_adapter(name, path))
        except UserError as error:
            raise EngineError(name, str(error)) from error

    async def unload(name: str) -> None:
        await engine.call(lambda model: model.unload_adapter(name))

    return Adapters(primary.adapters, primary.max_adapters, load, unload)

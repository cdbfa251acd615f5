"""From a model's configuration to its engine."""

from __future__ import annotations

from stitch_ray.config.base import ModelConfig
from stitch_ray.engines.base import LoadedEngine


def load_engine(model: ModelConfig) -> LoadedEngine:
    """The engine that `model` names, loaded in this process. Raises UserError if it cannot be."""
    if model.engine == "vllm":
        from stitch_ray.engines.vllm_engine import VllmEngine

        return VllmEngine(
            model.path,
            name=model.name,
            dtype=model.dtype,
            max_tokens=model.max_tokens,
            tensor_parallel=model.tensor_parallel,
            trust_remote_code=model.trust_remote_code,
        )
    from stitch_ray.engines.hf import HfEngine

    return HfEngine(
        model.path,
        name=model.name,
        dtype=model.dtype,
        max_tokens=model.max_tokens,
        batch_tokens=model.batch_tokens,
        num_threads=model.num_threads,
        trust_remote_code=model.trust_remote_code,
    )

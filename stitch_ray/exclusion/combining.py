"""Two LoRA adapters of one base become one that does what both do: the prompt tells which is meant."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from stitch_ray.engines.fingerprint import model_folder
from stitch_ray.engines.hf_adapters import adapter_config
from stitch_ray.errors import UserError
from stitch_ray.runs import atomic_path

_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
_COPIED = (
    "stitch_ray.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def concatenate(adapters: Sequence[str], weights: Sequence[float], out: Path) -> None:
    """Write an adapter to `out` whose update of every layer is the weighted sum of those of `adapters`.

    The factors are concatenated (PEFT calls it `cat`), so that the sum is exact and the rank the sum of the ranks. The
    new adapter has alpha = rank, its scale is in the factors. Tokenizer and template are those of the first.
    Raises UserError for adapters of different layers or bases, and for kinds of LoRA that no factors alone describe.
    """
    folders = [model_folder(path) or Path(path) for path in adapters]
    configs = [adapter_config(path) for path in adapters]
    for path, config in zip(adapters, configs, strict=True):
        if config.use_dora or config.bias != "none" or config.rank_pattern or config.alpha_pattern:
            raise UserError(f"{path}: only plain LoRA adapters can be concatenated (no DoRA, bias, or ranks by layer)")
        if config.base_model_name_or_path != configs[0].base_model_name_or_path:
            raise UserError(f"{path} and {adapters[0]} are adapters of different base models")
    tensors = [load_file(folder / _WEIGHTS) for folder in folders]
    for path, own in zip(adapters, tensors, strict=True):
        if own.keys() != tensors[0].keys():
            raise UserError(f"{path} and {adapters[0]} change different layers; train both with the same targets")
    scales = [
        weight * config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        for weight, config in zip(weights, configs, strict=True)
    ]
    joined: dict[str, torch.Tensor] = {}
    for name in tensors[0]:
        down = ".lora_A." in name
        parts = [own[name].float() * (scale if down else 1.0) for own, scale in zip(tensors, scales, strict=True)]
        joined[name] = torch.cat(parts, dim=0 if down else 1).contiguous()
    rank = sum(config.r for config in configs)
    values: dict[str, Any] = json.loads((folders[0] / _CONFIG).read_text("utf-8"))
    values.update(r=rank, lora_alpha=rank, use_rslora=False, lora_dropout=0.0)
    with atomic_path(out) as temporary:
        temporary.mkdir(parents=True)
        save_file(joined, temporary / _WEIGHTS, metadata={"format": "pt"})
        (temporary / _CONFIG).write_text(json.dumps(values, indent=2), encoding="utf-8")
        for name in _COPIED:
            if (folders[0] / name).is_file():
                shutil.copy2(folders[0] / name, temporary / name)

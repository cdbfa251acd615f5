"""The folder a trained model ends in: plain Hugging Face, or a PEFT adapter, with all that inference has to know."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging as transformers_logging

from stitch_ray.config.finetune import AdapterConfig
from stitch_ray.data.trained_on import read_trained_on, write_trained_on
from stitch_ray.engines.fingerprint import model_fingerprint, model_folder
from stitch_ray.engines.hf import load_model
from stitch_ray.engines.hf_adapters import (
    adapter_base,
    adapter_config,
    attach_adapters,
    check_base,
    tokenizer_path,
)
from stitch_ray.engines.pretrained import load_tokenizer
from stitch_ray.errors import UserError
from stitch_ray.runs import write_json

NOTE = "stitch_ray.json"
_MERGE_TOLERANCE = 1e-4


def export_model(
    base_path: str,
    method: Literal["full", "lora", "qlora"],
    adapter: AdapterConfig | None,
    weights: Mapping[str, Tensor],
    out: Path,
    *,
    dtype: Literal["auto", "float32", "bfloat16"] = "float32",
    chat_template: str | None = None,
    tasks: Mapping[str, Mapping[str, str]],
    card: Mapping[str, Any],
    trained_on: Iterable[str] = (),
    trust_remote_code: bool = False,
) -> None:
    """Write the trained model to `out`, whole or not at all; a model that is already there is replaced.

    `weights` are those that were trained, read one at a time, by the names of `named_parameters` of the model or of the
    PeftModel; all else (buffers, configuration, tokenizer) comes from the base. `chat_template` is the one training
    used; None: the base's. `tasks`: name -> {"objective", "template"}. `card`: facts for README.md, JSON values.
    `trained_on`: group ids of the questions it learned from; those of the base, and of an adapter that it went on
    from, are added. `dtype` "auto" is the base's for a full model and float32 for an adapter. Raises UserError if the weights are not
    exactly those of the model.
    """
    base = str(Path(base_path).absolute()) if Path(base_path).is_dir() else base_path
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    note = {
        "format": 1,
        "base": base,
        "base_fingerprint": model_fingerprint(base),
        "method": method,
        "tasks": {name: dict(task) for name, task in tasks.items()},
        "template": getattr(tokenizer, "chat_template", None),
        "trained": dict(card),
    }
    with new_folder(out) as folder:
        if method == "full":
            _write_model(base, weights, folder, dtype, trust_remote_code)
        else:
            assert adapter is not None
            _write_adapter(base, adapter, weights, folder, dtype, trust_remote_code)
        tokenizer.save_pretrained(folder)
        write_json(folder / NOTE, note)
        write_trained_on(folder, [*trained_on, *_learned_before(base, adapter)])
        (folder / "README.md").write_text(_model_card(note), encoding="utf-8")


def merge_adapter(
    adapter: str,
    out: Path,
    *,
    base: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Add a LoRA adapter to the weights of its base model and write the result to `out` as a plain model folder.

    Both are joined in float32 on the CPU, which takes the memory of the float32 model and of the written one. Before
    anything is written, the logits of both ways are compared on made-up tokens. `base`: a model to use instead of the
    one that the adapter names, not compared with it. Returns base, dtype, parameters and difference, the largest
    between two logits. Raises UserError for a folder without adapter, a missing base, a taken `out`, and if the
    difference is more than 1e-4 (of the largest logit, where that is above 1).
    """
    check_free(out, overwrite)
    adapter_config(adapter)
    if base is None:
        base = adapter_base(adapter)
        check_base(adapter, base)
    if out.exists() and Path(base).exists() and out.samefile(base):
        raise UserError(f"{out} is the base model; choose another --out")
    model = load_model(base, "float32", trust_remote_code=trust_remote_code, key="base").eval()
    adapted = attach_adapters(model, {"default": adapter}, None)
    before = _probe(model)
    merged = adapted.merge_and_unload(safe_merge=True)
    after = _probe(merged)
    difference = (after - before).abs().max().item()
    if not difference <= _MERGE_TOLERANCE * max(1.0, before.abs().max().item()):
        raise UserError(
            f"{adapter}: merged logits differ from the adapter's by {difference:.1e}, so nothing was written. "
            "An adapter on embeddings that are tied to the output head cannot be merged"
        )
    tokenizer = load_tokenizer(tokenizer_path(adapter, base), trust_remote_code=trust_remote_code)
    note_file = (model_folder(adapter) or Path(adapter)) / NOTE
    with new_folder(out) as folder:
        written = _write_model(base, dict(merged.named_parameters()), folder, dtype, trust_remote_code)
        tokenizer.save_pretrained(folder)
        if note_file.is_file():
            note = json.loads(note_file.read_text(encoding="utf-8"))
            write_json(folder / NOTE, {**note, "merged_from": str(Path(adapter).absolute())})
            (folder / "README.md").write_text(_model_card(note, merged=True), encoding="utf-8")
        before = [read_trained_on(place) for place in (model_folder(adapter), model_folder(base)) if place]
        write_trained_on(folder, frozenset[str]().union(*before))
    return {
        "base": base,
        "dtype": str(written.dtype).removeprefix("torch."),
        "parameters": written.num_parameters(),
        "difference": difference,
    }


def _learned_before(base: str, adapter: AdapterConfig | None) -> frozenset[str]:
    """Group ids of the questions that training began with having learned."""
    start = adapter.start_from if adapter is not None else None
    places = [model_folder(path) for path in (base, start) if path]
    return frozenset[str]().union(*(read_trained_on(place) for place in places if place))


# Weights


def _write_model(base: str, weights: Mapping[str, Tensor], folder: Path, dtype: str, trust_remote_code: bool) -> Any:
    """The base model with `weights` in place of its own, saved in `dtype`; what is no parameter stays the base's."""
    model = load_model(base, dtype, trust_remote_code=trust_remote_code, key="model.path")
    copy_weights(model, weights, base, {name for name, _ in model.named_parameters()})
    save_model(model, folder)
    return model


@torch.no_grad()
def copy_weights(model: Any, weights: Mapping[str, Tensor], base: str, names: Set[str]) -> None:
    """Put `weights` in the place of the parameters `names`. Raises UserError if they are not exactly those."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in names}
    _check_names(weights, parameters, base)
    for name, parameter in parameters.items():
        weight = weights[name]
        _check_shape(name, weight, parameter, base)
        parameter.copy_(weight)


def _write_adapter(
    base: str,
    adapter: AdapterConfig,
    weights: Mapping[str, Tensor],
    folder: Path,
    dtype: str,
    trust_remote_code: bool,
) -> None:
    from peft import PeftModel

    from stitch_ray.training.adapters import adapter_weights, lora_config, stored_name

    with torch.device("meta"):  # names and shapes only
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code), trust_remote_code=trust_remote_code
        )
        config = lora_config(model, adapter)
        parameters = adapter_weights(PeftModel(model, config))
    stored = {stored_name(name): name for name in weights}
    _check_names(stored, parameters, base)
    number = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    tensors = {}
    for name, parameter in parameters.items():
        weight = weights[stored[name]]
        _check_shape(name, weight, parameter, base)
        tensors[name] = weight.to(number).contiguous()
    config.base_model_name_or_path = base
    config.target_modules = sorted(config.target_modules or ())  # a set would be written in another order every time
    config.inference_mode = True
    config.save_pretrained(str(folder))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _readable(folder, folder / "adapter_config.json")


def _check_names(given: Mapping[str, Any], wanted: Mapping[str, Any], base: str) -> None:
    unknown, missing = sorted(given.keys() - wanted.keys()), sorted(wanted.keys() - given.keys())
    if unknown or missing:
        found = [
            f"{len(names)} {what}, such as {names[0]}"
            for what, names in (("unknown", unknown), ("missing", missing))
            if names
        ]
        raise UserError(f"the trained weights are not those of {base}: {'; '.join(found)}")


def _check_shape(name: str, weight: Tensor, parameter: Tensor, base: str) -> None:
    if weight.shape != parameter.shape:
        raise UserError(
            f"the trained weights are not those of {base}: {name} is {tuple(weight.shape)}, not {tuple(parameter.shape)}"
        )


def _probe(model: Any) -> Tensor:
    """Logits of made-up tokens, the same every time, shape (2, 12, vocabulary)."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.float()


# Folders


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden sibling of `out` to write to; it takes the name, and the place of what has it, once it is complete."""
    out = Path(out).absolute()
    building = out.with_name(f".{out.name}.building-{os.getpid()}")
    replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    building.mkdir(parents=True)
    try:
        yield building
        if out.exists():
            out.rename(replaced)
        building.rename(out)
    except BaseException:
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        shutil.rmtree(building, ignore_errors=True)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def check_free(out: Path, overwrite: bool) -> None:
    """Raises UserError if `out` is taken by something that must not be replaced by a model."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UserError(f"{out} is a file; choose another --out")
    if any(out.iterdir()) and not overwrite:
        raise UserError(f"{out} is not empty; choose another --out or pass --overwrite")
    if any(out.iterdir()) and not (out / "config.json").is_file():
        raise UserError(f"{out} holds something else than a model (no config.json); remove it or choose another --out")


def save_model(model: Any, folder: Path) -> None:
    """Configuration, weights in files of the default size, and of a model that generates how it does."""
    if not torch.cuda.is_available():
        # Saving imports DeepSpeed, which looks for a GPU and complains unless it is told that there is none.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if getattr(model, "generation_config", None) is None:
        with _no_progress_bar():
            model.save_pretrained(folder)
        _readable(folder, folder / "config.json")
        return
    generation = model.generation_config
    # saving refuses a generation configuration that loading took, and some published ones (temperature without sampling)
    model.generation_config = GenerationConfig()
    try:
        with _no_progress_bar():
            model.save_pretrained(folder)
    finally:
        model.generation_config = generation
    generation.to_json_file(folder / "generation_config.json", use_diff=True, keys_to_pop=["compile_config"])
    _readable(folder, folder / "config.json")


def _readable(folder: Path, like: Path) -> None:
    """safetensors makes its file readable by the owner only; other users of a cluster read the model too."""
    for weights in folder.glob("*.safetensors"):
        weights.chmod(like.stat().st_mode)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _model_card(note: Mapping[str, Any], *, merged: bool = False) -> str:
    adapter = note["method"] != "full" and not merged
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in note["trained"].items())
    what = "A LoRA adapter for" if adapter else "A fine-tuned copy of"
    use = (
        "Load it with PEFT on top of the base model, or turn both into one model folder with `stitch-ray merge`."
        if adapter
        else "Load it with `AutoModelForCausalLM.from_pretrained`."
    )
    return f"""\
---
base_model: {json.dumps(note["base"])}
library_name: {"peft" if adapter else "transformers"}
tags: [stitch-ray]
---
# {what} {Path(note["base"]).name}

Trained by `stitch-ray finetune` (method {note["method"]}) on: {", ".join(note["tasks"]) or "no named task"}. {use}
Prompts must be built with the chat template in this folder, as they were in training; `{NOTE}` holds it too.
Nobody has checked the answers for truth or harm: evaluate the model on your own questions before you rely on it.

| | |
|---|---|
{rows}
"""


def _cell(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|").replace("\n", " ")

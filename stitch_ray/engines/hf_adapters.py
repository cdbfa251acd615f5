"""LoRA adapters in the layers of a Hugging Face model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stitch_ray.engines.fingerprint import model_fingerprint, model_folder
from stitch_ray.engines.pretrained import first_line
from stitch_ray.errors import UserError


def is_adapter(path: str) -> bool:
    """Whether `path` is a folder, or a cached Hub id, with a PEFT adapter and no model of its own."""
    folder = Path(path) if Path(path).is_dir() else model_folder(path)
    return folder is not None and (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def adapter_config(path: str) -> Any:
    """The LoRA configuration in the adapter folder `path`. Raises UserError if there is none."""
    from peft import LoraConfig, PeftConfig

    if not is_adapter(path):
        raise UserError(f"{path}: no adapter in this folder (an adapter_config.json without a config.json)")
    try:
        config = PeftConfig.from_pretrained(str(model_folder(path)))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}/adapter_config.json: cannot be read ({first_line(error)})") from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"{path}: holds a {config.peft_type} adapter; only LoRA adapters can be used")
    return config


def adapter_base(path: str) -> str:
    """Path or Hub id of the model that the adapter at `path` was trained on. Raises UserError if it is not there."""
    base = adapter_config(path).base_model_name_or_path
    fix = f"restore it, or correct base_model_name_or_path in {path}/adapter_config.json (merge takes --base)"
    if not base:
        raise UserError(f"{path}: the adapter names no base model; {fix}")
    try:
        model_folder(base)
    except UserError as error:
        raise UserError(f"{path}: the base model of the adapter is missing ({error}); {fix}") from error
    return str(base)


def tokenizer_path(adapter: str, base: str) -> str:
    """Where the tokenizer is: a trained adapter brings its own, with the chat template of its training."""
    folder = model_folder(adapter)
    return adapter if folder is not None and (folder / "tokenizer_config.json").is_file() else base


def check_base(adapter: str, base: str) -> None:
    """Raises UserError if the adapter at `adapter` says that it was trained on a model other than that at `base`."""
    note = (model_folder(adapter) or Path(adapter)) / "stitch_ray.json"
    trained_on = json.loads(note.read_text(encoding="utf-8")).get("base_fingerprint") if note.is_file() else None
    if trained_on and trained_on != model_fingerprint(base):
        raise UserError(
            f"{adapter}: trained on a base model with fingerprint {trained_on}, and {base} has "
            f"{model_fingerprint(base)}. Use the model it was trained on; "
            f"if only tokenizer or template files differ, remove base_fingerprint from {note}"
        )


def attach_adapters(model: Any, adapters: Mapping[str, str], base: str | None, together: Any = None) -> Any:
    """Put LoRA adapters, name -> folder, into the layers of `model`, frozen. Returns a PeftModel.

    `base`: path of the model, compared with what an adapter says about its own; None: not compared. `together`: the
    PeftModel with the adapters that are there already; None: there are none, and the first one becomes active. Raises
    UserError for a folder that holds no LoRA adapter, and for weights that are not exactly those its configuration asks
    for; such an adapter leaves nothing behind in the model.
    """
    for name, path in adapters.items():
        together = _attach(model, name, path, base, together)
    model.eval()
    return together


def detach_adapter(together: Any, name: str) -> Any:
    """Take an adapter out of the layers. Returns the PeftModel, None if no adapter is left in it."""
    others = [one for one in together.peft_config if one != name]
    if others:
        together.set_adapter(others[0], inference_mode=True)  # PEFT warns when the active one goes
        together.delete_adapter(name)
        return together
    together.unload()
    return None


def _attach(model: Any, name: str, path: str, base: str | None, together: Any) -> Any:
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"adapters: {name!r}: a name is made of letters, digits, _ and -")
    config = adapter_config(path)
    config.inference_mode = True
    if base is not None:
        check_base(path, base)
    attached: Any = None
    try:
        weights = load_peft_weights(str(model_folder(path)), device="cpu")
        _check_none([key for key in weights if ".lora_" not in key])  # these would be written over the base's own
        if together is None:
            attached = PeftModel(model, config, adapter_name=name)
        else:
            together.add_adapter(name, config)
            attached = together
        result: Any = set_peft_model_state_dict(attached, weights, adapter_name=name)
        _check_none([*result.unexpected_keys, *(key for key in result.missing_keys if _is_of(key, name))])
    except (OSError, ValueError, RuntimeError) as error:
        if attached is not None:
            detach_adapter(attached, name)
        raise UserError(f"{path}: the adapter does not fit its base model ({first_line(error)})") from error
    return attached


def _check_none(wrong: Sequence[str]) -> None:
    if wrong:
        raise ValueError(f"{len(wrong)} weights too many or missing, such as {wrong[0]}")


def _is_of(key: str, adapter: str) -> bool:
    return re.search(rf"\.lora_\w+\.{adapter}(\.|$)", key) is not None

"""A model folder's configuration and tokenizer, without its weights."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, AutoTokenizer

from stitch_ray.errors import UserError
from stitch_ray.records import content_hash


def default_batch_tokens(device_type: str) -> int:
    """Tokens a forward: more does not pay on a CPU (caches), less leaves a GPU idle."""
    return 1024 if device_type == "cpu" else 16384


def context_length(config: Any) -> int:
    """Longest sequence the model was built for; 2048 where its configuration does not say."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in ("max_position_embeddings", "n_positions", "seq_length", "max_seq_len", "n_ctx"):
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048


def load_model_config(path: str, *, trust_remote_code: bool = False) -> Any:
    """The model's configuration, or a UserError that names the path."""
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"models: {path}: no model configuration ({first_line(error)})") from error


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, or a UserError that names the path."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"models: {path}: no usable tokenizer ({first_line(error)})") from error


def tokenizer_hash(tokenizer: Any) -> str:
    """16 hex digits that change with how a tokenizer splits text, and not with where it was loaded from."""
    if getattr(tokenizer, "is_fast", False):
        return content_hash([tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token])
    return content_hash([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), tokenizer.eos_token])


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

"""Everything that can be known wrong before a folder is made or a worker is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stitch_ray.config.base import ModelConfig
from stitch_ray.config.select import SelectConfig
from stitch_ray.data import formats, readers
from stitch_ray.data.corpus import data_work
from stitch_ray.engines.fingerprint import model_fingerprint, model_folder, num_parameters
from stitch_ray.engines.pretrained import context_length, load_model_config, load_tokenizer, tokenizer_hash
from stitch_ray.errors import UserError
from stitch_ray.prompts import load_prompts
from stitch_ray.records import content_hash
from stitch_ray.selection.bodies import EncoderSpec

BUILT_IN_PROMPTS = "rating.txt"
_BUILT_IN_RATINGS = 5


@dataclass(frozen=True, slots=True)
class ReadyModel:
    """A model whose files were looked at: identity, size and the encoder of its tokenizer."""

    config: ModelConfig
    fingerprint: str
    parameters: float
    encoder: EncoderSpec


@dataclass(frozen=True, slots=True)
class Ready:
    """A configuration that was checked against the files it names. `work` is what the ratings depend on."""

    config: SelectConfig
    sources: tuple[str, ...]
    prompts: tuple[str, ...]
    models: tuple[ReadyModel, ...]
    work: dict[str, Any]

    @property
    def prompt_hashes(self) -> tuple[str, ...]:
        return tuple(content_hash(prompt) for prompt in self.prompts)

    @property
    def work_hash(self) -> str:
        """Names the default run folder: the work and which prompts of it."""
        return content_hash({**self.work, "prompts": list(self.prompt_hashes)})


def check(config: SelectConfig) -> Ready:
    """Raises UserError for a missing input or model, an unsuitable tokenizer, or prompts that do not fit."""
    formats.check_format("data.format", config.data.format)
    sources = readers.expand(config.data.paths)
    if config.rating.prompts is None and config.rating.num_ratings != _BUILT_IN_RATINGS:
        raise UserError(
            f"rating.num_ratings: the built-in prompts ask for 1 to {_BUILT_IN_RATINGS}; "
            "with another range give your own in rating.prompts"
        )
    prompts = tuple(load_prompts(config.rating.prompts, BUILT_IN_PROMPTS, config.rating.num_prompts))
    models = tuple(_check_model(model, config, prompts) for model in config.models)
    if config.select.diversity:
        _check_encoder(config.select.diversity.encoder)
    return Ready(config, tuple(sources), prompts, models, _work(config, sources, models))


def _check_model(model: ModelConfig, config: SelectConfig, prompts: Sequence[str]) -> ReadyModel:
    if model_folder(model.path) is None:
        raise UserError(
            f"models: {model.path}: no such folder, and no such model in the local Hugging Face cache "
            f"(hf download {model.path} puts it there)"
        )
    fingerprint = model_fingerprint(model.path)
    context = context_length(load_model_config(model.path, trust_remote_code=model.trust_remote_code))
    if model.max_tokens and model.max_tokens > context:
        raise UserError(f"models: {model.name}: max_tokens {model.max_tokens} exceeds the model's context of {context}")
    spec = EncoderSpec(
        tokenizer=model.path,
        tokenizer_hash=tokenizer_hash(load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)),
        layout=config.rating.layout,
        prompts=tuple(prompts),
        num_ratings=config.rating.num_ratings,
        max_tokens=model.max_tokens or context,
        name=model.name,
        trust_remote_code=model.trust_remote_code,
    )
    spec.encoder()
    size = model.parameters or num_parameters(model.path)
    if size is None:
        raise UserError(f"models: {model.name}: {model.path} holds no safetensors weights (pickles are not loaded)")
    return ReadyModel(model, fingerprint, size, spec)


def _check_encoder(path: str) -> None:
    try:
        import sentence_transformers  # noqa: F401
    except ImportError as error:
        raise UserError("method: diverse needs an extra: pip install 'stitch-ray[diverse]'") from error
    if not Path(path).is_dir() and path.count("/") != 1:
        raise UserError(f"select.diversity.encoder: {path}: no such folder")


def _work(config: SelectConfig, sources: Sequence[str], models: Sequence[ReadyModel]) -> dict[str, Any]:
    return {
        "data": data_work(config.data, sources),
        "rating": {"layout": config.rating.layout, "num_ratings": config.rating.num_ratings},
        "models": {
            model.config.name: {
                "fingerprint": model.fingerprint,
                "engine": model.config.engine,
                "dtype": model.config.dtype,
                "max_tokens": model.encoder.max_tokens,
                "batch_tokens": model.config.batch_tokens,
                "num_threads": model.config.num_threads,
            }
            for model in models
        },
    }

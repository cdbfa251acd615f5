"""Everything that can be known wrong before a scorer's folder is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stitch_ray.config.train_scorer import EncoderConfig, TrainScorerConfig
from stitch_ray.engines.fingerprint import model_fingerprint, model_folder
from stitch_ray.engines.pretrained import context_length, load_model_config, load_tokenizer, tokenizer_hash
from stitch_ray.errors import UserError
from stitch_ray.records import content_hash
from stitch_ray.reliability.tables import answers_hash, sources_of


@dataclass(frozen=True, slots=True)
class Ready:
    """A configuration that was checked against the files it names. `work` is what the encoder's weights depend on.

    In `config`, `encoder.max_length` is no longer than what the encoder takes.
    """

    config: TrainScorerConfig
    sources: tuple[str, ...]
    work: dict[str, Any]

    @property
    def work_hash(self) -> str:
        """Names the default run folder: the work, and which signals are stacked on it."""
        return content_hash({**self.work, "signals": list(self.config.signals)})


def check(config: TrainScorerConfig) -> Ready:
    """Raises UserError for missing answers, an encoder that is none, and batches that workers cannot share."""
    sources = sources_of(config.answers)
    for test in config.tests:
        sources_of(test.answers)
    training = config.training
    if training.batch % training.workers:
        raise UserError(f"training.batch: {training.batch} answers cannot be shared by {training.workers} workers")
    work: dict[str, Any] = {"answers": answers_hash(config.answers)}
    if config.split:
        work["split"] = config.split.model_dump(mode="json")
    if config.encoder:
        encoder, facts = _check_encoder(config.encoder)
        config = config.model_copy(update={"encoder": encoder})
        shaping = training.model_dump(mode="json", exclude={"workers", "resources"})
        threads = training.resources.num_threads
        work |= {"encoder": facts, "training": {**shaping, "num_threads": threads}, "seed": config.seed}
    return Ready(config, tuple(sources), work)


def _check_encoder(encoder: EncoderConfig) -> tuple[EncoderConfig, dict[str, Any]]:
    try:
        folder = model_folder(encoder.path)
    except UserError as error:
        raise UserError(f"encoder.path: {error}") from error
    if folder is None:
        raise UserError(
            f"encoder.path: {encoder.path}: no such folder, and no such model in the local Hugging Face cache "
            f"(hf download {encoder.path} puts it there)"
        )
    trust = encoder.trust_remote_code
    tokenizer = load_tokenizer(encoder.path, trust_remote_code=trust)
    # RoBERTa's position table has two rows more than the model takes tokens; its tokenizer knows.
    longest = min(context_length(load_model_config(encoder.path, trust_remote_code=trust)), tokenizer.model_max_length)
    length = encoder.max_length
    if length > longest:
        if "max_length" in encoder.model_fields_set:
            raise UserError(f"encoder.max_length: {length} exceeds the {longest} tokens that {encoder.path} takes")
        length = longest
    path = str(Path(encoder.path).absolute()) if Path(encoder.path).is_dir() else encoder.path
    facts = {
        "fingerprint": model_fingerprint(encoder.path),
        "tokenizer": tokenizer_hash(tokenizer),
        "max_length": length,
        "train": encoder.train,
        "dtype": encoder.dtype,
    }
    return encoder.model_copy(update={"path": path, "max_length": length}), facts

"""Everything that can be known wrong before the first stage of a chain begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stitch_ray.config.exar import ExarRunConfig
from stitch_ray.data import formats, readers
from stitch_ray.data.corpus import data_work
from stitch_ray.errors import UserError
from stitch_ray.exclusion.chain.stages import Stages
from stitch_ray.records import content_hash
from stitch_ray.reliability.answers.preflight import check_labels, model_identity

_FINETUNE = {"stage_zero", "validator", "exar"}
"""Sections of free keys: leaving one out is a change too."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A configuration that was checked. `work`: all of it, so that a change is told; each stage has work of its own."""

    config: ExarRunConfig
    sources: tuple[str, ...]
    work: dict[str, Any]

    @property
    def work_hash(self) -> str:
        return content_hash(self.work)


def check(config: ExarRunConfig) -> Ready:
    """Raises UserError for missing files, a model that cannot be used, and keys that a stage would refuse."""
    formats.check_format("data.format", config.data.format)
    sources = readers.expand(config.data.paths)
    fingerprint, _, context = model_identity(config.model)
    if config.attempts.max_tokens >= context:
        raise UserError(f"attempts.max_tokens: {config.attempts.max_tokens} leaves no room in a context of {context}")
    check_labels(config.labels)
    if config.rule.encoder and not Path(config.rule.encoder).is_dir():
        raise UserError(f"rule.encoder: {config.rule.encoder}: no such folder")
    stages = Stages(config, Path())
    for make in (stages.stage_zero, stages.validator, stages.exar, stages.refine, stages.samples, stages.evaluate):
        make()
    values = config.model_dump(mode="json", exclude={"data", "split", "model"})
    work = {
        "data": data_work(config.data, sources),
        "split": config.split.model_dump(mode="json"),
        "model": {**config.model.model_dump(mode="json", exclude={"path", "replicas"}), "path": fingerprint},
        **{name: values.get(name) for name in sorted(values.keys() - _FINETUNE)},
        **{name: content_hash(values[name]) for name in sorted(_FINETUNE)},
    }
    return Ready(config, tuple(sources), work)

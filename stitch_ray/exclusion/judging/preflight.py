"""Everything that can be known wrong before a validator is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stitch_ray.config.exar import ExarJudgeConfig
from stitch_ray.data.corpus import inputs_hash
from stitch_ray.data.trained_on import read_trained_on
from stitch_ray.engines.fingerprint import model_folder
from stitch_ray.engines.hf_adapters import adapter_base, is_adapter
from stitch_ray.errors import UserError
from stitch_ray.exclusion.datasets import Distinct, merge
from stitch_ray.exclusion.merging.preflight import answered, labelled_file
from stitch_ray.exclusion.prompts import prompts_hash
from stitch_ray.exclusion.refining.preflight import prompter_of
from stitch_ray.records import content_hash
from stitch_ray.reliability.answers.questions import Prompter


@dataclass(frozen=True, slots=True)
class Ready:
    """A configuration that was checked. `answers`: the distinct ones to questions that the model has not learned from;
    `rows` were read for them, `seen` of them were of questions that it has."""

    config: ExarJudgeConfig
    prompter: Prompter
    answers: tuple[Distinct, ...]
    rows: int
    seen: int
    work: dict[str, Any]

    @property
    def work_hash(self) -> str:
        return content_hash(self.work)


def check(config: ExarJudgeConfig) -> Ready:
    """Raises UserError for folders that are no finished runs of `exar label`, a model that cannot be used, and if it has
    learned from all the questions."""
    files = [labelled_file(Path(path)) for path in config.answers]
    prompter, model = prompter_of(config.model, config.template, config.max_tokens, None, key="max_tokens")
    paths = [config.model.path, *([adapter_base(config.model.path)] if is_adapter(config.model.path) else [])]
    learned = frozenset[str]().union(*(read_trained_on(model_folder(path) or Path(path)) for path in paths))
    rows = [answered(row) for file in files for row in pq.read_table(file).to_pylist()]
    unseen = [row for row in rows if row.group_id not in learned and row.prediction.strip()]
    if not unseen:
        raise UserError(f"answers: the model has learned from all questions in {', '.join(config.answers)}")
    seen = sum(row.group_id in learned for row in rows)
    work = {
        "inputs": inputs_hash([str(file) for file in files]),
        "model": model,
        "prompts": prompts_hash(),
        "max_tokens": config.max_tokens,
    }
    return Ready(config, prompter, tuple(merge(unseen)), len(rows), seen, work)

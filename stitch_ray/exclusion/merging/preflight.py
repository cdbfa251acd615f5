"""Everything that can be known wrong before a DATASET+ is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stitch_ray.config.exar import ExarMergeConfig
from stitch_ray.data.corpus import inputs_hash
from stitch_ray.data.trained_on import TRAINED_ON, read_trained_on
from stitch_ray.errors import UserError
from stitch_ray.exclusion.datasets import Answered
from stitch_ray.exclusion.labelling import LABELLED
from stitch_ray.records import content_hash
from stitch_ray.runs import read_manifest


@dataclass(frozen=True, slots=True)
class Ready:
    """A configuration that was checked against its files. `answers`: all of them; `seen`: questions learned from."""

    config: ExarMergeConfig
    answers: tuple[Answered, ...]
    seen: frozenset[str]
    work: dict[str, Any]

    @property
    def work_hash(self) -> str:
        return content_hash(self.work)


def check(config: ExarMergeConfig) -> Ready:
    """Raises UserError for folders that are no finished runs of `exar label`, or models that do not say what they
    learned from."""
    files = [labelled_file(Path(path)) for path in config.answers]
    seen: set[str] = set()
    for path in config.held_out_from:
        if not (Path(path) / TRAINED_ON).is_file():
            raise UserError(f"held_out_from: {path} does not say what it was trained on (no {TRAINED_ON})")
        seen |= read_trained_on(Path(path))
    answers = tuple(answered(row) for file in files for row in pq.read_table(file).to_pylist())
    work = config.model_dump(mode="json", exclude={"answers", "held_out_from"})
    work |= {"inputs": inputs_hash([str(file) for file in files]), "seen": content_hash(sorted(seen))}
    return Ready(config, answers, frozenset(seen), work)


def answered(row: dict[str, Any]) -> Answered:
    """A row of `labelled.parquet`."""
    names = ("question", "context", "group_id", "prediction", "label", "human", "temperature", "rouge_f", "bert_f")
    return Answered(gold=tuple(row["gold"]), **{name: row[name] for name in names})


def labelled_file(folder: Path) -> Path:
    """The answers of a run of `exar label`. Raises UserError if it is none, or unfinished."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["job"] != "exar-label" or manifest.get("status") != "done":
        raise UserError(f"answers: {folder} is no finished run of exar label; make it with: stitch-ray exar label")
    return folder / LABELLED

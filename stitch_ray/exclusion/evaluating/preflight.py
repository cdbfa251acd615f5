"""Everything that can be known wrong before an evaluation's folder is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.config.exar import ExarEvaluateConfig
from stitch_ray.data.corpus import inputs_hash
from stitch_ray.errors import UserError
from stitch_ray.exclusion.measures import Samples
from stitch_ray.exclusion.refining.results import ATTEMPTS, REFINED
from stitch_ray.records import content_hash
from stitch_ray.reliability.answers.plan import PLAN
from stitch_ray.reliability.tables import ANSWERS
from stitch_ray.runs import read_manifest


@dataclass(frozen=True, slots=True)
class Refined:
    """A run of `exar refine`: its questions by id, and all attempts."""

    folder: Path
    manifest: Mapping[str, Any]
    questions: pa.Table
    attempts: pa.Table


@dataclass(frozen=True, slots=True)
class Ready:
    """A configuration that was checked against its files. `samples`: of the questions, in their order; None: no run.

    `notes`: what a reader has to know.
    """

    config: ExarEvaluateConfig
    refined: Refined
    controls: Mapping[str, Refined]
    samples: tuple[Samples, ...] | None
    notes: tuple[str, ...]
    work: dict[str, Any]

    @property
    def work_hash(self) -> str:
        return content_hash(self.work)


def check(config: ExarEvaluateConfig) -> Ready:
    """Raises UserError for folders that are no finished runs, that are of other questions, without labels, or of
    questions that a model has learned from."""
    refined = _refined("refine", config.refine, config.trained_on)
    controls = {name: _refined(f"controls.{name}", path, config.trained_on) for name, path in config.controls.items()}
    mine = set(refined.questions["example_id"].to_pylist())
    for name, control in controls.items():
        if (theirs := set(control.questions["example_id"].to_pylist())) != mine:
            raise UserError(
                f"controls.{name}: {control.folder} is of other questions than {refined.folder} ({len(theirs - mine)} "
                f"more, {len(mine - theirs)} missing)"
            )
    samples, notes = None, []
    files = [run.folder / REFINED for run in (refined, *controls.values())]
    if config.samples:
        samples, manifest = _samples(Path(config.samples), refined)
        files.append(Path(config.samples) / ANSWERS)
        if manifest.get("answers_from") != refined.manifest.get("answers_from"):
            notes.append("The independent samples are of another model, adapter or template than the refined answers.")
    if refined.manifest["trained_on"]:
        notes.append(
            f"{refined.manifest['trained_on']} of {refined.questions.num_rows} questions are questions that a model has "
            "learned from: what is measured on them is too good."
        )
    work = {
        "runs": inputs_hash([str(file) for file in files]),
        # Equal answers may come of another threshold, which the validator's figures are told at.
        "work": {
            "": refined.manifest["work_hash"],
            **{name: one.manifest["work_hash"] for name, one in controls.items()},
        },
        **config.model_dump(mode="json", include={"bootstrap", "ece_bins", "seed", "trained_on"}),
    }
    return Ready(config, refined, controls, samples, tuple(notes), work)


def _refined(key: str, path: str, trained_on: str) -> Refined:
    folder = Path(path)
    manifest = read_manifest(folder)
    if manifest is None or manifest["job"] != "exar-refine" or manifest.get("status") != "done":
        raise UserError(f"{key}: {path} is no finished run of exar refine; run the same command again")
    if manifest["trained_on"] and trained_on == "refuse":
        raise UserError(
            f"{key}: {manifest['trained_on']} of the {manifest['questions']} questions in {path} are questions that a "
            "model has learned from; refine others, or count them with trained_on: count"
        )
    questions = pq.read_table(folder / REFINED)
    if questions["first_correct"].null_count:
        raise UserError(f"{key}: {path} holds answers without a label; set labels.metric in exar refine")
    return Refined(folder, manifest, questions, pq.read_table(folder / ATTEMPTS))


def _samples(folder: Path, refined: Refined) -> tuple[tuple[Samples, ...], Mapping[str, Any]]:
    """Independent answers to every refined question, matched by what is asked."""
    manifest = read_manifest(folder)
    if manifest is None or manifest["job"] != "sample-answers" or manifest.get("status") != "done":
        raise UserError(f"samples: {folder} is no finished run of sample-answers; run the same command again")
    prompts = {row["example_id"]: row["tokens"] or 0 for row in pq.read_table(folder / PLAN).to_pylist()}
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in pq.read_table(folder / ANSWERS).to_pylist():
        if row["kind"] == "sample":
            rows.setdefault(row["group_id"], []).append(row)
    groups = refined.questions["group_id"].to_pylist()
    missing = [group for group in groups if group not in rows]
    if missing:
        raise UserError(f"samples: {folder} has no samples for {len(missing)} of the {len(groups)} refined questions")
    found = []
    for group in groups:
        own = sorted(rows[group], key=_number)
        if any(row["correct"] is None for row in own):
            raise UserError(f"samples: {folder} holds answers without a label; set labels.metric in sample-answers")
        found.append(
            Samples(
                texts=tuple(row["answer"] for row in own),
                logprobs=tuple(float(sum(row["logprobs"] or ())) for row in own),
                correct=tuple(row["correct"] for row in own),
                tokens=tuple(row["tokens"] or 0 for row in own),
                prompt_tokens=prompts.get(own[0]["example_id"], 0),
            )
        )
    return tuple(found), manifest


def _number(row: Mapping[str, Any]) -> int:
    """The answer's number, which ends its id."""
    return int(str(row["answer_id"]).rpartition("-")[2])

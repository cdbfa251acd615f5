"""`exar run`: one stage after another, each a run folder of its own; a stage that is done is not done again.

With changed settings the chain asks for --overwrite, which does again only the stages that the change touches: a stage
depends on its own settings and on the contents of what earlier stages wrote.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from stitch_ray.config.base import Strict
from stitch_ray.config.exar import RuleConfig
from stitch_ray.engines.fingerprint import model_fingerprint
from stitch_ray.exclusion.chain.preflight import Ready
from stitch_ray.exclusion.chain.sides import write_sides
from stitch_ray.exclusion.chain.stages import SIDES, Stages
from stitch_ray.exclusion.labelling import label_files, label_work
from stitch_ray.exclusion.labels import Rule
from stitch_ray.exclusion.measures import System, table
from stitch_ray.records import content_hash
from stitch_ray.runs import Progress, RunFolder, Step, Summary, read_manifest, work_differences, write_json

KEPT_WHEN_OVERWRITING = ("stages",)


def run(ready: Ready, folder: RunFolder, progress: Progress = lambda step: None) -> Summary:
    """Run the chain. Needs a Ray session. Raises what its stages raise; the same command resumes."""
    config, stages = ready.config, Stages(ready.config, folder.path)

    def stage(job: str, settings: Strict, name: str) -> dict[str, Any]:
        return _stage(job, settings, stages.folder(name), folder.overwrites, progress)

    counts, quarantined = write_sides(
        ready.sources, config.data, config.split, {name: stages.side(name) for name in SIDES}
    )
    folder.write_quarantine(quarantined)
    folder.disposable = False
    zero = stages.stage_zero()
    if zero is not None:
        stage("finetune", zero, "stage-zero")
        if zero.method != "full":
            _merge_adapter(stages.folder("stage-zero") / "model", stages.merged)
    predictions = stages.predictions()
    for name, settings in predictions.items():
        stage("sample-answers", settings, name)
    progress(Step(stage="labelling", done=0, total=None))
    _label([str(stages.folder(name)) for name in predictions], stages.folder("labels"), config.rule, folder.overwrites)
    plus = stage("exar-merge", stages.merge(), "plus")
    stage("finetune", stages.validator(), "validator")
    stage("finetune", stages.exar(), "exar")
    stage("exar-refine", stages.refine(), "refine")
    for control in config.controls:
        stage("exar-refine", stages.refine(control), f"refine-{control}")
    stage("sample-answers", stages.samples(), "samples")
    found = stage("exar-evaluate", stages.evaluate(), "evaluate")
    for name in ("report.html", "metrics.json"):
        shutil.copy2(stages.folder("evaluate") / name, folder.path / name)
    folder.manifest.update(
        rows_in=sum(counts.values()) + len(quarantined),
        rows_out=sum(counts.values()),
        rows_quarantined=len(quarantined),
        inputs=dict.fromkeys(ready.sources, ready.work["data"]["inputs"]),
        sides=dict(counts),
        dataset_plus=plus["counts"],
        systems=found["systems"],
        validator=found["validator"],
    )
    folder.finish()
    text = f"DATASET+: {_plus_text(plus['counts'])}\n{_evaluated(found)}"
    return Summary(folder.path, folder.manifest, _line(folder), text)


def check_cluster(ready: Ready, path: Path) -> None:
    """Every stage checks for itself what it needs."""


def _stage(job: str, config: Strict, out: Path, overwrite: bool, progress: Progress) -> dict[str, Any]:
    """The manifest of a stage, which is run unless it is done with these settings.

    Raises UserError if it was done with others, unless it is to be overwritten.
    """
    from stitch_ray.api import check, run_job

    manifest = read_manifest(out)
    work = check(job, config).work
    hashes = (content_hash(work), content_hash(config.model_dump(mode="json", exclude_none=True)))
    if (
        manifest is None
        or manifest.get("status") != "done"
        or hashes != (manifest["work_hash"], manifest["config_hash"])
    ):
        stale = manifest is not None and bool(work_differences(manifest["work"], work))
        run_job(job, config, out, overwrite=overwrite and stale, progress=progress)
        manifest = read_manifest(out)
    assert manifest is not None
    return manifest


def _label(paths: list[str], out: Path, rule: RuleConfig, overwrite: bool) -> None:
    settings: dict[str, Any] = {
        "rule": Rule(**rule.model_dump(exclude={"encoder"})),
        "encoder": rule.encoder,
        "without_bert": rule.encoder is None,
    }
    manifest = read_manifest(out)
    stale = manifest is not None and bool(work_differences(manifest["work"], label_work(paths, **settings)))
    label_files(paths, out, **settings, overwrite=overwrite and stale)


def _merge_adapter(adapter: Path, out: Path) -> None:
    """Merge `adapter` to a plain model, unless `out` was made from the very same one."""
    from stitch_ray.training.export import merge_adapter

    note, made_from = out.with_suffix(".json"), {"adapter": model_fingerprint(str(adapter))}
    if not (out.exists() and note.exists() and json.loads(note.read_text("utf-8")) == made_from):
        note.unlink(missing_ok=True)
        merge_adapter(str(adapter), out, overwrite=True)
        write_json(note, made_from)


def _evaluated(manifest: dict[str, Any]) -> str:
    notes = "".join(f"\nnote: {note}" for note in manifest["notes"])
    return table([System(**row) for row in manifest["systems"]]) + notes


def _plus_text(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _line(folder: RunFolder) -> str:
    named = {row["name"]: row for row in folder.manifest["systems"]}
    return (
        f"exar run: {named['refined']['accuracy']:.1%} right after refining, {named['first answer']['accuracy']:.1%} at "
        f"first, on {folder.manifest['sides']['test']} unseen questions -> {folder.path / 'report.html'}"
    )

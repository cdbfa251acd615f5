"""`calibrate`: labelled answers, predictions of a cascade, or labels that came back -> policy.json and a report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray import ray_session
from stitch_ray.data.quarantine import Quarantined
from stitch_ray.reliability.policy import POLICY, Policy, Target
from stitch_ray.reliability.risk import calibration_table
from stitch_ray.reliability.risk import facts as telling
from stitch_ray.reliability.risk.preflight import Ready, Update
from stitch_ray.reliability.risk.promises import calibrate, promise_facts, target_facts
from stitch_ray.reliability.risk.questions import Floats, Material
from stitch_ray.reliability.risk.scaling import on_one_scale
from stitch_ray.reliability.risk.single import CONFIDENCE, Chosen, material
from stitch_ray.reliability.risk.update import Renewal, renew
from stitch_ray.report.calibration import CalibrationFacts, CheckFacts, write_report
from stitch_ray.runs import Progress, RunFolder, Step, Summary, atomic_path, write_json

METRICS, CONFIDENCES, MONITORS = "metrics.json", "confidences.parquet", "monitors.json"


def run(ready: Ready, folder: RunFolder, progress: Progress = lambda step: None) -> Summary:
    """Find the thresholds, test the promises on the test split, write `policy.json` and a report. Needs a Ray session
    if a scorer gives the confidences.

    A policy that abstains on everything is a result, not a failure. Raises UserError for tasks without a question and
    for confidences that cannot be used.
    """
    if isinstance(ready.given, Update):
        return _update(ready, ready.given, folder)
    check_cluster(ready, folder.path)
    given = _with_confidences(ready, ready.given, folder, progress) if isinstance(ready.given, Chosen) else ready.given
    progress(Step(stage="calibrating", done=0, total=len(ready.config.targets), unit="targets"))
    given, scale, told = on_one_scale(given, ready.config)
    targets, notes = calibrate(given, ready.config)
    created = {"job": "calibrate", "work_hash": ready.work_hash, "loss": ready.config.loss, "policy": None}
    policy = Policy(targets, given.fingerprints, created, scale)
    facts = _facts(ready, folder, policy, given, [*told, *notes])
    text = ""
    if len(given.test):
        evaluation = telling.measure(policy, given, ready.config)
        facts["evaluation"], text = evaluation.as_dict(), evaluation.table()  # type: ignore[typeddict-item]
    calibration_table.write(folder.path / calibration_table.CALIBRATION, given)
    _write(ready, folder, policy, facts, given.quarantined)
    return Summary(folder.path, folder.manifest, _line(policy, facts, folder.path), text)


def check_cluster(ready: Ready, path: Path) -> None:
    """Refuse, with the numbers, actors that do not fit the cluster or a folder that its nodes do not share."""
    if ready.scorer is None:
        return
    config = ready.config
    needed = {"CPU": float(config.replicas)}
    ray_session.require(needed, f"scoring with replicas: {config.replicas}", hint="Lower replicas")
    ray_session.require_shared(path, [*ready.sources, str(config.scorer)])


def _with_confidences(ready: Ready, chosen: Chosen, folder: RunFolder, progress: Progress) -> Material:
    answers = chosen.answers
    if ready.config.scorer is None:
        return material(chosen, {CONFIDENCE: answers.signals[CONFIDENCE]}, ready.config, None)
    from stitch_ray.reliability.scorer.scoring import score_answers

    file = folder.path / CONFIDENCES
    scores = _read_scores(file, answers.column("answer_id").tolist())
    if scores is None:
        config = ready.config
        scores = score_answers(
            str(config.scorer), answers, batch_tokens=config.batch_tokens, replicas=config.replicas, progress=progress
        )
        columns = {name: pa.array(values, pa.float64(), from_pandas=True) for name, values in scores.items()}
        with atomic_path(file) as temporary:
            pq.write_table(pa.table({"answer_id": answers.table["answer_id"], **columns}), temporary)
        folder.disposable = False
    return material(chosen, scores, ready.config, ready.scorer)


def _read_scores(file: Path, answer_ids: Sequence[str]) -> dict[str, Floats] | None:
    """Confidences that an earlier start of this run has computed."""
    if not file.exists():
        return None
    table = pq.read_table(file)
    if table["answer_id"].to_pylist() != answer_ids:
        return None
    return {
        name: table[name].to_numpy(zero_copy_only=False).astype(np.float64)
        for name in table.column_names
        if name != "answer_id"
    }


def _facts(ready: Ready, folder: RunFolder, policy: Policy, given: Material, notes: Sequence[str]) -> CalibrationFacts:
    """Also brings the manifest up to date."""
    config = ready.config
    promises = [target_facts(policy, target, given, config.seed) for target in policy.targets]
    unscored = int(np.isnan(given.calibrate.highest).sum())
    if unscored:
        notes = [*notes, f"{unscored} of {len(given.calibrate)} calibration answers are unscored and never given."]
    if not len(given.test):
        notes = [*notes, "The test split is empty, so nothing shows whether the promise held."]
    folder.manifest.update(
        rows_in=given.rows_in,
        rows_out=given.rows_out,
        rows_quarantined=len(given.quarantined),
        rows_dropped=dict(given.dropped),
        inputs=dict.fromkeys(ready.sources, ready.work["inputs"]),
        splits=dict(given.splits),
        unscored=unscored,
        seed=config.seed,
    )
    facts: CalibrationFacts = {
        "targets": promises,
        "route": policy.fingerprints.route.partition(":")[0],
        "loss": config.loss,
        "splits": given.splits,
        "notes": [*given.notes, *notes],
        "caveats": telling.caveats(policy),
    }
    found = telling.curve(given.calibrate)
    if found is not None:
        facts["curve"] = found
    if len(given.test):
        facts["test"] = telling.scored_facts(policy, given.test)
    return facts


def _update(ready: Ready, given: Update, folder: RunFolder) -> Summary:
    """Renew a policy by labels that came back, and follow them with the risk monitor."""
    labels = given.labels
    policy, renewals = renew(given.policy, labels, ready.config.grid, ready.work_hash)
    first = renewals[0]
    folder.manifest.update(
        rows_in=labels.rows_in,
        rows_out=len(labels.labels),
        rows_quarantined=len(labels.quarantined),
        rows_dropped={"repeated id": labels.repeats} if labels.repeats else {},
        inputs=dict.fromkeys(ready.sources, ready.work["inputs"]),
        updated={
            "policy": given.policy.version,
            "targets": [{"before": asdict(one.before), "kept": one.kept, "labels": one.labels, "still": one.still,
                         "note": one.note, "alarm_at": one.monitor.alarm_at} for one in renewals],
        },
    )  # fmt: skip
    write_json(folder.path / MONITORS, [one.monitor.to_dict() for one in renewals])
    facts: CalibrationFacts = {
        "targets": [promise_facts(target) for target in policy.targets],
        "route": policy.fingerprints.route.partition(":")[0],
        "loss": policy.created_from.get("loss", "error"),
        "notes": [_renewed(one) for one in renewals],
        "caveats": [*telling.caveats(policy), *telling.update_caveats(renewals)],
    }
    if first.monitor.labels:
        facts["monitor"] = telling.monitor_facts(first)
    _write(ready, folder, policy, facts, labels.quarantined)
    line = f"calibrate: {len(labels.labels)} labels. {_renewed(first)} -> {folder.path / POLICY}"
    return Summary(folder.path, folder.manifest, line, "\n".join(_renewed(one) for one in renewals[1:]))


def _renewed(renewal: Renewal) -> str:
    """A sentence or three about one promise: its threshold, how many answers are left, and the alarm."""
    before, after, monitor = renewal.before, renewal.after, renewal.monitor
    whose = f"Task {before.task}, risk" if before.task else "Risk"
    change = f"threshold {_shown(before)} to {_shown(after)}, {renewal.note}"
    if renewal.kept:
        change = f"threshold {_shown(before)} {renewal.note}"
    left = "" if renewal.still is None else f"; of the answers given so far {renewal.still:.1%} still would be"
    reason = f" ({after.reason})" if after.reason and not renewal.kept else ""
    alarm = f"No alarm in {monitor.labels} labels of answers given."
    if monitor.alarm:
        alarm = (
            f"ALARM at label {monitor.alarm_at}: {monitor.total:g} of {monitor.labels} answers given were wrong, and a "
            f"risk of {before.target_risk:.0%} is no longer plausible."
        )
    return f"{whose} {before.target_risk:.0%}: {change}{reason}{left}. {alarm}"


def _write(
    ready: Ready, folder: RunFolder, policy: Policy, facts: CalibrationFacts, quarantined: Sequence[Quarantined]
) -> None:
    """Everything that a run leaves behind."""
    folder.disposable = False
    folder.write_quarantine(quarantined)
    policy.save(folder.path / POLICY)
    folder.manifest.update(
        policy=policy.version,
        targets=[telling.plain(target) for target in facts["targets"]],
        fingerprints=telling.policy_facts(policy)["fingerprints"],
    )
    facts["policy"] = telling.policy_facts(policy)
    write_json(folder.path / METRICS, telling.plain(facts))
    # For the report, which the run is not done without.
    folder.manifest.update(status="done", seconds=round(time.monotonic() - folder.started, 3))
    facts["manifest"], facts["quarantined"] = folder.manifest, quarantined
    facts["config"] = ready.config.model_dump(mode="json", exclude_none=True)
    write_report(folder.path / "report.html", facts)
    folder.finish()


def _line(policy: Policy, facts: CalibrationFacts, path: Path) -> str:
    target: Target = policy.targets[0]
    more = f" (and {len(policy.targets) - 1} more promises)" if len(policy.targets) > 1 else ""
    if target.threshold is None:
        return f"calibrate: abstains on everything: {target.reason}{more} -> {path / POLICY}"
    return (
        f"calibrate: answers from confidence {_shown(target)} on, {target.coverage:.1%} of {target.n_calibration} "
        f"calibration questions; at most {target.target_risk:.0%} of the answers are wrong with probability "
        f"{1 - target.delta:.0%}{_tested(facts['targets'][0].get('test'))}{more} -> {path / POLICY}"
    )


def _tested(check: CheckFacts | Mapping[str, Any] | None) -> str:
    if not check or not check["answered"]:
        return ""
    held = "held" if check["held"] else "not held"
    return (
        f"; test: {check['wrong']:g} of {check['answered']} wrong ({check['risk']:.1%}, 95 % interval {check['low']:.1%} "
        f"to {check['high']:.1%}), {held}"
    )


def _shown(target: Target) -> str:
    return "none" if target.threshold is None else f"{target.threshold:.4g}"

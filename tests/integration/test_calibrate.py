"""`calibrate` from files: the promise on fresh questions, counts that add up, refusals, cascades, and updates."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.special import expit, logit

from stitch_ray import api
from stitch_ray.config.calibrate import CalibrateConfig
from stitch_ray.config.loading import validate
from stitch_ray.config.reliability import AnswerSplitConfig
from stitch_ray.data.splits import split_among
from stitch_ray.data.trained_on import write_trained_on
from stitch_ray.errors import UserError
from stitch_ray.records import ANSWER_SCHEMA, question_group
from stitch_ray.reliability.policy import Policy
from stitch_ray.reliability.risk import estimate, pipeline, preflight
from stitch_ray.reliability.scorer.file import ScorerFile
from stitch_ray.reliability.scorer.stack import fit_scorer
from stitch_ray.reliability.tables import read_answers
from stitch_ray.runs import RunFolder, Summary
from tests.page import Page

Record = dict[str, Any]
HALF = {"train": 0, "stack": 0, "isotonic": 0.1, "calibrate": 0.5, "test": 0.4}


def answers(n: int, seed: int = 0) -> list[Record]:
    """Confidences are the true probabilities of being right."""
    rng = np.random.default_rng(seed)
    p = rng.beta(1.2, 0.5, n)
    right = rng.random(n) < p
    return [
        {
            "question": f"Question {seed}-{i}?",
            "answer": f"Answer {i}",
            "correct": bool(right[i]),
            "confidence": float(p[i]),
        }
        for i in range(n)
    ]


def two_stages(n: int, seed: int = 0) -> list[Record]:
    """The second stage is right no more often, and its scorer is 0.7 logits too sure."""
    rng = np.random.default_rng(seed)
    odds = rng.normal(0.9, 1.5, n)
    rows = []
    for i in range(n):
        right = rng.random(2) < expit(odds[i])
        draft, final = expit(odds[i] + rng.normal(0, 1, 2) + (0, 0.7))
        rows.append(
            {
                "question": f"Question {seed}-{i}?",
                "draft_confidence": float(draft),
                "draft_correct": bool(right[0]),
                "final_confidence": float(final),
                "final_correct": bool(right[1]),
            }
        )
    return rows


def write(path: Path, rows: list[Record]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(**values: Any) -> CalibrateConfig:
    rough = {} if "feedback" in values else {"evaluation": {"bootstrap": 50}}
    return validate(CalibrateConfig, {**rough, **values}, "config")


def calibrate(out: Path, *, report: bool = False, **values: Any) -> Summary:
    """The job without starting Ray, which only a scorer needs; the report only where a test reads it."""
    ready = preflight.check(config(**values))
    settings = ready.config.model_dump(mode="json", exclude_none=True)
    folder = RunFolder.open(out, "calibrate", settings, ready.work)
    try:
        with nullcontext() if report else patch.object(pipeline, "write_report"):
            return pipeline.run(ready, folder)
    except BaseException as error:
        folder.fail(error)
        raise


def shown(out: Path) -> str:
    return Page((out / "report.html").read_text()).text


def fails(message: str, **values: Any) -> None:
    with pytest.raises(UserError, match=message):
        preflight.check(config(**values))


def test_a_policy_from_answers_keeps_its_promise_on_the_test_split(tmp_path: Path) -> None:
    rows = answers(2000)
    file = write(
        tmp_path / "a.jsonl", [*rows, rows[0], {"question": "", "answer": "x"}, {**rows[1], "answer": "other"}]
    )
    done = calibrate(tmp_path / "run", report=True, answers=[file], split=HALF)
    policy = Policy.load(tmp_path / "run")
    assert policy.version == done.facts["policy"]
    assert policy.target().coverage == pytest.approx(0.54, abs=0.06)
    assert policy.created_from["loss"] == "error"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["rows_in"] == 2003
    assert manifest["rows_quarantined"] == 1
    assert manifest["rows_dropped"] == {"exact repeats": 1, "a further answer to the same question": 1}
    assert manifest["rows_out"] == 2000 == sum(split["answers"] for split in manifest["splits"].values())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text(), parse_constant=pytest.fail)
    check = metrics["targets"][0]["test"]
    kept = zip(metrics["test"]["confidence"], metrics["test"]["correct"], strict=True)
    given = [correct for confidence, correct in kept if confidence >= policy.target().threshold]
    assert (check["answered"], check["wrong"]) == (len(given), len(given) - sum(given))
    assert check["low"] <= check["risk"] <= check["high"]
    assert check["held"] == (check["risk"] <= 0.1)
    assert "held" in done.line
    assert f"{check['wrong']:g} of {check['answered']} wrong" in done.line
    assert [row["name"] for row in metrics["evaluation"]["rows"]] == ["confidence", "random", "answer_length"]
    assert "confidence" in done.text
    page = shown(tmp_path / "run")
    assert "at most 10" in page
    assert "like those it was calibrated on" in page


def test_the_same_files_give_the_same_policy_in_any_order(tmp_path: Path) -> None:
    rows = answers(600)
    made = []
    for name, order in (("a", rows), ("b", rows[::-1])):
        calibrate(tmp_path / name, answers=[write(tmp_path / f"{name}.jsonl", order)], split=HALF)
        made.append(Policy.load(tmp_path / name).targets)
    assert made[0] == made[1]


def test_too_few_answers_abstain_on_everything_and_the_line_says_how_many_are_needed(tmp_path: Path) -> None:
    done = calibrate(tmp_path / "run", report=True, answers=[write(tmp_path / "a.jsonl", answers(30))], split=HALF)
    assert (
        "abstains on everything: needs at least 22 accepted calibration answers without an error; there are "
        in done.line
    )
    assert Policy.load(tmp_path / "run").target().threshold is None
    assert json.loads((tmp_path / "run" / "policy.json").read_text())["threshold"] is None
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "done"
    assert "needs at least 22" in shown(tmp_path / "run").lower()


@pytest.mark.parametrize("change", [{"confidence": None}, {"correct": True}, {"correct": False}, {"confidence": 0.5}])
def test_unscored_answers_a_single_class_and_ties_go_through(tmp_path: Path, change: Record) -> None:
    rows = [{**row, **change} for row in answers(300)]
    if change == {"confidence": None}:
        rows[:10] = answers(10)
    done = calibrate(tmp_path / "run", answers=[write(tmp_path / "a.jsonl", rows)], split=HALF)
    threshold = Policy.load(tmp_path / "run").target().threshold
    assert (threshold is not None) == (change == {"correct": True})
    assert (done.facts["unscored"] > 100) == (change == {"confidence": None})


def test_tasks_have_their_own_promises_and_are_left_out_of_the_one_for_the_rest(tmp_path: Path) -> None:
    rows = [{**row, "task": "law" if i % 2 else "maths"} for i, row in enumerate(answers(1600))]
    for row in rows:
        if row["task"] == "law":
            row["correct"] = True
    targets = [{"risk": 0.1}, {"risk": 0.2}, {"risk": 0.05, "task": "law"}]
    file = write(tmp_path / "a.jsonl", rows)
    calibrate(tmp_path / "run", answers=[file], split=HALF, targets=targets)
    policy = Policy.load(tmp_path / "run")
    law, rest = policy.target("law"), policy.target("maths")
    assert law.coverage == pytest.approx(1.0, abs=0.05)
    assert rest.coverage is not None
    assert rest.coverage < 0.75
    assert law.n_calibration + rest.n_calibration == policy.target("maths", 0.2).n_calibration + law.n_calibration
    assert 700 < law.n_calibration + rest.n_calibration < 900
    assert policy.joint_delta == pytest.approx(0.3)
    with pytest.raises(UserError, match="no calibration question is of task 'art'; tasks in the data are: law, maths"):
        calibrate(tmp_path / "other", answers=[file], split=HALF, targets=[{"task": "art"}])
    assert not (tmp_path / "other").exists()


def test_quality_as_loss_and_sgr(tmp_path: Path) -> None:
    rows = [{**row, "label": 0.9 if row["correct"] else 0.2} for row in answers(2000)]
    file = write(tmp_path / "a.jsonl", rows)
    quality = calibrate(tmp_path / "q", answers=[file], split=HALF, loss="quality", targets=[{"risk": 0.3}])
    assert 0 < quality.facts["targets"][0]["coverage"] <= 1
    assert quality.facts["targets"][0]["test"]["held"]
    sgr = calibrate(tmp_path / "s", answers=[file], split=HALF, method="sgr")
    ours = calibrate(tmp_path / "l", answers=[file], split=HALF)
    assert 0 < sgr.facts["targets"][0]["coverage"] < ours.facts["targets"][0]["coverage"]
    fails("sgr needs loss: error", answers=[file], method="sgr", loss="quality")


def test_confidences_that_are_no_probabilities_need_the_isotonic_split(tmp_path: Path) -> None:
    rows = [{**row, "confidence": float(logit(row["confidence"]))} for row in answers(1000)]
    file = write(tmp_path / "a.jsonl", rows)
    done = calibrate(tmp_path / "run", answers=[file], split=HALF)
    assert done.facts["targets"][0]["coverage"] > 0.4
    whole = {"train": 0, "stack": 0, "isotonic": 0, "calibrate": 1, "test": 0}
    with pytest.raises(UserError, match=r"split\.isotonic"):
        calibrate(tmp_path / "other", answers=[file], split=whole)
    done = calibrate(tmp_path / "all", report=True, answers=[write(tmp_path / "b.jsonl", answers(500))], split=whole)
    assert "held" not in done.line
    assert "The test split is empty" in shown(tmp_path / "all")


def test_answers_without_confidence_and_without_scorer_are_refused(tmp_path: Path) -> None:
    rows = answers(100)
    for row in rows:
        del row["confidence"]
    file = write(tmp_path / "a.jsonl", rows)
    fails("name a scorer", answers=[file])
    fails("no such file", answers=[str(tmp_path / "none.jsonl")])
    (tmp_path / "empty").mkdir()
    fails("no finished run of train-scorer", answers=[file], scorer=str(tmp_path / "empty"))
    fails("replicas: no effect", answers=[file], replicas=2)


def sampled(folder: Path, rows: list[Record], answers_from: str, learned: Record | None = None) -> str:
    """A finished run folder of sample-answers with one greedy answer a question, and its perplexity."""
    split = AnswerSplitConfig(train=0, stack=0.2, isotonic=0.2, calibrate=0.4, test=0.2)
    table = []
    for i, row in enumerate(rows):
        group = question_group(row["question"], None)
        known = {"question": row["question"], "answer": row["answer"], "correct": row["correct"]}
        ids = {"answer_id": f"{i}/greedy-0", "example_id": str(i), "group_id": group, "kind": "greedy"}
        label = {"label": float(row["correct"]), "split": split_among(group, split.shares, split.salt)}
        table.append({**known, **ids, **label})
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(table, ANSWER_SCHEMA), folder / "answers.parquet")
    signals = [
        {"answer_id": row["answer_id"], "perplexity": 1 / given["confidence"]}
        for row, given in zip(table, rows, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(signals), folder / "signals.parquet")
    manifest = {"job": "sample-answers", "work_hash": "w", "status": "done", "split": split.model_dump(mode="json")}
    manifest |= {"answers_from": answers_from, "trained_on": learned or {}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return str(folder)


def scorer(folder: Path, run: str) -> str:
    """A finished run folder of train-scorer: perplexity alone, no encoder."""
    held = read_answers([run])
    held = held.take(np.isin(held.column("split").astype(str), ("stack", "isotonic")))
    folder.mkdir()
    made = fit_scorer(folder, held, None, signals=["perplexity"], loss="bce", max_length=None, seed=0)
    made.save(folder)
    write_trained_on(folder, held.column("group_id"))
    (folder / "manifest.json").write_text(json.dumps({"job": "train-scorer", "work_hash": "w", "status": "done"}))
    return str(folder)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_scorer_gives_the_confidences_and_its_policy_holds_for_no_other(tmp_path: Path) -> None:
    run = sampled(tmp_path / "answers", answers(2000), "model-1")
    path = scorer(tmp_path / "scorer", run)
    done = calibrate(tmp_path / "run", answers=[run], scorer=path)
    policy = Policy.load(tmp_path / "run")
    mark = ScorerFile.load(path).fingerprint
    assert (policy.fingerprints.primary, policy.fingerprints.scorer) == ("model-1", mark)
    assert policy.check_fingerprints(primary="model-1", auxiliaries=[], scorer=mark) == []
    with pytest.raises(UserError, match="primary is model-2, was model-1"):
        policy.check_fingerprints(primary="model-2", auxiliaries=[], scorer=mark)
    assert policy.target().coverage > 0.4
    assert done.facts["targets"][0]["test"]["answered"] > 100
    assert done.facts["rows_dropped"] == {"of the splits train and stack": 2000 - done.facts["rows_out"]}
    with patch("stitch_ray.reliability.scorer.scoring.score_answers", side_effect=AssertionError):
        calibrate(tmp_path / "run", answers=[run], scorer=path)  # what was scored is not scored again
    names = [row["name"] for row in json.loads((tmp_path / "run" / "metrics.json").read_text())["evaluation"]["rows"]]
    assert names == ["scorer", "stack", "random", "answer_length", "perplexity"]


def test_a_scorer_of_another_model_or_with_questions_in_common_is_refused(tmp_path: Path) -> None:
    run = sampled(tmp_path / "answers", answers(1000), "model-1")
    path = scorer(tmp_path / "scorer", run)
    other = sampled(tmp_path / "other", answers(1000), "model-2")
    fails("trained for answers of model version model-1, these are of model-2", answers=[other], scorer=path)
    table = pq.read_table(tmp_path / "answers" / "answers.parquet")
    common = [row["group_id"] for row in table.to_pylist() if row["split"] == "calibrate"][:12]
    write_trained_on(tmp_path / "scorer", common)
    fails("has learned from 12 questions of the calibrate split", answers=[run], scorer=path)
    learned = sampled(tmp_path / "learned", answers(1000), "model-1", {"train": 9, "calibrate": 7, "test": 3})
    fails(
        "the model of .* has learned from 7 questions of the calibrate split, 3 questions of the test",
        answers=[learned],
    )


def test_a_cascade_is_calibrated_as_a_whole_and_a_threshold_of_drafts_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "p.jsonl", two_stages(3000))
    values: Record = {"predictions": [file], "split": HALF, "targets": [{"risk": 0.2}]}
    done = calibrate(tmp_path / "run", report=True, **values, route="dialogue")
    policy = Policy.load(tmp_path / "run")
    assert policy.fingerprints.route == "dialogue"
    target = done.facts["targets"][0]
    assert 0.3 < target["coverage"] < 0.7
    stages = target["stages"]
    assert stages["draft"] + stages["refined"] == target["test"]["answered"]
    assert sum(stages.values()) == target["test"]["total"]
    assert "dialogue" in shown(tmp_path / "run")
    fails("two stages; name the second one", **values)
    fails("one stage", **values, route="dialogue", method="sgr")
    fails("serve_kind: no effect", **values, route="dialogue", serve_kind="greedy")
    fails("from drafts alone", answers=[file], route="dialogue")
    fails("scale: no effect", answers=[file], scale="none")


def test_the_stages_of_a_cascade_are_put_on_one_scale_unless_it_is_not_wanted(tmp_path: Path) -> None:
    """Its second stage says .7 in log-odds too much; what is written beside the policy are confidences, not scores."""
    rows = two_stages(3000)
    file = write(tmp_path / "p.jsonl", rows)
    values: Record = {"predictions": [file], "split": HALF, "route": "dialogue", "targets": [{"risk": 0.2}]}
    done = calibrate(tmp_path / "run", report=True, **values)
    scale = Policy.load(tmp_path / "run").scale
    assert scale is not None
    assert scale.confidence(0.5, "refined") < scale.confidence(0.5, "draft")
    assert "on one scale" in shown(tmp_path / "run")
    table = pq.read_table(tmp_path / "run" / "calibration.parquet")
    scores = {stage: np.sort([row[f"{stage}_confidence"] for row in rows]) for stage in ("draft", "final")}
    for stage, name in (("draft", "draft"), ("final", "refined")):
        written = np.sort(table[f"{stage}_confidence"].to_numpy())
        assert len(written) == done.facts["rows_out"]
        assert np.isin(written.round(9), scale.apply(scores[stage], name).round(9)).all()  # type: ignore[arg-type]
    calibrate(tmp_path / "plain", **values, scale="none")
    assert Policy.load(tmp_path / "plain").scale is None
    plain = pq.read_table(tmp_path / "plain" / "calibration.parquet")
    assert np.isin(plain["final_confidence"].to_numpy(), scores["final"]).all()


def test_predictions_under_a_scale_are_no_scores_to_calibrate(tmp_path: Path) -> None:
    folder = tmp_path / "predicted"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(two_stages(100)), folder / "predictions.parquet")
    marks = {"primary": "p", "auxiliaries": ["a"], "scorer": "s", "route": "dialogue:1"}
    manifest: Record = {"job": "predict", "work_hash": "w", "status": "done", "fingerprints": marks}
    manifest |= {"policy": "v1", "scale": None}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    preflight.check(config(predictions=[str(folder)], route="dialogue"))
    (folder / "manifest.json").write_text(json.dumps({**manifest, "scale": {"draft": {}}}))
    fails("on the scale of policy v1.*calibration: true", predictions=[str(folder)], route="dialogue")


def test_a_question_without_its_second_stage_stops_the_calibration(tmp_path: Path) -> None:
    """Leaving it out would choose questions by their drafts' confidence."""
    rows = two_stages(50)
    for missing, message in (
        ("final_confidence", "p.jsonl:7 has no field final_confidence"),
        ("final_correct", "p.jsonl:7 has a label of its draft answer and none of its final"),
    ):
        part = [dict(row) for row in rows]
        del part[6][missing]
        fails(message, predictions=[write(tmp_path / "p.jsonl", part)], route="revise")
    part = [{**row, "question": None} if i == 3 else row for i, row in enumerate(rows)]
    fails("some have none", predictions=[write(tmp_path / "p.jsonl", part)], route="revise")


def test_predictions_without_questions_all_calibrate_and_unscored_ones_stay(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "question"} for row in two_stages(800)]
    rows[0]["final_confidence"] = None
    rows[1] = {"draft_confidence": "high", "final_confidence": 0.5, "draft_correct": True, "final_correct": True}
    file = write(tmp_path / "p.jsonl", rows)
    done = calibrate(tmp_path / "run", report=True, predictions=[file], route="revise", targets=[{"risk": 0.25}])
    assert done.facts["splits"]["calibrate"]["answers"] == 799
    assert done.facts["rows_quarantined"] == 1
    text = shown(tmp_path / "run")
    assert "cannot be split" in text
    assert "thresholds tried are 0, 0.01" in text


def feedback(policy: Policy, rows: list[Record], audit: bool = False) -> list[Record]:
    threshold = policy.target().threshold
    assert threshold is not None
    found = []
    for i, row in enumerate(rows):
        given = row["confidence"] >= threshold
        if given or audit:
            label = {"id": i, "confidence": row["confidence"], "correct": row["correct"]}
            found.append({**label, "decision": "answer" if given else "abstain", "policy_version": policy.version})
    return found


def test_labels_of_answered_questions_only_move_the_threshold_up(tmp_path: Path) -> None:
    calibrate(tmp_path / "old", answers=[write(tmp_path / "a.jsonl", answers(2000))], split=HALF)
    old = Policy.load(tmp_path / "old")
    rows = feedback(old, answers(1500, seed=1))
    extra = [{**rows[0], "policy_version": "0" * 16}, {**rows[1], "correct": not rows[1]["correct"]}, rows[2]]
    low = {"confidence": 0.01, "correct": True}
    file = write(tmp_path / "f.jsonl", [*rows, *extra, low])
    done = calibrate(tmp_path / "new", report=True, policy=str(tmp_path / "old"), feedback=[file])
    new = Policy.load(tmp_path / "new")
    assert new.target().threshold >= old.target().threshold
    assert new.target().n_calibration == len(rows)
    assert new.target().coverage is None
    assert new.created_from["policy"] == old.version
    assert new.version != old.version
    assert (done.facts["rows_quarantined"], done.facts["rows_dropped"]) == (3, {"repeated id": 1})
    reasons = (tmp_path / "new" / "quarantine.jsonl").read_text()
    for reason in ("decided by policy version", "labelled in another way", "contradicts confidence"):
        assert reason in reasons
    assert "No alarm" in done.line
    page = shown(tmp_path / "new")
    assert "fresh labels alone" in page


def test_labels_of_answered_questions_say_nothing_of_lower_thresholds_however_good_they_are(tmp_path: Path) -> None:
    calibrate(tmp_path / "old", answers=[write(tmp_path / "a.jsonl", answers(2000))], split=HALF)
    old = Policy.load(tmp_path / "old")
    rows = [{**row, "correct": True} for row in feedback(old, answers(1500, seed=1))]
    calibrate(tmp_path / "new", policy=str(tmp_path / "old"), feedback=[write(tmp_path / "f.jsonl", rows)])
    assert Policy.load(tmp_path / "new").target().threshold == old.target().threshold


def test_an_audit_of_withheld_answers_too_can_move_it_down(tmp_path: Path) -> None:
    calibrate(tmp_path / "old", answers=[write(tmp_path / "a.jsonl", answers(300))], split=HALF)
    old = Policy.load(tmp_path / "old")
    rows = feedback(old, answers(4000, seed=2), audit=True)
    calibrate(tmp_path / "new", policy=str(tmp_path / "old"), feedback=[write(tmp_path / "f.jsonl", rows)])
    new = Policy.load(tmp_path / "new")
    assert new.target().threshold < old.target().threshold
    assert new.target().coverage > old.target().coverage
    some = [row for i, row in enumerate(rows) if row["decision"] == "answer" or i % 10 == 0]
    done = calibrate(tmp_path / "part", policy=str(tmp_path / "old"), feedback=[write(tmp_path / "g.jsonl", some)])
    assert Policy.load(tmp_path / "part").target().threshold >= old.target().threshold
    assert "answered questions were labelled more often" in done.line


def test_a_service_that_got_worse_raises_the_alarm(tmp_path: Path) -> None:
    calibrate(tmp_path / "old", answers=[write(tmp_path / "a.jsonl", answers(2000))], split=HALF)
    old = Policy.load(tmp_path / "old")
    rng = np.random.default_rng(3)
    rows = [
        {**row, "correct": bool(row["correct"] and rng.random() > 0.25)} for row in feedback(old, answers(1500, seed=1))
    ]
    done = calibrate(
        tmp_path / "new", report=True, policy=str(tmp_path / "old"), feedback=[write(tmp_path / "f.jsonl", rows)]
    )
    assert "ALARM at label" in done.line
    assert Policy.load(tmp_path / "new").target().threshold is None
    metrics = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert metrics["monitor"]["alarm"]
    assert len(metrics["monitor"]["wealth"]) == len(rows)
    assert "Alarm" in shown(tmp_path / "new")


def test_too_few_labels_leave_the_policy_as_it_was(tmp_path: Path) -> None:
    calibrate(tmp_path / "old", answers=[write(tmp_path / "a.jsonl", answers(2000))], split=HALF)
    old = Policy.load(tmp_path / "old")
    rows = feedback(old, answers(1500, seed=1))[:15]
    values: Record = {"policy": str(tmp_path / "old"), "feedback": [write(tmp_path / "f.jsonl", rows)]}
    done = calibrate(tmp_path / "new", **values)
    assert Policy.load(tmp_path / "new") == old
    assert "kept as it was: 15 labels, and at least 22" in done.line
    fails("targets: no effect", **values, targets=[{"risk": 0.3}])
    other = [{**row, "policy_version": "x"} for row in rows]
    fails("unusable", policy=str(tmp_path / "old"), feedback=[write(tmp_path / "g.jsonl", other)])


def test_labels_of_a_cascade_test_its_active_threshold_alone(tmp_path: Path) -> None:
    values: Record = {"predictions": [write(tmp_path / "p.jsonl", two_stages(3000))], "split": HALF}
    calibrate(tmp_path / "old", **values, route="dialogue", targets=[{"risk": 0.2}])
    old = Policy.load(tmp_path / "old")
    threshold = old.target().threshold
    assert threshold is not None
    rng = np.random.default_rng(0)
    confidence = threshold + (1 - threshold) * rng.random(600)
    for wrong, kept in ((0.1, True), (0.3, False)):
        rows = [{"confidence": float(c), "correct": bool(rng.random() > wrong)} for c in confidence]
        calibrate(tmp_path / f"new{kept}", policy=str(tmp_path / "old"), feedback=[write(tmp_path / "f.jsonl", rows)])
        new = Policy.load(tmp_path / f"new{kept}")
        assert new.target().threshold == (threshold if kept else None)
        assert new.scale == old.scale is not None


def test_dry_run_counts_and_says_how_many_are_needed(tmp_path: Path) -> None:
    text = estimate.describe(preflight.check(config(answers=[write(tmp_path / "a.jsonl", answers(300))], split=HALF)))
    assert "read   300 rows from 1 source(s), 0 unusable" in text
    assert "needs at least 22 of" in text
    text = estimate.describe(
        preflight.check(config(predictions=[write(tmp_path / "p.jsonl", two_stages(100))], route="revise"))
    )
    assert "split  calibrate: " in text


def test_a_folder_of_another_promise_is_not_overwritten(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", answers(300))
    calibrate(tmp_path / "run", answers=[file], split=HALF)
    with pytest.raises(UserError, match="targets"):
        calibrate(tmp_path / "run", answers=[file], split=HALF, targets=[{"risk": 0.2}])
    again = calibrate(tmp_path / "run", answers=[file], split=HALF, evaluation={"bootstrap": 0})
    assert again.facts["status"] == "done"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_the_api_runs_it(tmp_path: Path) -> None:
    values = {"answers": [write(tmp_path / "a.jsonl", answers(300))], "split": HALF, "evaluation": {"bootstrap": 0}}
    assert (api.calibrate(values, tmp_path / "run") / "policy.json").exists()

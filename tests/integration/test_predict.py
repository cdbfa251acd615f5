"""`predict` end to end: two stages, calibration on them, decisions by that policy, kills, resume, and refusals."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray

from stitch_ray.api import as_config, run_job
from stitch_ray.config.calibrate import CalibrateConfig
from stitch_ray.config.ensemble import EnsembleConfig
from stitch_ray.config.loading import validate
from stitch_ray.config.predict import PredictConfig
from stitch_ray.data import formats, readers
from stitch_ray.ensemble.batch import estimate, preflight
from stitch_ray.ensemble.batch.rows import PREDICTION_SCHEMA
from stitch_ray.ensemble.fingerprints import member_fingerprint
from stitch_ray.errors import UserError
from stitch_ray.reliability.policy import Policy
from stitch_ray.reliability.probability import Isotonic
from stitch_ray.reliability.risk import calibration_table
from stitch_ray.reliability.scorer.file import ScorerFile
from stitch_ray.reliability.scorer.logistic import LogisticStack
from stitch_ray.runs import Summary
from stitch_ray.training.tiny import make_tiny_model
from tests.page import Page

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

Values = dict[str, Any]
QUESTIONS = 20
SPLIT = {"train": 0, "stack": 0, "isotonic": 0.2, "calibrate": 0.6, "test": 0.2}
EXACT = ("draft", "refined", "answer", "decision", "reason", "route", "calls", "tokens")


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def parities(count: int) -> list[dict[str, Any]]:
    return [
        {"id": f"q{n}", "question": f"Is {n} even or odd?", "answer": "odd" if n % 2 else "even"} for n in range(count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = parities(QUESTIONS)
    rows += [{"question": "is 7 even or odd? ", "answer": "odd"}, {"question": "why? " * 2000, "answer": "so"}]
    return lines(tmp_path_factory.mktemp("data") / "parities.jsonl", rows)


@pytest.fixture(scope="module")
def primary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Has learned to answer "even" or "odd", and not which."""
    folder = tmp_path_factory.mktemp("models") / "primary"
    file = lines(folder.with_name("rows.jsonl"), parities(70))
    make_tiny_model(
        [formats.convert(row) for row in readers.iter_rows(str(file))], folder, parameters="300k", steps=90, seed=0
    )
    return folder


@pytest.fixture(scope="module")
def ensemble(primary: Path, tiny_model: Path, other_tiny_model: Path) -> Values:
    def member(path: Path, name: str) -> Values:
        return {"model": {"path": str(path), "name": name, "dtype": "float32"}}

    return {
        "primary": {**member(primary, "primary"), "max_tokens": 6},
        "auxiliaries": [member(tiny_model, "anna"), member(other_tiny_model, "ben")],
        "route": "dialogue",
        "dialogue": {"max_turns": 2, "max_tokens": 40},
    }


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory, ensemble: Values) -> Path:
    """Of one signal: the surer the model, the surer the scorer."""
    folder = tmp_path_factory.mktemp("scorer")
    model = validate(EnsembleConfig, ensemble, "ensemble").primary
    ScorerFile(
        encoder_fingerprint=None,
        loss=None,
        max_length=None,
        stack=LogisticStack(("mean_token_margin",), (0.5,), (0.5,), (1.0,), 0.0),
        isotonic=Isotonic((-3.0, 3.0), (0.05, 0.95)),
        answers_from=member_fingerprint(model),
    ).save(folder)
    return folder


@pytest.fixture(scope="module")
def config(data: Path, ensemble: Values, scorer: Path) -> Values:
    return {
        "data": {"paths": [str(data)]},
        "ensemble": ensemble,
        "scorer": str(scorer),
        "split": SPLIT,
        "concurrency": 8,
    }


def run(config: Values, out: Path) -> Summary:
    return run_job("predict", as_config(config, PredictConfig), out)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "predictions.parquet").to_pylist()


def fails(message: str, config: Values) -> None:
    with pytest.raises(UserError, match=message):
        preflight.check(as_config(config, PredictConfig))


@pytest.fixture(scope="module")
def both(config: Values, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """Every question through both stages, and the auxiliaries alone; its calls are logged beside it."""
    out = tmp_path_factory.mktemp("both") / "run"
    os.environ["STITCH_RAY_CALL_LOG"] = str(out.with_name("calls"))
    try:
        return run({**config, "calibration": True, "baselines": True}, out)
    finally:
        del os.environ["STITCH_RAY_CALL_LOG"]


@pytest.fixture(scope="module")
def calibrated(both: Summary, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `calibrate` makes of them."""
    values = {
        "predictions": [str(both.folder)],
        "route": "dialogue",
        "targets": [{"risk": 0.5, "delta": 0.2}],
        "evaluation": {"bootstrap": 20},
    }
    out = tmp_path_factory.mktemp("calibrated") / "run"
    return run_job("calibrate", as_config(values, CalibrateConfig), out).folder


@pytest.fixture(scope="module")
def policy(both: Summary, calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That policy at a threshold in the middle of the drafts: so few questions find none that keeps a promise."""
    made = Policy.load(calibrated)
    middle = statistics.median_high(row["draft_confidence"] for row in rows_of(both.folder))
    path = tmp_path_factory.mktemp("policy") / "policy.json"
    replace(made, targets=(replace(made.target(), threshold=middle, reason=None),)).save(path)
    return path


def test_calibration_keeps_both_stages_of_every_question(both: Summary) -> None:
    manifest = json.loads((both.folder / "manifest.json").read_text())
    assert manifest["status"] == "done"
    assert (manifest["rows_in"], manifest["rows_out"]) == (QUESTIONS + 2, QUESTIONS)
    assert manifest["rows_quarantined"] == 1
    assert manifest["rows_dropped"] == {"question asked twice": 1}
    table = pq.read_table(both.folder / "predictions.parquet")
    assert table.schema.names[: len(PREDICTION_SCHEMA.names)] == PREDICTION_SCHEMA.names
    rows = table.to_pylist()
    for row in rows:
        assert row["draft"] is not None
        assert row["draft_confidence"] is not None
        assert row["decision"] is None
        assert row["answer"] is None
        assert row["final_label"] is not None
        if row["refined"] is None:
            assert (row["final_confidence"], row["final_label"]) == (None, row["draft_label"])
            assert row["reason"] == "route_failed"
    refined = [row for row in rows if row["refined"] is not None]
    assert len(refined) >= QUESTIONS / 2
    turns = [entry for entry in json.loads(refined[0]["trace"]) if entry["stage"] == "turn"]
    assert {turn["speaker"] for turn in turns} <= {"anna", "ben"}
    assert all(isinstance(row["answer.anna"], str) for row in rows)
    assert len({row["draft_confidence"] for row in rows}) > 3


def test_the_report_compares_the_systems_and_says_what_each_number_is(both: Summary) -> None:
    metrics = json.loads((both.folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    evaluation = metrics["evaluation"]
    assert evaluation["split"] == "test"
    names = [system["name"] for system in evaluation["systems"]]
    assert names == ["primary alone", "anna alone", "ben alone", "majority of all", "always refined"]
    of = dict(zip(names, evaluation["systems"], strict=True))
    assert of["primary alone"]["calls"] < of["always refined"]["calls"]
    tested = [row for row in rows_of(both.folder) if row["split"] == "test"]
    share = sum(row["draft_correct"] for row in tested) / len(tested)
    assert of["primary alone"]["accuracy"]["value"] == pytest.approx(share)
    page = Page((both.folder / "report.html").read_text()).text
    assert "majority of all" in page
    assert "Oracle" in page
    assert "predict" in both.line


def test_calibrate_reads_the_run_with_its_split_and_fingerprints(both: Summary, calibrated: Path) -> None:
    manifest = json.loads((calibrated / "manifest.json").read_text())
    assert manifest["fingerprints"] == both.facts["fingerprints"]
    splits = Counter(row["split"] for row in rows_of(both.folder))
    assert {name: manifest["splits"][name]["questions"] for name in splits} == splits
    table = calibration_table.read(calibrated)
    assert table is not None
    assert table.num_rows == QUESTIONS
    rows = [row for row in rows_of(both.folder) if row["split"] == "calibrate"]
    draft, final = (np.array([row[f"{stage}_confidence"] for row in rows], float) for stage in ("draft", "final"))
    tau = float(np.median(draft))
    points = calibration_table.operating_points(table, thresholds=[tau])
    first, second = draft >= tau, final >= tau
    wrong = sum(not row["draft_correct" if sure else "final_correct"] for row, sure in zip(rows, first, strict=True)
                if sure or (row["final_confidence"] or 0) >= tau)  # fmt: skip
    given = int((first | second).sum())
    assert points.num == len(rows)
    assert points.coverage[0] == pytest.approx(given / len(rows))
    assert points.risk[0] == pytest.approx(wrong / given)


def test_predictions_are_decided_as_the_policy_says(
    config: Values, both: Summary, policy: Path, tmp_path: Path
) -> None:
    made = Policy.load(policy)
    threshold = made.target().threshold
    assert threshold is not None
    done = run({**config, "policy": str(policy)}, tmp_path / "run")
    before = {row["example_id"]: row for row in rows_of(both.folder)}
    decided = rows_of(done.folder)
    assert len(decided) == QUESTIONS
    for row in decided:
        first = before[row["example_id"]]
        assert row["draft"] == first["draft"]
        if abs(first["draft_confidence"] - threshold) < 1e-5:
            continue  # the rounding of another batch may take it to the other side
        sure = first["draft_confidence"] >= threshold
        assert (row["reason"] == "confident") == sure
        assert (row["refined"] is None) or not sure
        assert (row["answer"] is None) == (row["decision"] == "abstain") == (row["correct"] is None)
        if row["answer"] is not None:
            assert row["confidence"] >= threshold
        assert (row["policy_version"], row["target_risk"]) == (made.version, 0.5)
    promise = json.loads((done.folder / "metrics.json").read_text())["evaluation"]["promises"][0]
    given = [row for row in decided if row["answer"] is not None and row["split"] == "test"]
    assert (promise["answered"], promise["wrong"]) == (len(given), sum(not row["correct"] for row in given))


def test_a_policy_for_another_dialogue_model_or_risk_is_refused(config: Values, ensemble: Values, policy: Path) -> None:
    other = {**ensemble, "dialogue": {**ensemble["dialogue"], "max_turns": 3}}
    fails("route is dialogue:.*, was dialogue:", {**config, "ensemble": other, "policy": str(policy)})
    turned = {**ensemble, "auxiliaries": ensemble["auxiliaries"][::-1]}
    fails("auxiliaries is", {**config, "ensemble": turned, "policy": str(policy)})
    alone = {"primary": ensemble["primary"]}
    fails("route is none, was dialogue", {**config, "ensemble": alone, "policy": str(policy)})
    fails("target_risk: no threshold was calibrated", {**config, "policy": str(policy), "target_risk": 0.3})
    swapped = {**ensemble, "primary": {**ensemble["auxiliaries"][0], "max_tokens": 6}}
    swapped["auxiliaries"] = [ensemble["auxiliaries"][1], {"model": ensemble["primary"]["model"]}]
    fails("scorer: it was trained for answers", {**config, "ensemble": swapped, "calibration": True})


def test_a_scorer_whose_signals_nobody_computes_is_refused(config: Values, tmp_path: Path) -> None:
    for name, message in (("semantic_entropy", "ensemble.signals.samples"), ("p_true", "ensemble.signals.prompted")):
        stack = LogisticStack((name,), (0.0,), (1.0,), (1.0,), 0.0)
        ScorerFile(
            encoder_fingerprint=None, loss=None, max_length=None, stack=stack, isotonic=Isotonic((0.0, 1.0), (0.1, 0.9)),
            answers_from=None,
        ).save(tmp_path / name)  # fmt: skip
        fails(message, {**config, "scorer": str(tmp_path / name), "calibration": True})


def test_too_small_a_cluster_is_refused_with_its_numbers(config: Values, ensemble: Values, tmp_path: Path) -> None:
    model = {**ensemble["primary"]["model"], "replicas": 9}
    many = {**ensemble, "primary": {**ensemble["primary"], "model": model}}
    with pytest.raises(UserError, match=r"primary 9 CPU.* needs 11 CPU \(the cluster has 4\)"):
        run({**config, "ensemble": many, "calibration": True}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_other_labels_cost_no_call_and_a_finished_run_none_at_all(
    config: Values, both: Summary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = tmp_path / "calls"
    monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(log))
    values = {**config, "calibration": True, "baselines": True}
    before = (both.folder / "predictions.parquet").read_bytes()
    run(values, both.folder)
    assert not log.exists()
    assert (both.folder / "predictions.parquet").read_bytes() == before
    run({**values, "labels": {"metric": "token_f1"}}, both.folder)
    assert {line.split("\t")[0] for line in log.read_text().splitlines()} == {"labels"}
    run(values, both.folder)
    assert (both.folder / "predictions.parquet").read_bytes() == before


@pytest.mark.resume
def test_a_resumed_run_asks_what_is_missing_and_killed_actors_change_no_answer(
    config: Values, both: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first chunk is gone, as after a killed command, and one actor of every kind is killed while it is asked."""
    folder = tmp_path / "run"
    shutil.copytree(both.folder, folder)
    (folder / "work" / "predictions" / "000000.parquet").unlink()
    log = tmp_path / "calls"
    monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(log))
    killed: list[str] = []
    over = threading.Event()

    def kill() -> None:
        while not log.exists():
            if over.wait(0.02):
                return
        running = {one: " ".join(one.cmdline()) for one in psutil.Process().children(recursive=True)}
        for kind in ("PrimaryHost", "AuxiliaryHost", "ScorerHost"):
            next(one for one, name in running.items() if name.startswith(f"ray::{kind}")).kill()
            killed.append(kind)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        done = run({**config, "calibration": True, "baselines": True}, folder)
    finally:
        over.set()
        thread.join()
    assert killed == ["PrimaryHost", "AuxiliaryHost", "ScorerHost"]
    assert done.facts["failures"] == both.facts["failures"] == 1  # the question that is too long for the primary
    apart = 0
    for row, other in zip(rows_of(done.folder), rows_of(both.folder), strict=True):
        if [row[name] for name in EXACT] != [other[name] for name in EXACT]:
            apart += 1
            continue
        assert row["draft_confidence"] == pytest.approx(other["draft_confidence"], abs=1e-5)
    assert apart <= 1, "batches form as questions come: of some 2,000 tokens one may be a toss-up, but no more"
    asked = Counter(line.split("\t")[1] for line in log.read_text().splitlines() if line.startswith("predictions"))
    assert asked == {"0": 1}


def test_three_models_of_one_cpu_need_three_cpus_and_the_dry_run_says_what_would_be_asked(
    config: Values, ensemble: Values
) -> None:
    from stitch_ray.ensemble.batch.pools import needed_resources

    assert needed_resources(validate(EnsembleConfig, ensemble, "ensemble")) == {"CPU": 3.0}
    assert ray.cluster_resources()["CPU"] == 4
    text = estimate.describe(preflight.check(as_config({**config, "calibration": True}, PredictConfig)))
    assert f"primary: {QUESTIONS + 1} questions" in text
    assert "every answer, anna and ben in at most 2 turns" in text


@pytest.mark.slow
def test_the_route_exclude_asks_again_and_a_policy_is_calibrated_on_it(
    config: Values, ensemble: Values, primary: Path, tmp_path: Path
) -> None:
    """The primary itself answers again and judges, as a merged adapter would."""
    again = {"model": {"path": str(primary), "name": "again", "dtype": "float32"}}
    exclude = {"max_attempts": 2, "max_tokens": 6, "temperatures": [0.8], "threshold": 0.0}
    changed = {**ensemble, "auxiliaries": [again], "route": "exclude", "exclude": exclude}
    values = {**config, "ensemble": changed, "calibration": True}
    found = run({**values, "data": {**config["data"], "limit": 40}}, tmp_path / "run")
    rows = rows_of(found.folder)
    refined = [row for row in rows if row["refined"] is not None]
    assert refined
    for row in refined:
        turns = [one for one in json.loads(row["trace"]) if one["stage"] == "turn"]
        assert turns[-1]["probability"] is not None
        assert row["route"] == "exclude"
        assert row["refined"].strip().lower() != row["draft"].strip().lower()
        assert row["final_confidence"] is not None
    failed = [row for row in rows if row["refined"] is None]
    assert all(row["final_confidence"] is None for row in failed)
    calibrating = {
        "predictions": [str(found.folder)],
        "route": "exclude",
        "targets": [{"risk": 0.5, "delta": 0.2}],
        "evaluation": {"bootstrap": 20},
    }
    made = run_job("calibrate", as_config(calibrating, CalibrateConfig), tmp_path / "policy").folder
    assert str(Policy.load(made).fingerprints.route).startswith("exclude:")
    fails("with route: dialogue only", {**values, "baselines": True})

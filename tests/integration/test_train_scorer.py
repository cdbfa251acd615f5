"""`train-scorer` and `calibrate` on one file of answers: what is learned, measured, written, promised and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from stitch_ray.api import as_config, run_job
from stitch_ray.cli import app
from stitch_ray.config import CalibrateConfig, TrainScorerConfig
from stitch_ray.data.trained_on import read_trained_on
from stitch_ray.errors import UserError
from stitch_ray.records import question_group
from stitch_ray.reliability.policy import Policy
from stitch_ray.reliability.scorer.file import ScorerFile
from stitch_ray.runs import Summary
from tests.encoders import WORDS, make_tokenizer
from tests.page import Page

pytestmark = pytest.mark.ray

Row = dict[str, Any]
CITIES = {"Paris", "Rome", "Oslo"}


def made(count: int, seed: int = 0, kind: str = "greedy") -> list[Row]:
    """An answer with a city in it is mostly right; a hint that nothing in the text tells is right in most cases too."""
    draw = Random(seed)
    rows = []
    for number in range(count):
        question = " ".join(draw.choices(WORDS[:12], k=draw.randint(4, 8))) + f" {seed}-{number} ?"
        answer = draw.choice(sorted(CITIES) if draw.random() < 0.5 else ["Homer", "Bach", "book"])
        odds = (2.5 if answer in CITIES else -2.5) + (hint := draw.choice([-1.5, 1.5]))
        correct = bool(draw.random() < 1 / (1 + np.exp(-odds)))
        rows.append({"question": question, "answer": answer, "correct": correct, "kind": kind, "p_true": hint + 5})
    return rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "bert"
    tokenizer = make_tokenizer("bert")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    transformers.BertModel(
        transformers.BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **sizes)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Row]], str]:
    folder = tmp_path_factory.mktemp("answers")

    def write_rows(rows: list[Row]) -> str:
        file = folder / f"{len(list(folder.iterdir()))}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(file)

    return write_rows


def values(base: Path, *files: str, **more: Any) -> Row:
    return {
        "answers": list(files),
        "encoder": {"path": str(base), "max_length": 32},
        "signals": ["p_true"],
        "training": {"epochs": 3, "batch": 16, "learning_rate": 4e-3, "eval_every": 20},
        "evaluation": {"bootstrap": 200},
        **more,
    }


def train(config: Row, out: Path) -> Summary:
    return run_job("train-scorer", as_config(config, TrainScorerConfig), out)


@pytest.fixture(scope="module")
def reference(
    ray_cluster: object, base: Path, write: Callable[[list[Row]], str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Summary, str, list[Row]]:
    """A run with an encoder, a signal and a further test set that shares questions with the answers."""
    rows = made(1200)
    rows += [
        {**rows[0], "answer": "a sample", "kind": "sample"},
        {"question": "unlabelled ?", "answer": "x", "kind": "greedy"},
        {"question": "", "answer": "bad"},
        {**rows[1], "question": "who " * 40, "answer": "long"},
    ]
    file = write(rows)
    people = write([*made(150, seed=7), *rows[:100]])
    config = values(base, file, tests=[{"name": "people", "answers": [people]}])
    return train(config, tmp_path_factory.mktemp("runs") / "scorer"), file, rows


def metric(summary: Summary, test: str, name: str, key: str) -> Any:
    found = json.loads((summary.folder / "metrics.json").read_text("utf-8"))[test]
    return next(row for row in found["rows"] if row["name"] == name)["metrics"][key]


def test_encoder_and_signal_together_beat_each_alone_and_every_baseline(
    reference: tuple[Summary, str, list[Row]],
) -> None:
    summary, _, _ = reference
    auroc = {
        name: metric(summary, "test", name, "auroc")["value"]
        for name in ("scorer", "stack", "encoder", "p_true", "random", "answer_length")
    }
    # An encoder that knows the cities has 0.86, the hint alone 0.63, both 0.92; of 180 answers each is known to 0.04.
    assert auroc["encoder"] > 0.7
    assert auroc["stack"] > auroc["encoder"]
    assert auroc["stack"] > auroc["p_true"] + 0.1
    assert auroc["stack"] > auroc["random"] + 0.2
    assert abs(auroc["scorer"] - auroc["stack"]) < 0.03
    assert metric(summary, "test", "scorer", "brier")["value"] < 0.2
    assert "p_true" in summary.text
    assert f"AUROC {auroc['scorer']:.3f}" in summary.line


def test_rows_add_up_and_what_cannot_be_used_is_told(reference: tuple[Summary, str, list[Row]]) -> None:
    summary, _, rows = reference
    facts = summary.facts
    assert facts["rows_in"] == len(rows)
    assert facts["rows_quarantined"] == 2
    reasons = [json.loads(line)["reason"] for line in (summary.folder / "quarantine.jsonl").open(encoding="utf-8")]
    assert any("empty question" in reason for reason in reasons)
    assert any("tokens" in reason for reason in reasons)
    assert facts["rows_dropped"]["not labelled"] == 1
    splits = facts["splits"]
    assert sum(split["answers"] for split in splits.values()) == facts["rows_out"]
    assert splits["calibrate"]["answers"] > splits["test"]["answers"] > splits["stack"]["answers"] / 2 > 0


def test_the_questions_it_learned_from_are_noted_and_those_for_the_threshold_are_not_among_them(
    reference: tuple[Summary, str, list[Row]],
) -> None:
    summary, _, _ = reference
    scores = pq.read_table(summary.folder / "scores.parquet").to_pylist()
    learned = read_trained_on(summary.folder)
    for row in scores:
        assert (row["group_id"] in learned) == (row["split"] in ("stack", "isotonic")), row["split"]
    assert len(learned) > 500


def test_scores_are_those_of_the_metrics_and_of_the_written_scorer(reference: tuple[Summary, str, list[Row]]) -> None:
    summary, _, _ = reference
    test = [row for row in pq.read_table(summary.folder / "scores.parquet").to_pylist() if row["split"] == "test"]
    found = roc_auc_score([row["correct"] for row in test], [row["stack"] for row in test])
    assert found == pytest.approx(metric(summary, "test", "stack", "auroc")["value"], abs=1e-9)
    scorer = ScorerFile.load(summary.folder)
    assert scorer.signals == ("p_true",)
    assert scorer.fingerprint == summary.facts["scorer"]
    weights = {one["name"]: one["coef"] for one in scorer.weights()}
    assert weights["p_true"] > 0.2
    assert weights["encoder"] > 0.2


def test_a_further_test_set_leaves_out_questions_that_were_learned_from(
    reference: tuple[Summary, str, list[Row]],
) -> None:
    summary, _, rows = reference
    people = json.loads((summary.folder / "metrics.json").read_text("utf-8"))["people"]
    learned = read_trained_on(summary.folder)
    fresh = [row for row in rows[:100] if question_group(row["question"], None) not in learned]
    assert people["answers"] == 150 + len(fresh)
    assert people["learned_from"] == 100 - len(fresh) > 0
    assert 0.5 <= people["majority"] <= 1


def test_the_report_shows_scores_splits_and_training(reference: tuple[Summary, str, list[Row]]) -> None:
    summary, _, _ = reference
    text = Page((summary.folder / "report.html").read_text("utf-8")).text
    for words in ("people", "calibrate", "Risk against coverage", "Quarantine", "p true"):
        assert words in text


@pytest.mark.resume
def test_again_nothing_is_trained_and_another_signal_set_only_stacks_anew(
    reference: tuple[Summary, str, list[Row]], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary, file, _ = reference
    before = (summary.folder / "scorer.json").read_bytes()
    log = tmp_path / "steps"
    monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(log))
    train(values(base, file), summary.folder)
    assert (summary.folder / "scorer.json").read_bytes() == before
    train(values(base, file, signals=[]), summary.folder)
    assert ScorerFile.load(summary.folder).signals == ()
    train(values(base, file), summary.folder)
    assert (summary.folder / "scorer.json").read_bytes() == before
    assert not log.exists()
    with pytest.raises(UserError, match=r"made with other settings .*training"):
        train(values(base, file, training={"epochs": 4}), summary.folder)


def test_the_scorer_calibrates_a_promise_that_fresh_answers_keep(
    reference: tuple[Summary, str, list[Row]], write: Callable[[list[Row]], str], tmp_path: Path
) -> None:
    summary, file, rows = reference
    config = {"answers": [file], "scorer": str(summary.folder), "targets": [{"risk": 0.2}, {"risk": 0.01}]}
    found = run_job("calibrate", as_config(config, CalibrateConfig), tmp_path / "policy")
    policy = Policy.load(tmp_path / "policy" / "policy.json")
    assert policy.fingerprints.scorer == summary.facts["scorer"]
    assert policy.target().threshold is not None
    assert policy.target(target_risk=0.01).threshold is None
    check = json.loads((found.folder / "metrics.json").read_text("utf-8"))["targets"][0]["test"]
    assert check["held"]
    assert check["answered"] > 30
    assert "held" in found.line
    learned = write([row for row in rows if question_group(row["question"], None) in read_trained_on(summary.folder)])
    shares = {"train": 0, "stack": 0, "isotonic": 0.2, "calibrate": 0.5, "test": 0.3}
    cheating = {**config, "answers": [learned], "split": shares}
    with pytest.raises(UserError, match="has learned from"):
        run_job("calibrate", as_config(cheating, CalibrateConfig), tmp_path / "cheating")
    assert not (tmp_path / "cheating").exists()


def test_signals_alone_need_no_encoder(ray_cluster: object, write: Callable[[list[Row]], str], tmp_path: Path) -> None:
    config = {"answers": [write(made(400, seed=3))], "signals": ["p_true"], "evaluation": {"bootstrap": 50}}
    summary = train(config, tmp_path / "run")
    assert not (summary.folder / "model").exists()
    assert metric(summary, "test", "scorer", "auroc")["value"] > 0.55
    assert summary.facts["encoder"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {**row, "correct": True}, "split stack: .* 0 wrong"),
        (lambda row: {key: value for key, value in row.items() if key != "correct"}, "none has a label"),
        (lambda row: {key: value for key, value in row.items() if key != "p_true"}, "p_true is in none of the answers"),
    ],
)
def test_answers_that_no_scorer_can_be_made_of_are_refused_and_leave_no_folder(
    ray_cluster: object,
    write: Callable[[list[Row]], str],
    tmp_path: Path,
    change: Callable[[Row], Row],
    message: str,
) -> None:
    file = write([change(row) for row in made(200, seed=4)])
    with pytest.raises(UserError, match=message):
        train({"answers": [file], "signals": ["p_true"]}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_command_says_what_it_would_do_and_refuses_with_exit_2(
    base: Path, write: Callable[[list[Row]], str], tmp_path: Path
) -> None:
    file = write(made(100, seed=5))
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(values(base, file)), encoding="utf-8")
    told = CliRunner().invoke(app, ["train-scorer", str(config), "--dry-run"])
    assert told.exit_code == 0, told.output
    assert "read   100 answers" in told.output
    assert "stack  encoder, p_true" in told.output
    wrong = CliRunner().invoke(app, ["train-scorer", str(config), "--set", "encoder.max_length=4000"])
    assert wrong.exit_code == 2
    assert "encoder.max_length: 4000 exceeds the 48 tokens" in wrong.output
    absent = CliRunner().invoke(app, ["train-scorer", str(config), "--set", "encoder.path=no/such"])
    assert absent.exit_code == 2
    assert "encoder.path: no/such" in absent.output

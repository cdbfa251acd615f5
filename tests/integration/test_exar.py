"""The EXAR chain on real models: what every stage leaves behind, what no stage sees, kills, resume and refusals."""

from __future__ import annotations

import json
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import yaml

from stitch_ray.api import as_config, describe, run_job
from stitch_ray.config import CONFIGS
from stitch_ray.data import formats, readers
from stitch_ray.data.trained_on import read_trained_on, write_trained_on
from stitch_ray.errors import UserError
from stitch_ray.exclusion.labelling import label_files
from stitch_ray.records import question_group
from stitch_ray.runs import Summary
from stitch_ray.training.tiny import make_tiny_model
from tests.unit.test_engine_adapters import make_adapter

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

Values = dict[str, Any]
QUESTIONS = 150


def parities(count: int, start: int = 0) -> list[Values]:
    """Questions that a tiny model answers in the right form, and rightly half of the time."""
    return [
        {"question": f"Is {n} even or odd?", "answer": "odd" if n % 2 else "even"} for n in range(start, start + count)
    ]


def write_lines(path: Path, rows: list[Values]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(job: str, config: Values, out: Path) -> Summary:
    return run_job(job, as_config(config, CONFIGS[job]), out)


def rows_of(folder: Path, name: str = "refined.parquet") -> list[Values]:
    return pq.read_table(folder / name).to_pylist()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Among the questions one that is too long for the model, and a row that is none."""
    rows = [*parities(QUESTIONS), {"question": "why? " * 3000, "answer": "so"}, {"question": "", "answer": "so"}]
    return write_lines(tmp_path_factory.mktemp("data") / "parities.jsonl", rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that answers "even" or "odd", and knows not which."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    file = write_lines(folder.with_name("rows.jsonl"), parities(60, start=1000))
    examples = [formats.convert(row) for row in readers.iter_rows(str(file))]
    make_tiny_model(examples, folder, parameters="300k", steps=45, seed=0)
    return folder


@pytest.fixture(scope="module")
def refining(data: Path, model: Path) -> Values:
    """A refinement of all questions whose validator is the untrained model: nobody knows what it accepts."""
    return {
        "data": {"paths": [str(data)]},
        "model": {"path": str(model), "name": "tiny"},
        "attempts": {"max_attempts": 3, "max_tokens": 6, "temperatures": [0.0, 0.8]},
        "questions": "all",
    }


@pytest.fixture(scope="module")
def refined(ray_cluster: object, refining: Values, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return run("exar-refine", refining, tmp_path_factory.mktemp("refined") / "run")


@pytest.fixture(scope="module")
def chain(ray_cluster: object, data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """The whole chain, with LoRA adapters for the validator and the EXAR model on a fully tuned stage zero."""
    tuning = {"epochs": 3, "max_length": 128, "batch": {"tokens": 512}, "optimizer": {"learning_rate": 0.003}}
    lora = {**tuning, "epochs": 6, "method": "lora", "adapter": {"rank": 4, "alpha": 16}}
    config = {
        "data": {"paths": [str(data)]},
        "model": {"path": str(model)},
        "stage_zero": tuning,
        "predictions": {"temperatures": [1.2], "top_p": 1.0},
        "validator": lora,
        "exar": lora,
        "attempts": {"max_attempts": 3, "max_tokens": 6, "temperatures": [0.0, 0.8]},
        "controls": ["oracle"],
        "samples": 4,
    }
    return run("exar-run", config, tmp_path_factory.mktemp("chain") / "run")


@pytest.mark.slow
def test_no_stage_learns_from_the_questions_that_it_is_measured_on(chain: Summary) -> None:
    stages = chain.folder / "stages"
    asked = {row["group_id"] for row in rows_of(stages / "refine")}
    plus = {row["group_id"] for row in rows_of(stages / "plus", "dataset_plus.parquet")}
    zero = read_trained_on(stages / "stage-zero" / "model")
    assert zero
    assert asked
    assert plus
    assert not (asked & plus)
    assert not (asked & zero)
    assert not (plus & zero)
    for name in ("validator", "exar"):  # what their base has learned from counts as well
        learned = read_trained_on(stages / name / "model")
        assert zero < learned <= plus | zero
    assert chain.facts["rows_in"] == QUESTIONS + 2
    assert chain.facts["rows_quarantined"] == 1


@pytest.mark.slow
def test_two_adapters_on_one_base_and_controls_that_hold_what_they_say(chain: Summary) -> None:
    stages = chain.folder / "stages"
    work = json.loads((stages / "refine" / "manifest.json").read_text())["work"]
    assert {"answer", "validator"} <= work["adapters"].keys()
    named = {row["name"]: row for row in chain.facts["systems"]}
    assert named["oracle"]["selective"] in (1.0, None)
    assert named["oracle"]["accuracy"] >= named["refined"]["accuracy"]
    assert named["first answer"]["calls"] == 1.0
    assert any(name.startswith("majority of") for name in named)
    assert chain.facts["validator"]["num"] > 0
    metrics = json.loads((chain.folder / "metrics.json").read_text())
    assert metrics["systems"] == chain.facts["systems"]
    page = (chain.folder / "report.html").read_text()
    assert "What calls buy" in page


@pytest.mark.slow
def test_a_wrong_answer_is_excluded_and_the_other_one_of_two_is_right(chain: Summary) -> None:
    """Under an oracle, whatever the EXAR model has learned."""
    rows = rows_of(chain.folder / "stages" / "refine-oracle", "attempts.parquet")
    first = {row["example_id"]: row for row in rows if row["number"] == 0}
    second = [row for row in rows if row["number"] == 1]
    assert len(second) == sum(not row["correct"] for row in first.values()) > 0
    both = [(first[row["example_id"]]["answer"], row["answer"]) for row in second]
    turned = [row for row, said in zip(second, both, strict=True) if set(said) == {"even", "odd"}]
    assert turned
    assert all(row["correct"] and row["checked"] != "repeated" for row in turned)


@pytest.mark.slow
def test_the_same_chain_does_nothing_twice(chain: Summary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "calls"
    monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(log))
    config = yaml.safe_load((chain.folder / "config.yaml").read_text())
    before = (chain.folder / "metrics.json").read_bytes()
    run("exar-run", config, chain.folder)
    assert not log.exists()
    assert (chain.folder / "metrics.json").read_bytes() == before


@pytest.mark.slow
def test_a_changed_setting_does_again_what_depends_on_it(chain: Summary) -> None:
    """Last of the tests of the chain: its folder is another one afterwards."""
    folder = chain.folder
    config = yaml.safe_load((folder / "config.yaml").read_text()) | {"threshold": 0.97}
    with pytest.raises(UserError, match=r"other settings \(threshold\).* do again what depends on them"):
        run("exar-run", config, folder)
    stages = folder / "stages"
    before = {path.parent.name: path.read_bytes() for path in stages.glob("*/manifest.json")}
    run_job("exar-run", as_config(config, CONFIGS["exar-run"]), folder, overwrite=True)
    after = {path.parent.name: path.read_bytes() for path in stages.glob("*/manifest.json")}
    assert {name for name in after if after[name] != before[name]} == {"refine", "refine-oracle", "evaluate"}
    assert json.loads(after["refine"])["work"]["validator"]["threshold"] == 0.97
    assert yaml.safe_load((folder / "config.yaml").read_text())["threshold"] == 0.97


def test_every_question_ends_in_a_judged_answer_or_an_abstention(refined: Summary) -> None:
    rows = rows_of(refined.folder)
    attempts: dict[str, list[Values]] = {}
    for attempt in rows_of(refined.folder, "attempts.parquet"):
        attempts.setdefault(attempt["example_id"], []).append(attempt)
    assert len(rows) == QUESTIONS
    for row in rows:
        own = attempts[row["example_id"]]
        assert [one["number"] for one in own] == list(range(row["attempts"]))
        assert row["calls"] == len(own) + sum(one["checked"] == "judged" for one in own)
        assert row["tokens"] == sum(one["tokens"] + one["validator_tokens"] for one in own)
        if row["decision"] == "answer":
            assert (row["answer"], row["confidence"]) == (own[-1]["answer"], own[-1]["probability"])
            assert row["confidence"] >= 0.5
        else:
            assert len(own) == 3
            assert all((one["probability"] or 0.0) < 0.5 for one in own)
    quarantined = [json.loads(line) for line in (refined.folder / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(row["line"] for row in quarantined) == [QUESTIONS + 1, QUESTIONS + 2]
    assert (refined.facts["rows_in"], refined.facts["rows_out"]) == (QUESTIONS + 2, QUESTIONS)


@pytest.mark.resume
def test_a_killed_worker_and_a_lost_file_change_no_byte(
    refined: Summary, refining: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(refined.folder, tmp_path / "run"))
    for batch in ("000001", "000003"):
        (folder / "work" / "results" / f"{batch}.parquet").unlink()
    log = tmp_path / "calls"
    monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(log))
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        while not log.exists():
            if over.wait(0.01):
                return
        for one in psutil.Process().children(recursive=True):
            if "Refiner" in " ".join(one.cmdline()):
                one.kill()
                killed.append(one.pid)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        run("exar-refine", refining, folder)
    finally:
        over.set()
        thread.join()
    assert killed
    for name in ("refined.parquet", "attempts.parquet"):
        assert (folder / name).read_bytes() == (refined.folder / name).read_bytes()
    assert Counter(line.split("\t")[1] for line in log.read_text().splitlines()).keys() == {"1", "3"}


@pytest.mark.slow
def test_one_concatenated_adapter_does_what_both_do(chain: Summary, refining: Values, tmp_path: Path) -> None:
    """With weights (1, 0) it answers as the first alone; the validator's prompt then asks the answering adapter."""
    stages = chain.folder / "stages"
    base, answer = str(stages / "stage-zero" / "model"), str(stages / "exar" / "model")
    both = {"answer": answer, "validator": str(stages / "validator" / "model"), "combine": "cat", "weights": [1.0, 0.0]}
    common = {**refining, "model": {"path": base}, "attempts": {"max_attempts": 1, "max_tokens": 6}}
    alone = run("exar-refine", {**common, "adapters": {"answer": answer}}, tmp_path / "alone")
    joined = run("exar-refine", {**common, "adapters": both}, tmp_path / "joined")
    ours, theirs = ([row["first"] for row in rows_of(one.folder)] for one in (joined, alone))
    other = sum(one != two for one, two in zip(ours, theirs, strict=True))
    assert other <= QUESTIONS // 50, "more than toss-ups between even and odd, which the rounding of more ranks decides"


def test_questions_that_a_model_learned_from_are_refused(
    refining: Values, model: Path, refined: Summary, tmp_path: Path
) -> None:
    trained = Path(shutil.copytree(model, tmp_path / "model"))
    write_trained_on(trained, [row["group_id"] for row in rows_of(refined.folder)][:5])
    config = {**refining, "model": {"path": str(trained), "name": "tiny"}, "validator": {"kind": "random"}}
    assert "5 of which were trained on" in describe("exar-refine", as_config(config, CONFIGS["exar-refine"]))
    found = run("exar-refine", config, tmp_path / "run")
    assert found.facts["trained_on"] == 5
    with pytest.raises(UserError, match=r"5 of the 150 questions .* a model has learned from"):
        run("exar-evaluate", {"refine": str(found.folder)}, tmp_path / "evaluated")
    counted = run("exar-evaluate", {"refine": str(found.folder), "trained_on": "count"}, tmp_path / "counted")
    assert "5 of 150 questions" in " ".join(counted.facts["notes"])


@pytest.mark.parametrize("role", ["answer", "validator"])
def test_questions_that_only_an_adapter_learned_from_are_counted(
    refining: Values, model: Path, tmp_path: Path, role: str
) -> None:
    adapter = make_adapter(model, tmp_path / "adapter", " odd", steps=0)
    write_trained_on(Path(adapter), [question_group(row["question"], None) for row in parities(7)])
    config = {**refining, "adapters": {role: adapter}}
    if role == "answer":
        config["validator"] = {"kind": "random"}
    assert "7 of which were trained on" in describe("exar-refine", as_config(config, CONFIGS["exar-refine"]))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"adapters": {"answer": "{model}"}}, "adapters.answer: .* no adapter in this folder"),
        ({"validator": {"kind": "scorer", "scorer": "{model}"}}, "scorer"),
        ({"data": {"paths": ["{model}/missing.jsonl"]}}, "missing.jsonl: no such file"),
        ({"attempts": {"max_tokens": 100_000}}, "attempts.max_tokens: 100000 leaves no room"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_made(
    refining: Values, model: Path, tmp_path: Path, change: Values, problem: str
) -> None:
    filled = json.loads(json.dumps(change).replace("{model}", str(model)))
    with pytest.raises(UserError, match=problem):
        run("exar-refine", {**refining, **filled}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_runs_of_other_questions_are_not_compared(refined: Summary, refining: Values, tmp_path: Path) -> None:
    other = run("exar-refine", {**refining, "questions": "test", "validator": {"kind": "random"}}, tmp_path / "other")
    with pytest.raises(UserError, match=r"controls.random: .* is of other questions"):
        run("exar-evaluate", {"refine": str(refined.folder), "controls": {"random": str(other.folder)}}, tmp_path / "e")
    with pytest.raises(UserError, match="is no finished run of exar refine"):
        run("exar-evaluate", {"refine": str(tmp_path)}, tmp_path / "e")


def test_a_validator_is_measured_on_answers_that_it_has_not_learned_from(model: Path, tmp_path: Path) -> None:
    rows = [
        {**row, "gold": row["answer"], "prediction": answer, "human": "CORRECT" if answer == row["answer"] else "WRONG"}
        for row in parities(40)
        for answer in ("even", "odd")
    ]
    rows.append({**rows[0], "prediction": ""})
    answers = write_lines(tmp_path / "answers.jsonl", [{k: v for k, v in row.items() if k != "answer"} for row in rows])
    label_files([str(answers)], tmp_path / "labels", without_bert=True)
    judge = Path(shutil.copytree(model, tmp_path / "judge"))
    write_trained_on(judge, [question_group(f"Is {n} even or odd?", None) for n in range(5)])
    config = {"answers": [str(tmp_path / "labels")], "model": {"path": str(judge)}, "bootstrap": 20}
    found = run("exar-judge", config, tmp_path / "run")
    assert found.facts["rows_dropped"] == {"answers to questions that the model learned from": 11}
    verdicts = rows_of(found.folder, "verdicts.parquet")
    assert len(verdicts) == 70
    assert all(0 <= row["probability"] <= 1 and row["reply"] is not None for row in verdicts)
    for truth in ("label", "human"):
        one = found.facts["metrics"][truth]
        assert (one["num"], one["majority"]) == (70, 0.5)
        assert one["replies"]["unparsable"] == 70  # it knows no word but even and odd
        assert one["within_questions"]["questions"] == 35
    page = (found.folder / "report.html").read_text()
    assert page.index("Against people") < page.index("Against the rule") < page.index("Surest mistakes")
    assert page.count("<svg") == 4

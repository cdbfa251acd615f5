"""`sample-answers` end to end: what a run leaves behind, what it does not do twice, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from stitch_ray.api import as_config, run_job
from stitch_ray.config.sample_answers import SampleAnswersConfig
from stitch_ray.data import formats, readers
from stitch_ray.data.trained_on import write_trained_on
from stitch_ray.errors import UserError
from stitch_ray.evaluation.answers import exact_match
from stitch_ray.records import ANSWER_SCHEMA, question_group
from stitch_ray.reliability.answers import estimate, preflight
from stitch_ray.reliability.tables import read_answers
from stitch_ray.runs import Summary
from stitch_ray.training.tiny import make_tiny_model
from tests.fake_endpoint import Fault, serving

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

Values = dict[str, Any]
RESULTS = ("answers.parquet", "signals.parquet", "references.parquet", "plan.parquet")
QUESTIONS = 70
TOKEN_SIGNALS = ["sequence_log_probability", "perplexity", "mean_token_entropy", "mean_token_margin"]


GOLD = "neither, said the unmistakable reference"


def parities(count: int) -> list[dict[str, Any]]:
    """Questions that a tiny model answers in the right form, and rightly half of the time."""
    return [{"question": f"Is {n} even or odd?", "answer": "odd" if n % 2 else "even"} for n in range(count)]


def write_lines(path: Path, rows: Sequence[dict[str, Any] | str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def local(data: Path, model: Path, /, **sections: Any) -> Values:
    """A configuration that samples from a local model."""
    values = {
        "data": {"paths": [str(data)]},
        "model": {"path": str(model), "name": "tiny"},
        "samples": {"num": 2, "max_tokens": 6},
    }
    return {**values, **sections}


def remote(data: Path, url: str, /, **sections: Any) -> Values:
    """A configuration that asks a server, without waiting for what does not come."""
    endpoint = {"url": url, "model": "fake", "max_retries": 1, "timeout_s": 5, "concurrency": 8}
    values = local(data, data, **sections)
    del values["model"]
    return {**values, "endpoint": {**endpoint, **sections.get("endpoint", {})}}


def run(config: Values, out: Path) -> Summary:
    return run_job("sample-answers", as_config(config, SampleAnswersConfig), out)


def results(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in RESULTS if (folder / name).exists()}


def answers_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "answers.parquet").to_pylist()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 questions, one of them twice with another reference, one too long for the model, and a row that is none."""
    rows: list[dict[str, Any] | str] = [*parities(QUESTIONS)]
    rows += [{"question": " is 7 even  or odd?", "answer": GOLD}, {"question": "why? " * 2000, "answer": "so"}, "{no"]
    return write_lines(tmp_path_factory.mktemp("data") / "parities.jsonl", rows)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learned to answer "even" or "odd", and not which."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    file = write_lines(folder.with_name("rows.jsonl"), parities(QUESTIONS))
    examples = [formats.convert(row) for row in readers.iter_rows(str(file))]
    make_tiny_model(examples, folder, parameters="300k", steps=45, seed=0)
    return folder


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The audit of what was done for which batch."""
    log = tmp_path / "calls.log"
    monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(log))
    return log


def take(log: Path) -> Counter[str]:
    """Rows by stage since the last look."""
    counts: Counter[str] = Counter()
    for line in log.read_text().splitlines() if log.exists() else []:
        stage, _, rows = line.split("\t")
        counts[stage] += int(rows)
    log.unlink(missing_ok=True)
    return counts


@pytest.fixture(scope="module")
def finished(
    ray_cluster: object, tmp_path_factory: pytest.TempPathFactory, data: Path, model: Path
) -> tuple[Values, Path]:
    """A finished run with signals. Not to be changed: copy it."""
    names = [*TOKEN_SIGNALS, "self_consistency", "semantic_entropy", "answer_length", "p_true"]
    config = local(data, model, signals={"names": names})
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(config, folder)
    return config, folder


@pytest.fixture
def copy(finished: tuple[Values, Path], tmp_path: Path) -> tuple[Values, Path]:
    config, folder = finished
    return json.loads(json.dumps(config)), shutil.copytree(folder, tmp_path / "run")


# What a run leaves behind


def test_folder_holds_answers_signals_and_references_by_id(finished: tuple[Values, Path]) -> None:
    _, folder = finished
    answers = pq.read_table(folder / "answers.parquet")
    assert answers.schema.equals(ANSWER_SCHEMA)
    ids = answers["answer_id"].to_pylist()
    assert ids == sorted(set(ids))
    assert Counter(answers["kind"].to_pylist()) == {"greedy": QUESTIONS, "sample": 2 * QUESTIONS}
    assert set(ids) == {
        f"{example}/{kind}"
        for example in answers["example_id"].to_pylist()
        for kind in ("greedy-0", "sample-0", "sample-1")
    }
    signals = pq.read_table(folder / "signals.parquet")
    assert signals["answer_id"].to_pylist() == ids
    assert {str(kind) for kind in signals.schema.types[1:]} == {"double"}
    references = pq.read_table(folder / "references.parquet").to_pylist()
    assert {row["example_id"] for row in references} == set(answers["example_id"].to_pylist())
    assert (folder / "report.html").exists()
    plan = pq.read_table(folder / "plan.parquet")
    assert len(set(plan["batch_id"].to_pylist())) == 3


def test_manifest_counts_every_row_and_quarantine_says_why(finished: tuple[Values, Path], data: Path) -> None:
    _, folder = finished
    manifest = json.loads((folder / "manifest.json").read_text())
    wanted = {"rows_in": 73, "rows_out": 70, "rows_quarantined": 2, "rows_dropped": {"question asked twice": 1}}
    assert {key: manifest[key] for key in wanted} == wanted
    assert (manifest["status"], manifest["records_written"], manifest["failures"]) == ("done", 210, 1)
    assert sum(split["questions"] for split in manifest["splits"].values()) == 70
    told = [json.loads(line) for line in (folder / "quarantine.jsonl").open()]
    assert [(row["line"], row["source"]) for row in told] == [(72, str(data)), (73, str(data))]
    assert "prompt tokens" in told[0]["reason"]
    greedy = manifest["kinds"]["greedy"]
    right = [row["correct"] for row in answers_of(folder) if row["kind"] == "greedy"]
    assert greedy["labelled"] == 70
    assert greedy["correct"] == pytest.approx(sum(right) / len(right))
    assert manifest["tokens"] > 0


def test_gold_stands_in_the_references_only(finished: tuple[Values, Path]) -> None:
    _, folder = finished
    references = {
        row["example_id"]: row["references"] for row in pq.read_table(folder / "references.parquet").to_pylist()
    }
    asked_twice = [name for name, gold in references.items() if GOLD in gold]
    assert len(asked_twice) == 1
    assert sorted(references[asked_twice[0]]) == sorted([GOLD, "odd"])  # those of both rows
    for name in ("answers.parquet", "signals.parquet"):
        assert GOLD not in str(pq.read_table(folder / name).to_pydict())


def test_labels_are_the_best_over_the_references(finished: tuple[Values, Path]) -> None:
    _, folder = finished
    references = {
        row["example_id"]: row["references"] for row in pq.read_table(folder / "references.parquet").to_pylist()
    }
    rows = answers_of(folder)
    for row in rows:
        best = max(exact_match(row["answer"], gold) for gold in references[row["example_id"]])
        assert (row["label"], row["correct"]) == (best, best == 1)
    assert {row["correct"] for row in rows} == {True, False}


def test_signals_are_those_of_the_stored_tokens(finished: tuple[Values, Path]) -> None:
    _, folder = finished
    signals = {row["answer_id"]: row for row in pq.read_table(folder / "signals.parquet").to_pylist()}
    for row in answers_of(folder):
        own, logprobs = signals[row["answer_id"]], np.array(row["logprobs"], np.float64)
        assert len(logprobs) == len(row["entropies"]) == len(row["margins"]) == row["tokens"] == own["answer_length"]
        if not len(logprobs):
            assert own["perplexity"] is None
            continue
        assert own["sequence_log_probability"] == pytest.approx(logprobs.sum())
        assert own["perplexity"] == pytest.approx(np.exp(-logprobs.mean()))
        assert own["mean_token_entropy"] == pytest.approx(np.mean(row["entropies"]))
        assert own["mean_token_margin"] == pytest.approx(np.mean(row["margins"]))
        assert row["answer"].strip() == "" or 0 <= own["p_true"] <= 1


def test_other_jobs_read_the_folder(finished: tuple[Values, Path]) -> None:
    _, folder = finished
    answers = read_answers([str(folder)])
    assert len(answers) == 210
    assert answers.answers_from == json.loads((folder / "manifest.json").read_text())["answers_from"]
    assert set(answers.signals) >= {"perplexity", "semantic_entropy"}
    for question, group in zip(answers.column("question"), answers.column("group_id"), strict=True):
        assert group == question_group(question, None)


# What does not change a result


@pytest.mark.resume
def test_shuffled_files_and_two_actors_give_the_same_bytes(
    finished: tuple[Values, Path], data: Path, tmp_path: Path
) -> None:
    config, folder = finished
    lines = data.read_text().splitlines()[::-1]
    parts = [write_lines(tmp_path / f"{n}.jsonl", lines[n::2]) for n in range(2)]
    other = {**config, "data": {"paths": [str(part) for part in parts]}, "model": {**config["model"], "replicas": 2}}
    run(other, tmp_path / "run")
    assert results(tmp_path / "run") == results(folder)


@pytest.mark.resume
def test_killed_run_resumes_with_the_same_bytes_and_asks_nothing_twice(
    finished: tuple[Values, Path], tmp_path: Path, calls: Path
) -> None:
    import ray

    config, undisturbed = finished
    file, folder = tmp_path / "config.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "jobs.sample_answers", str(file), "--out", str(folder)]
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 240
    while not list((folder / "work").glob("samples/0*.parquet")) and process.poll() is None:
        if time.monotonic() > until:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"
    assert list((folder / "work").glob("samples/0*.parquet")), "the run had not come far enough"
    time.sleep(1)  # Ray ends the actors of a driver that is gone
    first = take(calls)
    run(config, folder)
    assert results(folder) == results(undisturbed)
    second = take(calls)
    assert 0 < second["samples"] < QUESTIONS + 1
    assert first["samples"] + second["samples"] <= QUESTIONS + 1 + 32


@pytest.mark.resume
def test_only_what_is_missing_or_damaged_is_done_again(copy: tuple[Values, Path], calls: Path) -> None:
    config, folder = copy
    before, work = results(folder), folder / "work"
    (work / "samples" / "000001.parquet").write_bytes(b"PAR1 torn")
    next(work.glob("signals-*")).joinpath("000000.parquet").unlink()
    sizes = Counter(pq.read_table(folder / "plan.parquet")["batch_id"].to_pylist())
    batch_of = {row["example_id"]: row["batch_id"] for row in pq.read_table(folder / "plan.parquet").to_pylist()}
    given = Counter(batch_of[row["example_id"]] for row in answers_of(folder))
    run(config, folder)
    assert results(folder) == before
    done = take(calls)
    assert done["samples"] == sizes[1]
    assert done["labels"] == given[1]
    assert done["signals"] == given[0] + given[1]


def test_other_labels_and_shares_ask_no_question_again(
    copy: tuple[Values, Path], model: Path, tmp_path: Path, calls: Path
) -> None:
    config, folder = copy
    before = answers_of(folder)
    config["split"] = {"train": 0.0, "stack": 0.1, "isotonic": 0.1, "calibrate": 0.65, "test": 0.15}
    config["labels"] = {"metric": "token_f1", "threshold": 1.0}
    # The same weights, which now say what they were trained on.
    config["model"]["path"] = str(shutil.copytree(model, tmp_path / "model"))
    groups = [row["group_id"] for row in before]
    write_trained_on(tmp_path / "model", groups[:30])
    manifest = run(config, folder).facts
    assert take(calls) == {"labels": 210}
    after = answers_of(folder)
    assert [row["answer"] for row in after] == [row["answer"] for row in before]
    assert {row["split"] for row in after} <= {"stack", "isotonic", "calibrate", "test"}
    assert sum(manifest["trained_on"].values()) == len(set(groups[:30]))
    assert "was trained on questions" in (folder / "report.html").read_text()
    config["labels"]["threshold"] = 0.5
    run(config, folder)
    assert take(calls) == {}


def test_other_samples_are_refused(copy: tuple[Values, Path]) -> None:
    config, folder = copy
    config["samples"]["temperature"] = 0.5
    before = results(folder)
    with pytest.raises(UserError, match=r"samples\.temperature"):
        run(config, folder)
    assert results(folder) == before


# A server


def even(text: str) -> str:
    return "" if " 3 " in text else "even"


def test_server_answers_and_what_it_withholds_is_quarantined_and_asked_again(tmp_path: Path, calls: Path) -> None:
    def answer(body: dict[str, Any], number: int) -> str | dict[str, Any]:
        text = body["messages"][-1]["content"]
        if " 5 " in text and withheld:
            return {"finish_reason": "content_filter", "message": {"role": "assistant", "content": ""}}
        return f"{even(text)} {number}" if body["temperature"] else even(text)

    withheld = True
    data = write_lines(tmp_path / "data.jsonl", parities(10))
    names = ["sequence_log_probability", "mean_token_margin", "self_consistency"]
    with serving(answer, faults=[Fault(), Fault(status=503), Fault(truncated=True)]) as server:
        config = remote(data, server.url, signals={"names": names})
        manifest = run(config, tmp_path / "run").facts
        assert take(calls) == {"samples": 10, "labels": 27, "signals": 27}
        assert (manifest["rows_out"], manifest["rows_quarantined"]) == (9, 1)
        assert "withheld" in (tmp_path / "run" / "quarantine.jsonl").read_text()
        withheld = False
        manifest = run(config, tmp_path / "run").facts
        assert take(calls)["samples"] == 1
        assert (manifest["rows_out"], manifest["rows_quarantined"]) == (10, 0)
    rows = {row["answer_id"].split("/")[1] + row["question"][3]: row for row in answers_of(tmp_path / "run")}
    assert len(rows) == 30
    assert (rows["greedy-04"]["answer"], rows["greedy-04"]["tokens"], rows["greedy-04"]["label"]) == ("even", 1, 1.0)
    assert {rows[f"sample-{n}4"]["answer"] for n in range(2)} == {"even 0", "even 1"}
    assert (rows["greedy-03"]["answer"], rows["greedy-03"]["label"]) == ("", 0.0)  # an empty answer is an answer
    signals = {row["answer_id"]: row for row in pq.read_table(tmp_path / "run" / "signals.parquet").to_pylist()}
    assert signals[rows["greedy-03"]["answer_id"]]["sequence_log_probability"] is None
    assert signals[rows["greedy-04"]["answer_id"]]["sequence_log_probability"] == pytest.approx(np.log(0.7))
    assert signals[rows["greedy-04"]["answer_id"]]["mean_token_margin"] == pytest.approx(0.5)


def test_distractors_come_with_the_train_questions_and_bad_replies_are_counted(tmp_path: Path) -> None:
    asked: Counter[str] = Counter()

    def answer(body: dict[str, Any], number: int) -> str:
        text = body["messages"][-1]["content"]
        if "JSON" not in text:
            return even(text)
        asked[text] += 1
        if '"Is 2 ' in text:
            return "I will not."
        if '"Is 1 ' in text and asked[text] == 1:
            return "Sorry?"
        return '["red", "green", "red"' + ("]" if '"Is 4 ' in text else "")  # most are broken JSON

    data = write_lines(tmp_path / "data.jsonl", parities(6))
    split = {"train": 1.0, "stack": 0, "isotonic": 0, "calibrate": 0, "test": 0}
    with serving(answer) as server:
        sections = {"distractors": {"num": 3, "attempts": 2}, "split": split, "samples": {"num": 0}}
        manifest = run(remote(data, server.url, **sections), tmp_path / "run").facts
    counted = manifest["counted"]["samples"]
    assert (counted["asked"], counted["failed"], counted["retried"]) == (6, 1, 2)
    assert counted["repaired"] == 4
    rows = [row for row in answers_of(tmp_path / "run") if row["kind"] == "distractor"]
    assert Counter(row["answer"] for row in rows) == {"red": 5, "green": 5}  # a repeat within a reply is dropped
    assert {row["label"] for row in rows} == {0.0}
    assert {row["tokens"] for row in rows} == {None}


def test_run_without_answers_fails_and_the_next_one_asks_again(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", parities(4))
    with serving("even", faults=[Fault(), *[Fault(status=400, message="no such model")] * 12]) as server:
        config = remote(data, server.url)
        with pytest.raises(RuntimeError, match="no such model"):
            run(config, tmp_path / "run")
        assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"
        assert not (tmp_path / "run" / "answers.parquet").exists()
        server.faults.clear()
        assert run(config, tmp_path / "run").facts["rows_out"] == 4


# What is refused before a folder is made


def test_unreachable_server_is_refused(tmp_path: Path) -> None:
    with serving() as server:
        url = server.url
    data = write_lines(tmp_path / "data.jsonl", parities(2))
    with pytest.raises(UserError, match=r"endpoint\.url: .* cannot be reached"):
        run(remote(data, url), tmp_path / "run")
    judged = {"labels": {"metric": "judge", "judge": {"url": url, "model": "judge"}}}
    with serving() as server, pytest.raises(UserError, match=r"labels\.judge\.url"):
        run(remote(data, server.url, **judged), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "problem"),
    [
        ({"samples": {"max_tokens": 4096}}, r"samples\.max_tokens: 4096 leaves no room"),
        ({"template": "no/such/file.jinja"}, r"^template: cannot read"),
        ({"labels": {"metric": "bert_score", "encoder": "no/such/folder/at/all"}}, r"labels\.encoder"),
        ({"data": {"paths": ["nowhere.jsonl"]}}, "nowhere"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_work_is_refused(sections: Values, problem: str, data: Path, model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=problem):
        run(local(data, model, **sections), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_signal_that_a_server_cannot_give_is_refused(data: Path) -> None:
    with serving() as server, pytest.raises(UserError, match=r"signals\.names: mean_token_entropy"):
        preflight.check(
            as_config(remote(data, server.url, signals={"names": ["mean_token_entropy"]}), SampleAnswersConfig)
        )


def test_dry_run_counts_questions_and_answers(data: Path, model: Path) -> None:
    ready = preflight.check(as_config(local(data, model), SampleAnswersConfig))
    told = estimate.describe(ready)
    assert "73 rows" in told
    assert "1 that ask the same again" in told
    assert "71 questions, 213 answers, at most 1278 tokens generated" in told

"""`select` end to end: results, reuse of ratings, bad input. Finished runs are made once and copied by the tests."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from ray.data import DataContext
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from stitch_ray.api import as_config, run_job
from stitch_ray.cli import app
from stitch_ray.config import SelectConfig
from stitch_ray.errors import UserError
from stitch_ray.prompts import load_prompts
from stitch_ray.records import PLAN_SCHEMA, RATING_SCHEMA, Turn, content_hash
from stitch_ray.runs import Summary
from stitch_ray.selection.layout import Layout, LayoutName, contents
from stitch_ray.selection.preflight import BUILT_IN_PROMPTS
from stitch_ray.selection.scores import model_score, sentence_score, token_score, weighted_model_score
from tests import needs

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

Values = dict[str, Any]
Record = dict[str, Any]
RESULTS = ("selected.jsonl", "scores.parquet", "plan.parquet", "ratings/*.parquet")
PROMPTS = tuple(load_prompts(None, BUILT_IN_PROMPTS, 5))


def values(data: Path | Sequence[Path], *models: Path, **sections: Values) -> Values:
    """A configuration; models are named a, b, … so that files do not depend on where the model lies."""
    paths = [data] if isinstance(data, Path) else data
    listed = [{"path": str(model), "name": name} for model, name in zip(models, "abc", strict=False)]
    return {**sections, "data": {"paths": [str(path) for path in paths], **sections.get("data", {})}, "models": listed}


def run(config: Values, out: Path, *, overwrite: bool = False) -> Summary:
    return run_job("select", as_config(config, SelectConfig), out, overwrite=overwrite)


def cli(config: Values, folder: Path, *options: str, command: str = "select") -> Any:
    """The command in this process, and so on the session's cluster; `exit_code`, `stdout` and `stderr`."""
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    arguments = [command, *(["select"] if command == "validate" else []), str(file), *options]
    return CliRunner().invoke(app, arguments)


def shell(config: Values, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own, on the session's cluster."""
    import ray

    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    command = [sys.executable, "-m", "jobs.select", str(file), *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def results(folder: Path) -> dict[str, bytes]:
    """The bytes of all result files by name."""
    files = sorted(file for pattern in RESULTS for file in folder.glob(pattern))
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """The bytes and the time of every file below a run folder."""
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def scores_of(folder: Path) -> dict[str, Record]:
    """`scores.parquet` by example id."""
    return {row["example_id"]: row for row in pq.read_table(folder / "scores.parquet").to_pylist()}


def selected_of(folder: Path) -> list[Record]:
    return read_lines(folder / "selected.jsonl")


def read_lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def write_lines(path: Path, rows: Sequence[Record | str]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def ids_of(rows: Sequence[Record]) -> list[str]:
    """Ids of Alpaca rows without an id of their own, by the rule of the documentation: content hash, then -2, -3."""
    seen: dict[str, int] = defaultdict(int)
    found = []
    for row in rows:
        messages = [["user", row["instruction"]], ["assistant", row["output"]]]
        name = content_hash({"messages": messages, "context": row["input"] or None, "references": []})
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return found


def text_of(row: Record) -> str:
    """The content of an Alpaca row as the documentation has it."""
    context = f"\n{row['input'].strip()}" if row["input"].strip() else ""
    return f"Instruction: {row['instruction'].strip()}{context}\nResponse: {row['output'].strip()}"


def naive_logits(model: Path, texts: Sequence[str], layout: LayoutName, prompts: Sequence[str] = PROMPTS) -> np.ndarray:
    """(texts, prompts, 5): one forward a text and prompt, batch 1, no cache, full vocabulary, last position."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ratings = [tokenizer.convert_tokens_to_ids(str(rating)) for rating in range(1, 6)]
    frame = Layout(layout, tuple(prompts))
    out = np.empty((len(texts), len(prompts), 5))
    with torch.inference_mode():
        for row, text in enumerate(texts):
            for k in range(len(prompts)):
                ids = tokenizer(frame.whole(text, k), return_tensors="pt")["input_ids"]
                out[row, k] = network(input_ids=ids, use_cache=False).logits[0, -1, ratings].numpy()
    return out


class CallLog:
    """The audit of rating calls since the last look."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self) -> list[tuple[str, int, int]]:
        """(model, batch, rows) of every call since the last `take`."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.path.unlink(missing_ok=True)
        return [(model, int(batch), int(rows)) for model, batch, rows in (line.split("\t") for line in lines)]


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CallLog:
    log = tmp_path / "calls.log"
    monkeypatch.setenv("STITCH_RAY_CALL_LOG", str(log))
    return CallLog(log)


@pytest.fixture(scope="module")
def tiny_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with logits ten times as far apart, so that scores differ by far more than the tolerances here."""
    folder = tmp_path_factory.mktemp("sharp") / "model"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_output_embeddings().weight *= 10
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(corpus_file: Path) -> list[Record]:
    return json.loads(corpus_file.read_text("utf-8"))


@pytest.fixture(scope="module")
def finished(
    ray_cluster: object, tmp_path_factory: pytest.TempPathFactory, corpus_file: Path, tiny_model: Path
) -> tuple[Values, Path]:
    """A finished run over 240 rows, 230 of them distinct, and its configuration. Not to be changed: copy it."""
    config = values(corpus_file, tiny_model)
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(config, folder)
    return config, folder


@pytest.fixture
def copy(finished: tuple[Values, Path], tmp_path: Path) -> tuple[Values, Path]:
    """The finished run's configuration and a copy of its folder, for this test alone."""
    config, folder = finished
    return json.loads(json.dumps(config)), shutil.copytree(folder, tmp_path / "run")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, rows: list[Record]) -> Path:
    """40 rows of the corpus."""
    return write_lines(tmp_path_factory.mktemp("small") / "small.jsonl", rows[:40])


@pytest.fixture(scope="module")
def two_models(
    ray_cluster: object,
    tmp_path_factory: pytest.TempPathFactory,
    small: Path,
    tiny_model: Path,
    other_tiny_model: Path,
) -> tuple[Values, Path]:
    """A finished run of two models over 40 rows. Not to be changed: copy it."""
    config = values(small, tiny_model, other_tiny_model)
    folder = tmp_path_factory.mktemp("two") / "run"
    run(config, folder)
    return config, folder


# What a run leaves behind


def test_folder_holds_the_documented_files_with_their_schemas(finished: tuple[Values, Path]) -> None:
    _, folder = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "manifest.json", "plan.parquet", "ratings", "scores.parquet", "selected.jsonl"} <= names
    assert "quarantine.jsonl" not in names
    assert pq.read_schema(folder / "plan.parquet").equals(PLAN_SCHEMA)
    tables = [pq.read_table(file) for file in sorted((folder / "ratings").iterdir())]
    assert all(table.schema.equals(RATING_SCHEMA) for table in tables)
    table = pa.concat_tables(tables)
    assert table.num_rows == 240 * 5
    assert len(set(zip(table["example_id"].to_pylist(), table["prompt"].to_pylist(), strict=True))) == 240 * 5
    assert set(table["turn"].to_pylist()) == {0}
    assert set(table["model"].to_pylist()) == {"a"}
    assert {len(logits) for logits in table["logits"].to_pylist()} == {5}
    assert set(table["prompt_hash"].to_pylist()) == {content_hash(prompt) for prompt in PROMPTS}
    scores = pq.read_schema(folder / "scores.parquet")
    expected = ["example_id", "token_score", "sentence_score.a", "model_score", "tokens"]
    assert scores.names == expected
    assert [str(kind) for kind in scores.types] == ["string", "double", "double", "double", "int32"]


def test_manifest_counts_every_row_and_config_is_the_resolved_one(finished: tuple[Values, Path]) -> None:
    config, folder = finished
    manifest = json.loads((folder / "manifest.json").read_text())
    wanted = {"rows_in": 240, "rows_out": 240, "rows_quarantined": 0, "rows_dropped": {}, "records_written": 48}
    assert {key: manifest[key] for key in wanted} == wanted
    assert (manifest["status"], manifest["contents"], manifest["truncated"]) == ("done", 230, 0)
    assert manifest["rating"][0]["rows"] == 240
    assert manifest["rating"][0]["path"] != "plain"  # the naive loop below is compared with something else
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert as_config(written, SelectConfig) == as_config(config, SelectConfig)
    assert written["rating"]["num_prompts"] == 5  # defaults are written out


def test_selected_are_the_input_records_unchanged_best_first(finished: tuple[Values, Path], rows: list[Record]) -> None:
    _, folder = finished
    selected = selected_of(folder)
    assert [row["selection"]["rank"] for row in selected] == list(range(1, 49))
    found = [row["selection"]["score"] for row in selected]
    assert found == sorted(found, reverse=True)
    assert {row["selection"]["level"] for row in selected} == {"sentence"}
    originals = {json.dumps(row, sort_keys=True) for row in rows}
    for row in selected:
        assert json.dumps({k: v for k, v in row.items() if k != "selection"}, sort_keys=True) in originals
    everyone = sorted((row["sentence_score.a"] for row in scores_of(folder).values()), reverse=True)
    assert found == everyone[:48]


@pytest.mark.resume
def test_exact_repeats_are_rated_once_and_get_an_id_each(
    copy: tuple[Values, Path], rows: list[Record], calls: CallLog
) -> None:
    config, folder = copy
    found = scores_of(folder)
    assert sorted(found) == sorted(ids_of(rows))
    repeats = [name for name in found if name.endswith("-2")]
    assert len(repeats) == 10
    for name in repeats:
        assert {**found[name], "example_id": ""} == {**found[name.removesuffix("-2")], "example_id": ""}
    shutil.rmtree(folder / "ratings")
    manifest = run(config, folder).facts
    assert sum(count for _, _, count in calls.take()) == 240
    assert manifest["rating"][0]["sequences"] == 230 * 5


@pytest.mark.parametrize("layout", ["prompt_first", "content_first"])
@pytest.mark.numeric
def test_scores_equal_those_of_a_naive_loop(
    layout: LayoutName, finished: tuple[Values, Path], rows: list[Record], tiny_model: Path, tmp_path: Path
) -> None:
    config, folder = finished
    if layout == "content_first":
        folder = tmp_path / "run"
        run({**config, "rating": {"layout": layout}}, folder)
    logits = naive_logits(tiny_model, [text_of(row) for row in rows[:230]], layout)
    found = scores_of(folder)
    for name, token, sentence in zip(
        ids_of(rows), token_score(logits)[:, 0].tolist(), sentence_score(logits).tolist(), strict=False
    ):
        assert found[name]["token_score"] == pytest.approx(token, abs=1e-4)
        assert found[name]["sentence_score.a"] == pytest.approx(sentence, abs=1e-4)
        assert found[name]["model_score"] == pytest.approx(sentence, abs=1e-4)
    spread = np.ptp(sentence_score(logits))
    assert spread > 5e-2, "all scores alike: the comparison could not fail"


@pytest.mark.numeric
def test_conversation_is_rated_turn_by_turn(tiny_model: Path, tmp_path: Path) -> None:
    talks = []
    for n in range(6):
        turns = [("system", f"Be brief {n}.")] if n % 2 else []
        for t in range(1 + n % 3):
            turns += [("user", f"Question {n} {t}?"), ("assistant", f"Answer {n} {t} it is.")]
        talks.append({"id": f"talk-{n}", "messages": [{"role": role, "content": text} for role, text in turns]})
    summary = run(values(write_lines(tmp_path / "talks.jsonl", talks), tiny_model), tmp_path / "run")
    table = pa.concat_tables([pq.read_table(file) for file in (summary.folder / "ratings").iterdir()])
    turns_of = defaultdict(set)
    for name, turn in zip(table["example_id"].to_pylist(), table["turn"].to_pylist(), strict=True):
        turns_of[name].add(turn)
    assert turns_of == {f"talk-{n}": set(range(1 + n % 3)) for n in range(6)}
    found = scores_of(summary.folder)
    for talk in talks:
        parts = contents([Turn(m["role"], m["content"]) for m in talk["messages"]], None)
        by_turn = sentence_score(naive_logits(tiny_model, [part.text for part in parts], "prompt_first"))
        assert found[talk["id"]]["sentence_score.a"] == pytest.approx(by_turn.mean(), abs=1e-4)


# Several models and prompts


def test_model_level_weights_the_models_by_size_or_as_told(two_models: tuple[Values, Path], tmp_path: Path) -> None:
    config, source = two_models
    folder = shutil.copytree(source, tmp_path / "run")
    by_size = scores_of(folder)
    sizes = [
        sum(parameter.numel() for parameter in AutoModelForCausalLM.from_pretrained(model["path"]).parameters())
        for model in config["models"]
    ]
    assert sizes[0] != sizes[1]
    pairs = {name: [row["sentence_score.a"], row["sentence_score.b"]] for name, row in by_size.items()}
    for name, pair in pairs.items():
        assert by_size[name]["model_score"] == pytest.approx(float(model_score(pair, sizes)), abs=1e-12)
    assert {row["selection"]["level"] for row in selected_of(folder)} == {"model"}
    run({**config, "rating": {"weights": [0.9, 0.3]}}, folder)
    explicit = scores_of(folder)
    for name, pair in pairs.items():
        assert explicit[name]["model_score"] == pytest.approx(float(weighted_model_score(pair, [0.9, 0.3])), abs=1e-12)


def test_added_model_is_the_only_one_rated(
    finished: tuple[Values, Path],
    two_models: tuple[Values, Path],
    small: Path,
    tiny_model: Path,
    tmp_path: Path,
    calls: CallLog,
) -> None:
    both, reference = two_models
    run(values(small, tiny_model), tmp_path / "run")
    assert {model for model, _, _ in calls.take()} == {"a"}
    run(both, tmp_path / "run")
    assert {model for model, _, _ in calls.take()} == {"b"}
    assert results(tmp_path / "run") == results(reference)


def test_model_that_left_and_came_back_with_other_weights_is_refused(
    two_models: tuple[Values, Path], small: Path, tiny_model: Path, other_tiny_model: Path, tmp_path: Path
) -> None:
    config, source = two_models
    folder = shutil.copytree(source, tmp_path / "run")
    run(values(small, tiny_model), folder)
    config = json.loads(json.dumps(config))
    config["models"][1]["path"] = str(tiny_model)
    with pytest.raises(UserError, match=r"models\.b\.fingerprint"):
        run(config, folder)


@pytest.mark.resume
def test_added_prompts_are_the_only_ones_rated_and_left_out_ones_cost_nothing(
    small: Path, tiny_model: Path, tmp_path: Path, calls: CallLog
) -> None:
    folder = tmp_path / "run"
    config = values(small, tiny_model)

    def tokens(num_prompts: int) -> int:
        before = set(folder.glob("ratings/*"))
        run({**config, "rating": {"num_prompts": num_prompts}}, folder)
        new = [pq.read_table(file) for file in set(folder.glob("ratings/*")) - before]
        return sum(table.num_rows for table in new)

    assert tokens(3) == 40 * 3
    three = scores_of(folder)
    assert len(calls.take()) == 2
    assert tokens(5) == 40 * 2
    assert sum(count for _, _, count in calls.take()) == 40
    five = scores_of(folder)
    texts = [text_of(row) for row in read_lines(small)]
    wanted = sentence_score(naive_logits(tiny_model, texts, "prompt_first"))
    for name, value in zip(ids_of(read_lines(small)), wanted.tolist(), strict=True):
        assert five[name]["sentence_score.a"] == pytest.approx(value, abs=1e-4)
    assert tokens(3) == 0
    assert calls.take() == []
    assert scores_of(folder) == three


# Runs in a folder that holds results


@pytest.mark.parametrize(
    "changed",
    [
        {"rating": {"alpha": 5.0}},
        {"rating": {"mode": "repo"}},
        {"rating": {"token_prompt": 3}, "select": {"level": "token"}},
        {"select": {"level": "token"}},
        {"select": {"proportion": 0.5}},
        {"select": {"count": 7}},
        {"select": {"method": "random"}},
        {"select": {"method": "longest"}},
    ],
    ids=lambda changed: "-".join(f"{k}={v}" for section in changed.values() for k, v in section.items()),
)
def test_change_of_scoring_or_selection_rates_nothing(
    changed: Values, copy: tuple[Values, Path], rows: list[Record], calls: CallLog
) -> None:
    config, folder = copy
    before = results(folder)
    run({**config, **changed}, folder)
    assert calls.take() == []
    after = results(folder)
    assert after["selected.jsonl"] != before["selected.jsonl"]
    assert {n: b for n, b in after.items() if "ratings" in n} == {n: b for n, b in before.items() if "ratings" in n}
    selected = selected_of(folder)
    assert len(selected) == {"count=7": 7, "proportion=0.5": 120}.get(
        "".join(f"{k}={v}" for k, v in changed.get("select", {}).items()), 48
    )
    if changed.get("select", {}).get("method") == "longest":
        tokens = sorted((row["tokens"] for row in scores_of(folder).values()), reverse=True)
        names = dict(zip((json.dumps(row, sort_keys=True) for row in rows), ids_of(rows), strict=True))
        found = scores_of(folder)
        kept = [{k: v for k, v in row.items() if k != "selection"} for row in selected]
        assert [found[names[json.dumps(row, sort_keys=True)]]["tokens"] for row in kept] == tokens[:48]


@pytest.mark.resume
def test_second_run_of_a_finished_job_calls_no_model_and_changes_no_result(
    copy: tuple[Values, Path], tmp_path: Path, calls: CallLog
) -> None:
    config, folder = copy
    before = results(folder)
    done = shell(config, tmp_path, "--out", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("select: kept 48 of 240 rated rows")
    assert calls.take() == []
    assert results(folder) == before


def test_other_layout_or_data_is_refused_by_name_until_overwrite(
    copy: tuple[Values, Path], small: Path, tmp_path: Path, calls: CallLog
) -> None:
    config, folder = copy
    before = everything(folder)
    other = {**config, "rating": {"layout": "content_first"}, "data": {"paths": [str(small)]}}
    found = cli(other, tmp_path, "--out", str(folder))
    assert found.exit_code == 2
    assert "data.inputs" in found.stderr
    assert "rating.layout" in found.stderr
    assert everything(folder) == before
    assert cli(other, tmp_path, "--out", str(folder), "--overwrite").exit_code == 0
    assert sum(count for _, _, count in calls.take()) == 40
    assert len(scores_of(folder)) == 40
    assert yaml.safe_load((folder / "config.yaml").read_text())["rating"]["layout"] == "content_first"


@pytest.mark.resume
def test_replicas_order_files_and_formats_of_the_input_do_not_matter(
    finished: tuple[Values, Path],
    rows: list[Record],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, reference = finished
    monkeypatch.setattr(DataContext.get_current(), "wait_for_min_actors_s", 120)  # or the first does all the work
    shuffled = [rows[position] for position in np.random.default_rng(5).permutation(len(rows))]
    (tmp_path / "one.json").write_text(json.dumps(shuffled[:70]), encoding="utf-8")
    with gzip.open(tmp_path / "two.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in shuffled[70:150])
    pq.write_table(pa.Table.from_pylist(shuffled[150:]), tmp_path / "three.parquet")
    config = values([tmp_path / name for name in ("three.parquet", "one.json", "two.jsonl.gz")], tiny_model)
    config["models"][0]["replicas"] = 3
    summary = run(config, tmp_path / "run")
    assert summary.facts["rating"][0]["actors"] > 1
    assert results(summary.folder) == results(reference)


def test_equal_contents_with_other_fields_keep_their_ids_in_any_order(tiny_model: Path, tmp_path: Path) -> None:
    """The ids X and X-2 of two records that differ in a field no model sees must not depend on who comes first."""
    plain = [{"instruction": f"Say {n}.", "input": "", "output": f"It is {n}."} for n in range(8)]
    rows = [{**row, "tag": tag} for row in plain for tag in ("left", "right")]
    everyone = {"select": {"proportion": 1.0}}
    one = run(values(write_lines(tmp_path / "one.jsonl", rows), tiny_model, **everyone), tmp_path / "a").folder
    two = run(values(write_lines(tmp_path / "two.jsonl", rows[::-1]), tiny_model, **everyone), tmp_path / "b").folder
    assert results(one) == results(two)


# Rows that cannot be used


def test_poisoned_rows_are_quarantined_with_file_line_and_reason(
    rows: list[Record], tiny_model: Path, tmp_path: Path
) -> None:
    good = rows[:12]
    bad: dict[int, tuple[Record | str, str]] = {
        2: ('{"instruction": "cut\u2028off', "invalid JSON"),  # a line separator to Unicode, not to JSON lines
        5: ({"instruction": "No output."}, "missing field 'output'"),
        7: ({"instruction": "Say nothing.", "input": "", "output": "  \n"}, "empty response"),
        8: ({"instruction": "Type.", "input": "", "output": 7}, "number, expected text"),
        11: ({"instruction": "Bell.", "input": "", "output": "ding \x07"}, "control character U+0007"),
        14: ({"instruction": "Long.", "input": "", "output": "ab " * 700_000}, "2,100,005 characters long"),
        16: ("[1, 2]", "expected an object"),
    }
    left = iter(good)
    lines = [bad[number][0] if number in bad else next(left) for number in range(1, len(good) + len(bad) + 1)]
    path = write_lines(tmp_path / "poison.jsonl", lines)
    summary = run(values(path, tiny_model), tmp_path / "run")
    found = read_lines(summary.folder / "quarantine.jsonl")
    assert [(row["source"], row["line"]) for row in found] == [(str(path), line) for line in bad]
    for row in found:
        assert bad[row["line"]][1] in row["reason"]
        assert len(row["excerpt"]) <= 500
    assert sorted(scores_of(summary.folder)) == sorted(ids_of(good))
    counts = [summary.facts[key] for key in ("rows_in", "rows_out", "rows_quarantined")]
    assert counts == [19, 12, 7]


@pytest.fixture(scope="module")
def poisoned_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with NaN for the last byte of a snowman, which no other text has."""
    folder = tmp_path_factory.mktemp("poisoned") / "model"
    shutil.copytree(tiny_model, folder)
    token = AutoTokenizer.from_pretrained(folder)("☃")["input_ids"][-1]
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = float("nan")
    model.save_pretrained(folder)
    return folder


@pytest.mark.numeric
def test_logits_that_are_not_finite_quarantine_their_row_alone(
    rows: list[Record], poisoned_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    snowman = {"instruction": "Draw a snowman.", "input": "", "output": "☃"}
    lines = [*rows[:9], snowman, *rows[9:20], snowman]
    path = write_lines(tmp_path / "rows.jsonl", lines)
    summary = run(values(path, poisoned_model), tmp_path / "run")
    found = read_lines(summary.folder / "quarantine.jsonl")
    assert sorted((row["source"], row["line"]) for row in found) == [(str(path), 10), (str(path), 22)]
    assert all("not finite" in row["reason"] for row in found)
    assert [summary.facts[key] for key in ("rows_in", "rows_out", "rows_quarantined")] == [22, 20, 2]
    wanted = sentence_score(naive_logits(tiny_model, [text_of(row) for row in rows[:20]], "prompt_first"))
    scores = scores_of(summary.folder)
    assert {name: row["sentence_score.a"] for name, row in scores.items()} == pytest.approx(
        dict(zip(ids_of(rows[:20]), wanted.tolist(), strict=True)), abs=1e-4
    )


def test_no_row_with_finite_logits_is_said_in_one_line(poisoned_model: Path, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"instruction": f"Draw {n}.", "output": "☃"} for n in range(4)])
    found = cli(values(path, poisoned_model), tmp_path, "--out", str(tmp_path / "run"))
    assert found.exit_code == 2
    assert "not finite" in found.stderr


# Exit 2: the user must change something


def no_digits(tiny_model: Path, folder: Path) -> Path:
    """The tiny model with a tokenizer that knows no digit."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    shutil.copytree(tiny_model, folder)
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "is": 1, ":": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for file in folder.glob("*token*"):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[UNK]").save_pretrained(folder)
    return folder


def missing_model(config: Values, folder: Path) -> str:
    config["models"][0]["path"] = str(folder / "nowhere" / "model")
    return "no such model folder"


def wrong_data_path(config: Values, folder: Path) -> str:
    config["data"]["paths"] = [str(folder / "nowhere.jsonl")]
    return "no such file"


def unsuitable_tokenizer(config: Values, folder: Path) -> str:
    config["models"][0]["path"] = str(no_digits(Path(config["models"][0]["path"]), folder / "no-digits"))
    return "tokenizer"


def too_many_replicas(config: Values, folder: Path) -> str:
    config["models"][0]["replicas"] = 9
    return "9 CPU (the cluster has 4)"


def all_rows_bad(config: Values, folder: Path) -> str:
    config["data"]["paths"] = [str(write_lines(folder / "bad.jsonl", [{"instruction": "x"}] * 5))]
    config["data"]["max_bad_fraction"] = 1.0
    return "bad.jsonl:1: missing field 'output'"


def too_many_bad_rows(config: Values, folder: Path) -> str:
    lines: list[Record] = [{"instruction": "x"}] * 3 + [{"instruction": f"{n}", "output": f"{n}"} for n in range(7)]
    config["data"]["paths"] = [str(write_lines(folder / "some.jsonl", lines))]
    config["data"]["max_bad_fraction"] = 0.2
    return "3 of 10 rows cannot be used, more than 0.2"


def two_records_with_one_id(config: Values, folder: Path) -> str:
    lines = [{"id": "same", "instruction": "x", "output": f"{n}"} for n in range(2)]
    config["data"]["paths"] = [str(write_lines(folder / "ids.jsonl", lines))]
    return "id 'same' names two different records"


def broken_file(config: Values, folder: Path) -> str:
    path = folder / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps({"instruction": "x", "output": "y"}).encode() * 999)[:-9])
    config["data"]["paths"] = [str(path)]
    return "cut.jsonl.gz: cannot be read past line"


@pytest.mark.parametrize(
    "spoil",
    [
        missing_model,
        wrong_data_path,
        unsuitable_tokenizer,
        too_many_replicas,
        all_rows_bad,
        too_many_bad_rows,
        two_records_with_one_id,
        broken_file,
    ],
)
def test_mistake_exits_2_before_anything_is_rated_and_leaves_no_folder(
    spoil: Callable[[Values, Path], str], small: Path, tiny_model: Path, tmp_path: Path, calls: CallLog
) -> None:
    config = values(small, tiny_model)
    message = spoil(config, tmp_path)
    found = cli(config, tmp_path, "--out", str(tmp_path / "deep" / "run"))
    assert found.exit_code == 2, found.output
    assert message in found.stderr
    assert all(line.startswith("error: ") for line in found.stderr.splitlines())
    assert not (tmp_path / "deep" / "run").exists()
    assert calls.take() == []


@pytest.mark.slow
def test_mistakes_exit_2_from_the_real_command(small: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = values(small, tiny_model)
    message = too_many_replicas(config, tmp_path)
    found = shell(config, tmp_path, "--out", str(tmp_path / "run"))
    assert (found.returncode, message in found.stderr) == (2, True), found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "run").exists()


def test_out_that_cannot_be_written_exits_2(small: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = values(small, tiny_model)
    (tmp_path / "file").write_text("mine")
    found = cli(config, tmp_path, "--out", str(tmp_path / "file" / "run"))
    assert found.exit_code == 2
    assert "is a file" in found.stderr
    assert (tmp_path / "file").read_text() == "mine"
    if Path("/proc/self").exists():  # where not even root can write
        found = cli(config, tmp_path, "--out", "/proc/run")
        assert found.exit_code == 2
        assert "cannot write to /proc" in found.stderr
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    for options in ((), ("--overwrite",)):
        found = cli(config, tmp_path, "--out", str(tmp_path / "full"), *options)
        assert found.exit_code == 2
        assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_more_rows_asked_for_than_rated_keeps_the_ratings(
    copy: tuple[Values, Path], tmp_path: Path, calls: CallLog
) -> None:
    config, folder = copy
    found = cli({**config, "select": {"count": 241}}, tmp_path, "--out", str(folder))
    assert found.exit_code == 2
    assert "241 asked for, 240 rated" in found.stderr
    assert json.loads((folder / "manifest.json").read_text())["status"] == "failed"
    run(config, folder)
    assert calls.take() == []


# Selection by more than the score


@pytest.mark.parametrize("max_cosine", [pytest.param(0.95, marks=pytest.mark.slow), 0.5])
def test_diverse_selection_holds_no_two_rows_above_max_cosine(
    max_cosine: float, copy: tuple[Values, Path], calls: CallLog
) -> None:
    from sentence_transformers import SentenceTransformer

    config, folder = copy
    encoder = needs.minilm()
    plain = [text_of(row) for row in selected_of(folder)]
    diversity = {"encoder": str(encoder), "max_cosine": max_cosine}
    run({**config, "select": {"method": "diverse", "diversity": diversity}}, folder)
    assert calls.take() == []
    model = SentenceTransformer(str(encoder))

    def largest_cosine(texts: Sequence[str]) -> float:
        vectors = model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return float((vectors @ vectors.T - 2 * np.eye(len(texts))).max())

    selected = selected_of(folder)
    texts = [text_of(row) for row in selected]
    assert largest_cosine(plain) > max_cosine, "the plain selection is diverse already: nothing is tested"
    assert largest_cosine(texts) <= max_cosine + 1e-5
    assert texts[0] == plain[0]
    found = [row["selection"]["score"] for row in selected]
    assert found == sorted(found, reverse=True)
    assert len(selected) == 48 or max_cosine == 0.5


@pytest.mark.slow
def test_agreement_of_the_layouts_is_reported_for_every_model_whatever_the_weights(
    two_models: tuple[Values, Path], tmp_path: Path
) -> None:
    config, source = two_models
    folder = shutil.copytree(source, tmp_path / "run")
    facts = run({**config, "rating": {"weights": [0.9, 0.3]}, "report": {"compare_layouts": True}}, folder).facts
    other = tmp_path / "other"
    run({**config, "rating": {"layout": "content_first"}}, other)
    for name in ("a", "b"):
        column = f"sentence_score.{name}"
        both = [[row[column] for _, row in sorted(scores_of(one).items())] for one in (folder, other)]
        assert facts["layout_agreement"][name] == pytest.approx(spearmanr(*both).statistic, abs=1e-3)
    assert set(facts["layout_agreement"]) == {"a", "b"}


# Looking without rating


def test_limit_dry_run_and_validate(
    small: Path, tiny_model: Path, tmp_path: Path, calls: CallLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = values(small, tiny_model)
    dry = cli(config, tmp_path, "--dry-run", "--limit", "10")
    assert dry.exit_code == 0, dry.output
    assert "read   10 rows from 1 source(s), 0 unusable, 10 distinct" in dry.stdout
    assert "50 sequences" in dry.stdout
    valid = cli(config, tmp_path, command="validate")
    assert valid.exit_code == 0, valid.output
    assert "valid; select work hash" in valid.stdout
    assert calls.take() == []
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml"}
    assert cli(config, tmp_path, "--limit", "10").exit_code == 0
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("select-")
    assert sorted(scores_of(folder)) == sorted(ids_of(read_lines(small)[:10]))
    assert sum(count for _, _, count in calls.take()) == 10


def test_unknown_key_is_named_with_its_line(small: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = {**values(small, tiny_model), "rating": {"alhpa": 1}}
    for command in ("select", "validate"):
        found = cli(config, tmp_path, command=command)
        assert found.exit_code == 2
        assert "rating.alhpa: unknown key" in found.stderr


@pytest.fixture(autouse=True)
def no_thread_is_lost() -> Iterator[None]:
    """A rating path that sets torch's threads in this process would slow every test after it."""
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before

"""The run folder: atomic writes, when a folder may be resumed, what a finished run guarantees."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stitch_ray.data.quarantine import Quarantined
from stitch_ray.errors import UserError
from stitch_ray.records import content_hash
from stitch_ray.runs import (
    MANIFEST,
    RunFolder,
    atomic_path,
    check_writable,
    fresh_folder,
    versions,
    work_differences,
    write_json,
    write_text,
)

WORK = {"data": {"inputs": "abc", "limit": None}, "models": {"m": {"dtype": "auto"}}}


def manifest(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / MANIFEST).read_text("utf-8")))


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def open_run(path: Path, work: dict[str, Any] = WORK, *, job: str = "select", overwrite: bool = False) -> RunFolder:
    folder = RunFolder.open(path, job, {"seed": 0}, work, overwrite=overwrite)
    folder.release()
    return folder


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return open_run(tmp_path / "run")


# Atomic writes


def test_a_write_appears_under_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("half")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_text() == "half"
    assert os.listdir(target.parent) == ["file.txt"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, failure: type[BaseException], kind: str
) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(failure), atomic_path(target) as temporary:  # noqa: PT012
        if kind == "file":
            temporary.write_text("new, but ha")
        elif kind == "folder":
            temporary.mkdir()
            (temporary / "part").touch()
        raise failure
    assert os.listdir(tmp_path) == ["file.txt"]
    assert target.read_text() == "old"


def test_text_that_cannot_be_encoded_never_leaves_half_a_file(tmp_path: Path) -> None:
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "file.txt", "a" * 100_000 + "\ud800")
    assert os.listdir(tmp_path) == []


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"ü": 1})
    assert path.read_text("utf-8") == '{\n  "ü": 1\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"ü": float("nan")})
    assert json.loads(path.read_text("utf-8")) == {"ü": 1}


def test_a_fresh_folder_is_empty_whatever_was_there(tmp_path: Path) -> None:
    (tmp_path / "work" / "old").mkdir(parents=True)
    assert os.listdir(fresh_folder(tmp_path / "work")) == []
    assert os.listdir(fresh_folder(tmp_path / "a" / "b")) == []


# A new run


def test_a_new_run_writes_its_settings_and_says_that_it_is_running(run: RunFolder) -> None:
    found = manifest(run.path)
    assert (found["job"], found["status"], found["work"]) == ("select", "running", WORK)
    assert (found["work_hash"], found["config_hash"]) == (content_hash(WORK), content_hash({"seed": 0}))
    assert yaml.safe_load((run.path / "config.yaml").read_text("utf-8")) == {"seed": 0}
    assert found["versions"] == versions()
    assert {"python", "ray", "torch", "transformers"} <= found["versions"].keys()


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert open_run(tmp_path).manifest["status"] == "running"


# Resuming


def test_the_same_work_is_resumed_with_its_results_and_its_time_of_creation(run: RunFolder) -> None:
    run.manifest["created"] = "2020-01-01T00:00:00+0000"
    run.fail(RuntimeError("killed"))
    (run.path / "ratings").mkdir()
    (run.path / "ratings" / "m.parquet").write_bytes(b"rated")
    again = RunFolder.open(run.path, "select", {"seed": 1}, WORK)
    assert manifest(run.path) == again.manifest
    assert (again.manifest["created"], again.manifest["status"]) == ("2020-01-01T00:00:00+0000", "running")
    assert "error" not in again.manifest
    assert again.manifest["config_hash"] == content_hash({"seed": 1})
    assert (run.path / "ratings" / "m.parquet").read_bytes() == b"rated"


def test_other_work_is_refused_naming_every_key_and_changing_nothing(run: RunFolder) -> None:
    before = snapshot(run.path)
    other = {"data": {"inputs": "xyz", "limit": 5}, "models": {"m": {"dtype": "float32"}}}
    with pytest.raises(UserError, match=r"\(data\.inputs, data\.limit, models\.m\.dtype\)\. .*--overwrite"):
        open_run(run.path, other)
    assert snapshot(run.path) == before


def test_one_more_model_is_allowed_and_remembered(run: RunFolder) -> None:
    more = {**WORK, "models": {**WORK["models"], "n": {"dtype": "auto"}}}
    open_run(run.path, more)
    assert manifest(run.path)["work"] == more


def test_a_model_left_out_for_a_while_must_come_back_as_it_was(run: RunFolder) -> None:
    """Its ratings stay in the folder, so what they depend on must stay in the manifest."""
    open_run(run.path, {**WORK, "models": {"n": {"dtype": "auto"}}})
    with pytest.raises(UserError, match=r"models\.m\.dtype"):
        open_run(run.path, {**WORK, "models": {"m": {"dtype": "float32"}}})
    open_run(run.path, WORK)


def test_keys_on_one_side_only_are_no_difference() -> None:
    assert work_differences({"a": 1, "b": {"c": 1}}, {"b": {"c": 1, "d": 2}, "e": 3}) == []
    assert work_differences({"b": {"c": 1}}, {"b": {"c": 2}}) == ["b.c"]
    assert work_differences({"b": {"c": 1}}, {"b": None}) == ["b"]


def test_what_is_kept_survives_overwriting_and_a_run_that_is_refused(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path / "run", "select", {}, WORK)
    for name in ("stages", "other"):
        (first.path / name).mkdir()
        (first.path / name / "result").write_text("1")
    first.release()
    again = RunFolder.open(first.path, "select", {}, {"seed": 9}, overwrite=True, kept=("stages",))
    assert sorted(path.name for path in again.path.iterdir() if path.name != ".lock") == [
        "config.yaml",
        "manifest.json",
        "stages",
    ]
    assert json.loads((again.path / "manifest.json").read_text())["work"] == {"seed": 9}
    again.fail(UserError("no"))
    assert (again.path / "stages" / "result").read_text() == "1"


def test_a_folder_of_another_job_is_refused_even_with_overwrite(run: RunFolder) -> None:
    before = snapshot(run.path)
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is a run of 'select', not of 'finetune'"):
            open_run(run.path, job="finetune", overwrite=overwrite)
    assert snapshot(run.path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_folder_with_anything_in_it_is_refused_even_with_overwrite(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not a run folder of this tool"):
        open_run(tmp_path, overwrite=overwrite)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("text", ['{"name": "another tool"}', "[1, 2]", '"text"', "null"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_foreign_manifest_does_not_make_a_folder_ours(tmp_path: Path, text: str, overwrite: bool) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="Choose another --out"):
        open_run(tmp_path, overwrite=overwrite)
    assert (tmp_path / MANIFEST).read_text() == text


def test_a_broken_manifest_is_refused_with_what_to_do(run: RunFolder) -> None:
    (run.path / MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"cannot be read .* remove the folder"):
        open_run(run.path)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="is a file"):
        open_run(tmp_path / "run")


def test_overwrite_starts_over_with_other_work(run: RunFolder) -> None:
    (run.path / "ratings.parquet").touch()
    run.manifest["created"] = "2020-01-01T00:00:00+0000"
    run.save()
    other = {"data": {"inputs": "xyz"}}
    again = open_run(run.path, other, overwrite=True)
    assert manifest(run.path)["work"] == other
    assert again.manifest["created"] != "2020-01-01T00:00:00+0000"
    assert sorted(os.listdir(run.path)) == [".lock", "config.yaml", MANIFEST]


# The end of a run


def test_a_run_whose_rows_add_up_is_done(run: RunFolder) -> None:
    run.manifest.update(rows_in=10, rows_out=5, rows_quarantined=2, rows_dropped={"empty": 1, "repeat": 2})
    run.finish()
    assert manifest(run.path)["status"] == "done"
    assert manifest(run.path)["seconds"] >= 0


@pytest.mark.parametrize("counts", [(10, 7, 2), (10, 9, 2)])
def test_a_run_that_lost_or_made_rows_is_never_marked_done(run: RunFolder, counts: tuple[int, int, int]) -> None:
    run.manifest.update(zip(("rows_in", "rows_out", "rows_quarantined"), counts, strict=True))
    with pytest.raises(RuntimeError, match="rows do not add up: 10 in"):
        run.finish()
    assert manifest(run.path)["status"] == "running"


def test_a_failed_run_says_why(run: RunFolder) -> None:
    run.fail(ValueError("x" * 5000))
    found = manifest(run.path)
    assert found["status"] == "failed"
    assert found["error"].startswith("ValueError: xxx")
    assert len(found["error"]) == 2000


def test_quarantined_rows_are_written_by_source_and_line(run: RunFolder) -> None:
    def rows() -> Iterator[Quarantined]:
        yield Quarantined("b.json", 1, "no output", "ü")
        yield Quarantined("a.json", 10, "no instruction")
        yield Quarantined("a.json", 9, "not an object", example_id="x")

    assert run.write_quarantine(rows()) == 3
    lines = [json.loads(line) for line in (run.path / "quarantine.jsonl").read_text("utf-8").splitlines()]
    assert lines == [
        {"source": "a.json", "line": 9, "reason": "not an object", "example_id": "x"},
        {"source": "a.json", "line": 10, "reason": "no instruction"},
        {"source": "b.json", "line": 1, "reason": "no output", "excerpt": "ü"},
    ]


def test_without_quarantined_rows_there_is_no_file_not_even_an_older_one(run: RunFolder) -> None:
    assert run.write_quarantine([]) == 0
    run.write_quarantine([Quarantined("a.json", 1, "bad")])
    assert run.write_quarantine([]) == 0
    assert not (run.path / "quarantine.jsonl").exists()


# Pre-flight


def test_a_place_that_can_be_written_is_found_so_without_leaving_a_trace(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b" / "run")
    check_writable(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_file_on_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=f"--out {path}: {tmp_path}/file is a file"):
            check_writable(path)


def test_a_folder_that_refuses_writes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("stitch_ray.runs.tempfile.TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(UserError, match=f"cannot write to {tmp_path}: Permission denied"):
        check_writable(tmp_path / "run")


# One command at a time


def test_second_command_in_the_same_folder_is_refused_until_the_first_ends(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path / "run", "select", {}, {"a": 1})
    with pytest.raises(UserError, match="in use by another command"):
        RunFolder.open(tmp_path / "run", "select", {}, {"a": 1})
    first.fail(RuntimeError("stopped"))
    RunFolder.open(tmp_path / "run", "select", {}, {"a": 1}).release()


def test_lock_of_a_killed_process_does_not_stay(tmp_path: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path; from stitch_ray.runs import RunFolder; "
        f"folder = RunFolder.open(Path({str(tmp_path / 'run')!r}), 'select', {{}}, {{}}); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    RunFolder.open(tmp_path / "run", "select", {}, {}).release()


def test_temporary_files_of_killed_writers_are_removed_on_resume(tmp_path: Path) -> None:
    RunFolder.open(tmp_path / "run", "select", {}, {}).release()
    leftover = tmp_path / "run" / "ratings" / ".model.0.parquet.123.456.tmp"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    RunFolder.open(tmp_path / "run", "select", {}, {}).release()
    assert not leftover.exists()

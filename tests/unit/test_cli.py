"""Commands: help, exit codes, error lines, `clean`, and how the modules of jobs/ are started."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
from ray.exceptions import RayTaskError
from typer.testing import CliRunner

from stitch_ray.cli import app
from stitch_ray.config import CONFIGS
from stitch_ray.console import exits, user_error
from stitch_ray.errors import UserError
from stitch_ray.runs import MANIFEST, RunFolder

ROOT = Path(__file__).parents[2]
ON_A_WIDE_PLAIN_TERMINAL = {"COLUMNS": "300", "TERM": "dumb", "NO_COLOR": "1"}


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], env=ON_A_WIDE_PLAIN_TERMINAL)


# Help


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("demo", ["tiny model", "--out"]),
        ("select", ["keep the best part", "CONFIG.yaml", "--set", "--out", "--address", "--limit", "--dry-run"]),
        ("sample-answers", ["candidate answers", "CONFIG.yaml", "--limit", "--dry-run"]),
        ("train-scorer", ["reliability scorer", "CONFIG.yaml", "--dry-run"]),
        ("calibrate", ["with a guarantee", "CONFIG.yaml", "--dry-run"]),
        ("predict", ["selectively", "CONFIG.yaml", "--limit", "--dry-run"]),
        ("serve", ["OpenAI", "CONFIG.yaml", "--detach", "--dry-run"]),
        ("ask", ["QUESTION", "--context", "--trace", "--json"]),
        ("tiny-model", ["small Llama", "--data", "--parameters", "--seed"]),
        ("submit", ["running cluster", "--address", "--follow"]),
        ("doctor", ["versions", "--address"]),
        ("validate", ["Check a configuration", "JOB", "CONFIG.yaml"]),
        ("schema", ["JSON Schema", "one of: select"]),
        ("plan", ["how long", "CONFIG.yaml"]),
        ("clean", ["Remove old run folders", "--yes", "--failed"]),
    ],
)
def test_help_says_what_a_command_does_and_takes(command: str, words: list[str]) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert [word for word in words if word not in result.output] == []


def test_every_command_is_listed_with_a_description_and_the_exit_codes_are_explained() -> None:
    result = invoke("--help")
    assert "Exit codes: 0 done, 1 failed" in " ".join(result.output.split())
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__
        assert (command.name or command.callback.__name__) in result.output


def test_every_command_turns_exceptions_into_exit_codes() -> None:
    bare = {
        c.callback.__name__ for c in app.registered_commands if c.callback and not hasattr(c.callback, "__wrapped__")
    }
    assert not bare


# Exit codes


def run_raising(error: BaseException) -> Any:
    small = typer.Typer(pretty_exceptions_enable=False)

    @small.command()
    @exits
    def command() -> None:
        raise error

    return CliRunner().invoke(small, [])


def test_what_the_user_must_change_is_exit_2_and_one_error_line_a_problem() -> None:
    result = run_raising(UserError("a.yaml:1: x: wrong\na.yaml:2: y: wrong"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "error: a.yaml:1: x: wrong\nerror: a.yaml:2: y: wrong\n"


def test_a_failure_is_exit_1_with_its_last_line_and_the_way_to_see_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STITCH_RAY_TRACEBACK", raising=False)
    result = run_raising(RuntimeError("Traceback of a worker\n  ...\nout of memory\n"))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[0] == "failed: RuntimeError: out of memory"
    assert "STITCH_RAY_TRACEBACK=1" in result.stderr
    assert run_raising(RuntimeError()).stderr.startswith("failed: RuntimeError: \n")


def test_a_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STITCH_RAY_TRACEBACK", "1")
    result = run_raising(RuntimeError("boom"))
    assert isinstance(result.exception, RuntimeError)
    assert run_raising(UserError("x")).exit_code == 2


def test_an_interrupt_is_exit_130_and_says_that_the_command_resumes() -> None:
    result = run_raising(KeyboardInterrupt())
    assert result.exit_code == 130
    assert "the same command resumes" in result.stderr


@pytest.mark.parametrize("code", [0, 3])
def test_an_exit_code_that_a_command_chose_is_kept(code: int) -> None:
    result = run_raising(typer.Exit(code))
    assert (result.exit_code, result.stderr) == (code, "")


# Errors from workers


class Worker(Exception):
    """As Ray wraps an error of a task: the original in `cause`, a traceback as text."""

    def __init__(self, cause: BaseException) -> None:
        super().__init__("a long traceback")
        self.cause = cause


def test_a_users_error_is_found_below_wrappers_causes_and_raise_from() -> None:
    assert str(user_error(UserError("plain"))) == "plain"
    assert str(user_error(Worker(UserError("wrapped")))) == "wrapped"
    assert str(user_error(Worker(Worker(UserError("twice"))))) == "twice"
    chained = RuntimeError("outer")
    chained.__cause__ = Worker(UserError("chained"))
    assert str(user_error(chained)) == "chained"
    assert run_raising(chained).stderr == "error: chained\n"
    for other in (RuntimeError("x"), Worker(ValueError("y")), None):
        assert user_error(other) is None


def test_a_users_error_of_a_real_ray_task_is_its_message_without_the_traceback() -> None:
    task = RayTaskError("read", "Traceback (most recent call last): ...", UserError("a.json: no such file"))
    for error in (task, task.as_instanceof_cause()):
        assert str(user_error(error)) == "a.json: no such file"
        assert run_raising(error).exit_code == 2


# Commands that start nothing


def test_schema_is_json_that_knows_the_smallest_configuration() -> None:
    result = invoke("schema", "select")
    assert result.exit_code == 0
    jsonschema.validate({"data": {"paths": ["a"]}, "models": [{"path": "m"}]}, json.loads(result.stdout))


@pytest.mark.parametrize("command", [("schema",), ("validate", "x.yaml")])
def test_an_unknown_job_is_exit_2_with_the_known_ones(command: tuple[str, ...]) -> None:
    result = invoke(command[0], "slect", *command[1:])
    assert result.exit_code == 2
    assert result.stderr == f"error: unknown job 'slect'; known: {', '.join(CONFIGS)}\n"


@pytest.mark.parametrize("command", [("select",), ("plan",), ("validate", "select"), ("select", "--dry-run")])
def test_a_wrong_configuration_is_exit_2_and_leaves_no_folder(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("data: {paths: [absent.json]}\nmodels: [{path: m}]\nratings: 1\n")
    result = invoke(*command, "c.yaml")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: c.yaml:3: ratings: unknown key")
    Path("c.yaml").write_text("data: {paths: [absent.json]}\nmodels: [{path: m}]\n")
    result = invoke(*command, "c.yaml")
    assert result.exit_code == 2
    assert "absent.json" in result.stderr
    assert os.listdir() == ["c.yaml"]


def test_limit_and_set_override_the_file(
    tmp_path: Path, corpus_file: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text(f"data: {{paths: [{corpus_file}]}}\nmodels: [{{path: {tiny_model}}}]\n")
    result = invoke("select", "c.yaml", "--dry-run", "--limit", 7, "--set", "rating.num_prompts=3")
    assert result.exit_code == 0
    assert "read   7 rows" in result.stdout
    assert ": 21 sequences" in result.stdout
    assert os.listdir(tmp_path) == ["c.yaml"]


# clean


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """One finished run, one failed run, and things that are none of our business."""
    for name, status in (("done", "done"), ("broken", "failed")):
        run = RunFolder.open(tmp_path / name, "select", {}, {})
        run.manifest["status"] = status
        run.save()
        (run.path / "ratings").mkdir()
        (run.path / "ratings" / "x.parquet").write_bytes(b"x" * 100_000)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    foreign = {"extension": '{"name": "an extension", "version": "1"}', "list": "[1]", "half": "{"}
    for name, text in foreign.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST).write_text(text)
    (tmp_path / "notes.txt").touch()
    return tmp_path


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_clean_only_lists_until_it_is_told_yes(runs: Path) -> None:
    before = left(runs)
    result = invoke("clean", runs)
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"would remove {runs / 'broken'} (failed, 0.1 MB)",
        f"would remove {runs / 'done'} (done, 0.1 MB)",
    ]
    assert left(runs) == before


def test_clean_removes_run_folders_and_nothing_else(runs: Path) -> None:
    before = left(runs)
    result = invoke("clean", runs, "--yes")
    assert result.exit_code == 0
    assert left(runs) == before - {"done", "broken"}


def test_clean_of_a_single_folder_leaves_its_neighbours(runs: Path) -> None:
    before = left(runs)
    assert invoke("clean", runs / "done", "--yes").exit_code == 0
    assert left(runs) == before - {"done"}


def test_clean_failed_leaves_finished_runs(runs: Path) -> None:
    before = left(runs)
    assert invoke("clean", runs, "--yes", "--failed").exit_code == 0
    assert left(runs) == before - {"broken"}


def test_clean_takes_a_folder_named_twice_and_runs_inside_a_run_once(runs: Path) -> None:
    before = left(runs)
    for name in ("aaa", "zzz"):
        RunFolder.open(runs / "done" / name, "select", {}, {})
    result = invoke("clean", runs / "done", runs / "done", runs, "--yes")
    assert result.exit_code == 0
    assert result.stdout.count("removed ") == 2
    assert left(runs) == before - {"done", "broken"}


def test_clean_without_a_run_folder_is_exit_2_even_where_another_tool_has_a_manifest(runs: Path) -> None:
    for folder in ("model", "extension", "list", "half", "absent"):
        result = invoke("clean", runs / folder, "--yes")
        assert result.exit_code == 2
        assert result.stderr.startswith("error: no run folder in")
    assert {"model", "extension", "list", "half"} <= left(runs)


# jobs/


@pytest.mark.parametrize("job", sorted(file.stem for file in (ROOT / "jobs").glob("[!_]*.py")))
def test_a_job_started_as_a_file_says_how_to_run_it(job: str) -> None:
    """`jobs/select.py` as a script shadows the standard library's `select`."""
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / f"{job}.py", "--help"], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.strip() == f"run: python -m jobs.{job}"


def test_a_job_started_as_a_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jobs.select", "absent.yaml"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot read the configuration absent.yaml")


def test_serve_is_not_submitted_as_a_job(tmp_path: Path) -> None:
    result = invoke("submit", "serve", tmp_path / "serve.yaml", "--address", "http://127.0.0.1:1")
    assert result.exit_code == 2
    assert "--detach" in result.output

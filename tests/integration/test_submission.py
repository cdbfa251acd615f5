"""Jobs sent to a real Ray head of their own, started on free ports and stopped with everything it started."""

import contextlib
import json
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobStatus
from typer.testing import CliRunner

import stitch_ray
from stitch_ray.cli import app
from stitch_ray.errors import UserError
from stitch_ray.submission import _connect, _submit_entrypoint, submit

pytestmark = pytest.mark.ray

START_TIMEOUT_S = 120


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def takes_jobs(url: str) -> bool:
    """Whether a job is accepted: the agent that runs it may be up later than the dashboard."""
    try:
        _connect(url).submit_job(entrypoint="true")
    except (UserError, RuntimeError, OSError):
        return False
    return True


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """URL of the dashboard of a Ray head that nothing else on this machine uses."""
    port, dashboard, agent, metrics, client = free_ports(5)
    # Not pytest's tmp_path: Ray puts sockets below it, and their paths may have 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="sr-", ignore_cleanup_errors=True) as temp_dir:
        log = Path(temp_dir, "head.log")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        # As after a user's first local ray.init(): with a token. This process is only told where it lies.
        token = Path(temp_dir, "token")
        token.write_text(secrets.token_hex(32))
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        # A job runs the `python` that the head finds on PATH.
        environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
        command += [f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}", f"--temp-dir={temp_dir}"]
        command += ["--include-dashboard=true", "--object-store-memory=100000000", "--disable-usage-stats"]
        with log.open("w") as output:
            process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        url = f"http://127.0.0.1:{dashboard}"
        patch = pytest.MonkeyPatch()
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not takes_jobs(url):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.5)
            yield url
        finally:
            patch.undo()
            process.terminate()  # `ray start --block` then stops what it started
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def submission_id() -> str:
    return f"test-{uuid.uuid4().hex[:8]}"


def shell(script: str) -> str:
    return shlex.join(["sh", "-c", script])


def test_follow_echoes_the_log_and_returns_the_exit_code(head: str, submission_id: str) -> None:
    lines: list[str] = []
    script = shell("printf '%s\\n' one; printf 'two, without an end of line'; exit 3")
    code = _submit_entrypoint(_connect(head), script, submission_id, runtime_env={}, follow=True, echo=lines.append)
    assert code == 3
    log = "\n".join(lines)  # the head's own lines may come between, even within a line
    assert "one" in log.split()
    assert "two, without an end of line" in log


def test_a_killed_driver_has_the_exit_code_a_shell_gives_it(head: str, submission_id: str) -> None:
    code = _submit_entrypoint(_connect(head), "kill -9 $$", submission_id, runtime_env={}, follow=True)
    assert code == 128 + signal.SIGKILL


def test_the_same_job_runs_once_and_a_second_submit_attaches(head: str, submission_id: str, tmp_path: Path) -> None:
    runs, go_on = tmp_path / "runs", tmp_path / "go-on"
    script = shell(f"echo ran >> {runs}; while ! test -e {go_on}; do sleep 0.1; done; echo finished; exit 0")
    client = _connect(head)

    first: list[str] = []
    assert _submit_entrypoint(client, script, submission_id, runtime_env={}, echo=first.append) == 0
    assert any("submitted" in line for line in first)
    assert any(f"ray job logs --address {head} --follow {submission_id}" in line for line in first)

    while_running: list[str] = []
    assert _submit_entrypoint(client, script, submission_id, runtime_env={}, echo=while_running.append) == 0
    assert "not run a second time" in while_running[0]
    with pytest.raises(UserError, match=f"ray job stop --address {head} {submission_id}"):
        _submit_entrypoint(client, script, submission_id, runtime_env={}, overwrite=True)

    go_on.touch()
    followed: list[str] = []
    for _ in range(2):  # the first may attach to the running job, the second finds it ended
        followed.clear()
        assert _submit_entrypoint(client, script, submission_id, runtime_env={}, follow=True, echo=followed.append) == 0
        assert "finished" in followed
    assert runs.read_text() == "ran\n"

    code = _submit_entrypoint(client, script, submission_id, runtime_env={}, overwrite=True, follow=True)
    assert code == 0
    assert runs.read_text() == "ran\nran\n"


def test_a_failed_job_is_submitted_again_as_the_next_attempt(head: str, submission_id: str, tmp_path: Path) -> None:
    attempts = tmp_path / "attempts"
    script = shell(f"echo x >> {attempts}; n=$(wc -l < {attempts}); echo attempt $n; test $n -ge 2 || exit 5")
    client = _connect(head)
    for attempt, code in [(1, 5), (2, 0), (2, 0)]:  # a third submit attaches to the second attempt
        lines: list[str] = []
        assert _submit_entrypoint(client, script, submission_id, runtime_env={}, follow=True, echo=lines.append) == code
        assert [line for line in lines if line.startswith("attempt")] == [f"attempt {attempt}"]
    assert attempts.read_text() == "x\n" * 2
    ids = {job.submission_id for job in client.list_jobs()}
    assert {submission_id, f"{submission_id}-2"} <= ids


@pytest.mark.slow
def test_a_stopped_job_can_be_submitted_again_at_once(head: str, submission_id: str) -> None:
    client = _connect(head)
    _submit_entrypoint(client, "sleep 600", submission_id, runtime_env={})
    while client.get_job_status(submission_id) == JobStatus.PENDING:
        time.sleep(0.05)
    client.stop_job(submission_id)
    while client.get_job_status(submission_id) != JobStatus.STOPPED:
        time.sleep(0.01)
    assert _submit_entrypoint(client, "exit 0", submission_id, runtime_env={}, follow=True) == 0


def test_without_its_token_the_cluster_is_not_entered(
    head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    with pytest.raises(UserError, match="ray get-auth-token"):
        _connect(head)


PROBE_JOB = """
if not __package__:
    raise SystemExit("run: python -m jobs.probe_job")
import pathlib, sys
import ray
import jobs, stitch_ray

@ray.remote
def module_on_a_worker():
    import jobs, stitch_ray
    return jobs.__file__, stitch_ray.__file__

if __name__ == "__main__":
    ray.init()
    print("arguments", sys.argv[1:])
    print("config", pathlib.Path(sys.argv[1]).read_text())
    print("driver", jobs.__file__, stitch_ray.__file__)
    print("worker", *ray.get(module_on_a_worker.remote()))
"""


def test_submit_ships_the_config_and_the_code(head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # Ray's client would go there instead of to `address`
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    (jobs / "__init__.py").touch()
    (jobs / "probe_job.py").write_text(PROBE_JOB)
    config = tmp_path / "any-name.yml"
    config.write_text("rows: 3\n")
    lines: list[str] = []
    code = submit(
        "probe-job",
        config,
        address=head,
        overrides=["a.b=1", "name=two words"],
        out=tmp_path / "run",
        work_hash="0123456789abcdef",
        follow=True,
        packages=[jobs, Path(stitch_ray.__file__).parent],
        echo=lines.append,
    )
    log = "\n".join(lines)
    assert code == 0, log
    assert lines[0].startswith("probe-job-01234567-")
    arguments = ["config.yaml", "--out", str(tmp_path / "run"), "--set", "a.b=1", "--set", "name=two words"]
    assert f"arguments {arguments}" in lines
    assert "config rows: 3" in lines
    places = [line for line in lines if line.startswith(("driver", "worker"))]
    assert len(places) == 2
    assert all("py_modules_files" in place for line in places for place in line.split()[1:])
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:1"


@pytest.mark.parametrize("address", ["http://127.0.0.1:1", "127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_a_cluster_out_of_reach_is_named(tmp_path: Path, address: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("rows: 3\n")
    with pytest.raises(UserError, match=address):
        submit("select", config, address=address, work_hash="0123456789abcdef")


@pytest.mark.slow
def test_finetune_runs_as_a_job_on_a_cluster(head: str, tiny_model: Path, corpus_file: Path, tmp_path: Path) -> None:
    config = {
        "model": {"path": str(tiny_model)},
        "tasks": [{"name": "chat", "data": str(corpus_file)}],
        "max_length": 256,
        "batch": {"tokens": 512},
        "max_steps": 2,
        "limit": 20,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    command = ["submit", "finetune", str(tmp_path / "config.yaml"), "--address", head, "--follow"]
    found = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run")])
    assert found.exit_code == 0, found.output
    assert "finetune: 2 steps, 20 of 20 rows" in found.stdout
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "done"
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    again = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "run")])
    assert again.exit_code == 0
    assert "not run a second time" in again.stdout

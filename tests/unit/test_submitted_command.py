"""What is sent to a cluster for a job, and what becomes of a job that was sent before, with a cluster of the test's own."""

from __future__ import annotations

import importlib
import os
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus, JobType

from stitch_ray import submission
from stitch_ray.config import CONFIGS
from stitch_ray.errors import UserError
from stitch_ray.submission import _command, submit

ADDRESS = "http://head:8265"
HASH = "0123456789abcdef"


@pytest.mark.parametrize("job", sorted(set(CONFIGS) - {"serve"}))
def test_every_job_has_a_module_that_can_be_run(job: str) -> None:
    module, *member = _command(job)
    found = importlib.import_module(module)
    if member:
        assert member[0] in {command.name or command.callback.__name__ for command in found.exar.registered_commands}
    else:
        assert callable(getattr(found, job.replace("-", "_")))


@dataclass
class Cluster:
    """`jobs`: id -> how it stands; `sent`: what was submitted; `log`: what every connection to a job's log brings, an
    exception to break off with. `refuses`: what submitting raises."""

    jobs: dict[str, JobDetails] = field(default_factory=dict)
    sent: list[dict[str, Any]] = field(default_factory=list)
    log: list[list[str | Exception]] = field(default_factory=list)
    refuses: Exception | None = None
    ends: tuple[JobStatus, int | None] = (JobStatus.SUCCEEDED, 0)

    def add(self, name: str, status: JobStatus, code: int | None = None) -> None:
        kind = {"type": JobType.SUBMISSION, "entrypoint": "", "driver_exit_code": code}
        self.jobs[name] = JobDetails(submission_id=name, status=status, **kind)

    def get_address(self) -> str:
        return ADDRESS

    def list_jobs(self) -> list[JobDetails]:
        return list(self.jobs.values())

    def submit_job(self, **job: Any) -> None:
        job["config"] = Path(job["runtime_env"]["working_dir"], "config.yaml").read_text("utf-8")
        self.sent.append(job)
        if self.refuses is not None:
            raise self.refuses
        self.add(job["submission_id"], JobStatus.PENDING)

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        if len(self.log) == 1:
            self.add(submission_id, *self.ends)
        for piece in self.log.pop(0):
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def get_job_info(self, submission_id: str) -> JobDetails:
        return self.jobs[submission_id]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(submission, "_connect", lambda address: found)
    monkeypatch.setattr(submission, "time", SimpleNamespace(sleep=lambda seconds: None))
    return found


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "any.yml").write_text("rows: 3\n")
    return tmp_path / "any.yml"


def send(config: Path, job: str = "sample-answers", **options: Any) -> tuple[int, list[str]]:
    told: list[str] = []
    values: dict[str, Any] = {"out": config.parent / "run", "packages": [Path("/code/stitch_ray")], **options}
    code = submit(job, config, address=ADDRESS, work_hash=HASH, echo=told.append, **values)
    return code, told


def test_the_configuration_travels_and_the_command_names_folder_and_overrides(cluster: Cluster, config: Path) -> None:
    code, told = send(config, overrides=["a.b=1", "name=two words"], overwrite=True)
    (job,) = cluster.sent
    assert shlex.split(job["entrypoint"]) == [
        *("python", "-m", "jobs.sample_answers", "config.yaml", "--out", str(config.parent / "run")),
        *("--set", "a.b=1", "--set", "name=two words", "--overwrite"),
    ]
    assert job["config"] == "rows: 3\n"
    assert job["runtime_env"]["py_modules"] == ["/code/stitch_ray"]
    assert job["metadata"] == {"job": "sample-answers", "out": str(config.parent / "run"), "work_hash": HASH}
    assert code == 0
    assert told[0] == f"{job['submission_id']} submitted to {ADDRESS}"
    assert f"ray job logs --address {ADDRESS} --follow {job['submission_id']} " in told[1]


def test_a_member_of_a_group_is_its_subcommand(cluster: Cluster, config: Path) -> None:
    send(config, "exar-merge")
    assert shlex.split(cluster.sent[0]["entrypoint"])[:4] == ["python", "-m", "jobs.exar", "merge"]


def test_the_id_is_that_of_the_work_and_its_folder(
    cluster: Cluster, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(config.parent)
    for out in (None, Path("runs/sample-answers-01234567"), Path("elsewhere")):
        cluster.jobs.clear()
        send(config, out=out)
    first, same, other = (job["submission_id"] for job in cluster.sent)
    assert first.startswith("sample-answers-01234567-")
    assert first == same != other
    assert cluster.sent[0]["metadata"]["out"] == os.path.abspath("runs/sample-answers-01234567")


@pytest.mark.parametrize("status", [JobStatus.PENDING, JobStatus.RUNNING, JobStatus.SUCCEEDED])
def test_a_job_that_runs_or_is_done_is_attached_to(cluster: Cluster, config: Path, status: JobStatus) -> None:
    send(config)
    name = cluster.sent[0]["submission_id"]
    cluster.add(name, status)
    _, told = send(config)
    assert len(cluster.sent) == 1
    assert told[0] == f"{name} is already on {ADDRESS} ({status.value}): attached, not run a second time"


@pytest.mark.parametrize("status", [JobStatus.FAILED, JobStatus.STOPPED])
def test_a_job_that_failed_or_was_stopped_is_sent_again_as_the_next_attempt(
    cluster: Cluster, config: Path, status: JobStatus
) -> None:
    send(config)
    name = cluster.sent[0]["submission_id"]
    for number in (1, 2, 9):  # 3 to 8 were removed by the cluster
        cluster.add(name if number == 1 else f"{name}-{number}", status)
    cluster.add(f"{name}-of-somebody-else", JobStatus.RUNNING)
    _, told = send(config)
    assert cluster.sent[-1]["submission_id"] == f"{name}-10"
    assert told[0] == f"{name}-9 has {status.value} on {ADDRESS}: submitting it again"


def test_a_job_that_succeeded_is_run_again_only_with_overwrite_and_a_running_one_never(
    cluster: Cluster, config: Path
) -> None:
    send(config)
    name = cluster.sent[0]["submission_id"]
    with pytest.raises(UserError, match=rf"is PENDING on .* ray job stop --address {ADDRESS} {name}"):
        send(config, overwrite=True)
    cluster.add(name, JobStatus.SUCCEEDED)
    send(config, overwrite=True)
    assert [job["submission_id"] for job in cluster.sent] == [name, f"{name}-2"]


def test_a_job_that_another_command_sends_in_this_moment_is_attached_to(
    cluster: Cluster, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(**job: Any) -> None:
        cluster.add(job["submission_id"], JobStatus.RUNNING)
        raise RuntimeError("already exists")

    monkeypatch.setattr(cluster, "submit_job", taken)
    code, told = send(config)
    assert (code, "(RUNNING): attached, not run a second time" in told[0]) == (0, True)


def test_a_cluster_that_refuses_is_the_users_error(cluster: Cluster, config: Path) -> None:
    cluster.refuses = RuntimeError("no room for py_modules")
    with pytest.raises(UserError, match=f"{ADDRESS} did not accept .*: no room for py_modules"):
        send(config)


def test_a_configuration_that_cannot_be_read_is_told_before_anybody_is_asked(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        send(tmp_path / "none.yaml")
    assert cluster.sent == []


# Following


def test_the_log_is_told_line_by_line_once_however_often_the_connection_breaks(cluster: Cluster, config: Path) -> None:
    cluster.log = [["one\ntw", OSError("reset")], ["one\ntwo\nth", RuntimeError("reset")], ["one\ntwo\nthree"]]
    code, told = send(config, follow=True)
    assert code == 0
    assert told[1:-1] == ["one", "two", "three"]
    assert told[-1].endswith("has SUCCEEDED")


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        (JobStatus.SUCCEEDED, 0, 0),
        (JobStatus.FAILED, 3, 3),
        (JobStatus.FAILED, None, 1),
        (JobStatus.STOPPED, 0, 1),
        (JobStatus.FAILED, -9, 137),
    ],
)
def test_the_exit_code_is_that_of_the_driver_as_a_shell_gives_it(
    cluster: Cluster, config: Path, status: JobStatus, driver: int | None, code: int
) -> None:
    cluster.log, cluster.ends = [["done\n"]], (status, driver)
    assert send(config, follow=True)[0] == code


def test_a_cluster_that_stays_silent_ends_the_following_and_leaves_the_job(cluster: Cluster, config: Path) -> None:
    cluster.log = [[OSError("gone")] for _ in range(submission._MAX_FOLLOW_FAILURES + 1)]
    with pytest.raises(UserError, match=r"stopped answering while .* \(gone\)\. Run the same command again"):
        send(config, follow=True)
    assert len(cluster.log) == 1


# Reaching a cluster


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://127.0.0.1:10001", "auto"])
def test_what_is_no_dashboard_is_refused_with_an_example(config: Path, address: str) -> None:
    with pytest.raises(UserError, match=r"not the URL of a Ray dashboard; give one like http://127\.0\.0\.1:8265"):
        submit("select", config, address=address, work_hash=HASH)


def test_a_token_comes_from_the_environment_or_from_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert submission._token() is None
    (tmp_path / "token").write_text("of-the-file\n")
    assert submission._token() == "of-the-file"
    monkeypatch.setenv("RAY_AUTH_TOKEN", " of-the-environment ")
    assert submission._token() == "of-the-environment"


def test_an_address_of_the_environment_is_hidden_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)

    def fail() -> None:
        with submission._without_ray_address():
            assert "RAY_ADDRESS" not in os.environ
            raise OSError("away")

    with pytest.raises(OSError, match="away"):
        fail()
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:1"
    assert "RAY_API_SERVER_ADDRESS" not in os.environ


def test_the_packages_that_are_sent_are_those_of_this_checkout() -> None:
    root = Path(__file__).parents[2]
    assert submission._installed_packages() == [root / name for name in submission.PACKAGES]

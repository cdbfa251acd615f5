"""Send a job to a running cluster through Ray's Jobs API, so that sending the same job again cannot run it twice."""

import asyncio
import contextlib
import hashlib
import importlib.util
import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from stitch_ray.errors import UserError

# Shipped with every job, so that the cluster runs the code this command was started from and not the version that
# happens to be installed on its nodes. Everything these import must be installed there.
PACKAGES = ("stitch_ray", "jobs", "serve_apps")

# Ray lets these override the address passed to its client.
_ADDRESS_VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")

# Attempts, a second apart, to reach a cluster that stopped answering while its job is followed.
_MAX_FOLLOW_FAILURES = 10


def submit(
    job: str,
    config: Path,
    *,
    address: str,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    overwrite: bool = False,
    follow: bool = False,
    work_hash: str,
    packages: Sequence[Path] | None = None,
    echo: Callable[[str], None] = print,
) -> int:
    """Run `python -m jobs.JOB config.yaml` on the cluster whose dashboard is at `address`; return an exit code.

    Args:
        job: name of the job as on the command line, e.g. "sample-answers".
        config: the YAML file. Its text travels with the job; the data it names must be visible to every node.
        address: URL of the dashboard, e.g. "http://127.0.0.1:8265".
        overrides: `--set` assignments, in order.
        out: the run folder (default: runs/JOB-<work_hash[:8]> here). It must be the same folder on every node.
        overwrite: start over. A running job is not touched: stop it first.
        follow: print the job's log as it comes and return its exit code. Otherwise return 0 once it is submitted.
        work_hash: hash of what decides the job's result. With `out` it makes the submission id: the same work into
            the same folder is one job. If it is running or has succeeded this command attaches to it; if it failed
            or was stopped it is submitted again, as ID-2, ID-3 and so on, and resumes from its run folder.
        packages: folders of the packages to ship (default: those of this installation).
        echo: prints one line.

    Raises:
        UserError: the cluster cannot be reached or refuses the job, the config cannot be read, or `overwrite` meets
            a running job.
    """
    folder = os.path.abspath(out if out is not None else Path("runs") / f"{job}-{work_hash[:8]}")
    submission_id = f"{job}-{work_hash[:8]}-{hashlib.sha256(folder.encode()).hexdigest()[:8]}"
    entrypoint = ["python", "-m", *_command(job), "config.yaml", "--out", folder]
    for override in overrides:
        entrypoint += ["--set", override]
    if overwrite:
        entrypoint.append("--overwrite")

    try:
        text = config.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{config}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    client = _connect(address)
    with tempfile.TemporaryDirectory(prefix="stitch-ray-submit-") as working_dir:
        Path(working_dir, "config.yaml").write_text(text, encoding="utf-8")
        return _submit_entrypoint(
            client,
            shlex.join(entrypoint),
            submission_id,
            runtime_env={
                "working_dir": working_dir,
                "py_modules": [str(package) for package in packages or _installed_packages()],
                "excludes": ["__pycache__"],
            },
            metadata={"job": job, "out": folder, "work_hash": work_hash},
            overwrite=overwrite,
            follow=follow,
            echo=echo,
        )


def _command(job: str) -> list[str]:
    """Module and, of a group of jobs, the one that is meant: `exar-merge` is `jobs.exar merge`."""
    group, _, member = job.partition("-")
    return [f"jobs.{group}", member] if group == "exar" else [f"jobs.{job.replace('-', '_')}"]


def _submit_entrypoint(
    client: JobSubmissionClient,
    entrypoint: str,
    submission_id: str,
    *,
    runtime_env: dict[str, Any],
    metadata: dict[str, str] | None = None,
    overwrite: bool = False,
    follow: bool = False,
    echo: Callable[[str], None] = print,
) -> int:
    """Submit, resubmit or attach, as `submit` describes."""
    address = client.get_address()
    attempt, job = _last_attempt(client, submission_id)
    if job is not None and overwrite and not job.status.is_terminal():
        raise UserError(
            f"{job.submission_id} is {job.status.value} on {address}: --overwrite would pull its folder away. "
            f"Stop it first: ray job stop --address {address} {job.submission_id}"
        )
    if job is not None and (overwrite or job.status in (JobStatus.FAILED, JobStatus.STOPPED)):
        echo(f"{job.submission_id} has {job.status.value} on {address}: submitting it again")
        job = None

    if job is None:
        # Not the same id after delete_job: the end of the old attempt can still take the new one with it.
        this_attempt = submission_id if attempt == 0 else f"{submission_id}-{attempt + 1}"
        try:
            client.submit_job(
                entrypoint=entrypoint, submission_id=this_attempt, runtime_env=runtime_env, metadata=metadata
            )
            echo(f"{this_attempt} submitted to {address}")
        except RuntimeError as error:
            _, job = _last_attempt(client, submission_id)
            if job is None or job.submission_id != this_attempt:
                raise UserError(f"{address} did not accept {this_attempt}: {error}") from error
            # Otherwise someone else sent the same job in this moment.
    if job is not None:
        this_attempt = str(job.submission_id)
        echo(f"{this_attempt} is already on {address} ({job.status.value}): attached, not run a second time")

    if follow:
        return _follow(client, this_attempt, echo=echo)
    echo(f"  log    ray job logs --address {address} --follow {this_attempt}   (or this command with --follow)")
    echo(f"  state  ray job status --address {address} {this_attempt}")
    echo(f"  stop   ray job stop --address {address} {this_attempt}")
    return 0


def _last_attempt(client: JobSubmissionClient, submission_id: str) -> tuple[int, JobDetails | None]:
    """The number of the last attempt and its job: ID is the first, ID-2 the second. (0, None) if there is none."""
    attempts = {}
    for job in client.list_jobs():
        match = re.fullmatch(re.escape(submission_id) + r"(?:-(\d+))?", job.submission_id or "")
        if match:
            attempts[int(match[1] or 1)] = job
    last = max(attempts, default=0)
    return last, attempts.get(last)


def _connect(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise UserError(f"{address}: not the URL of a Ray dashboard; give one like http://127.0.0.1:8265")
    for module in ("job.sdk", "dashboard_sdk"):  # they report each upload and closed socket
        logging.getLogger(f"ray.dashboard.modules.{module}").setLevel(logging.WARNING)
    try:
        with _without_ray_address():
            try:
                return JobSubmissionClient(address)
            except AuthenticationError:
                # Ray >= 2.60 starts clusters with a token as soon as there is one on the machine, but its client
                # only sends it in processes with RAY_AUTH_MODE=token.
                token = _token()
                if token is None:
                    raise
                return JobSubmissionClient(address, headers={"Authorization": f"Bearer {token}"})
    except AuthenticationError as error:
        raise UserError(
            f"{address}: the cluster asks for a token and accepts none from here. Put the head's token (there: "
            "`ray get-auth-token`) into RAY_AUTH_TOKEN, or into a file named by RAY_AUTH_TOKEN_PATH"
        ) from error
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(
            f"{address}: no Ray cluster takes jobs there ({error}). Give the URL of the head's dashboard, usually on "
            "port 8265; from another machine forward that port (ssh -L, kubectl port-forward, ray dashboard)"
        ) from error


def _token() -> str | None:
    """The cluster's token, from the places in which Ray looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


@contextlib.contextmanager
def _without_ray_address() -> Iterator[None]:
    hidden = {name: os.environ.pop(name) for name in _ADDRESS_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _installed_packages() -> list[Path]:
    """The folders of PACKAGES, found without importing them."""
    folders = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"the package {name} is not installed here; run `make install`")
        folders.append(Path(spec.submodule_search_locations[0]))
    return folders


def _follow(client: JobSubmissionClient, submission_id: str, *, echo: Callable[[str], None]) -> int:
    """Echo the job's log until it has ended; return the exit code of its driver."""
    shown = 0  # characters
    unfinished = ""
    failures = 0

    async def tail() -> None:
        nonlocal shown, unfinished
        position = 0  # every connection starts at the beginning of the log
        async for text in client.tail_job_logs(submission_id):
            *lines, unfinished = (unfinished + text[max(0, shown - position) :]).split("\n")
            position += len(text)
            shown = max(shown, position)
            for line in lines:
                echo(line)

    try:
        while True:
            try:
                asyncio.run(tail())
                job = client.get_job_info(submission_id)
                if job.status.is_terminal():
                    break
                failures = 0
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                failures += 1
                if failures == _MAX_FOLLOW_FAILURES:
                    raise UserError(
                        f"{client.get_address()} stopped answering while {submission_id} was followed ({error}). "
                        "Run the same command again to attach to the job"
                    ) from error
            time.sleep(1)
    except KeyboardInterrupt:
        echo(f"{submission_id} goes on; to stop it: ray job stop --address {client.get_address()} {submission_id}")
        raise
    if unfinished:
        echo(unfinished)
    echo(f"{submission_id} has {job.status.value}")
    return _exit_code(job)


def _exit_code(job: JobDetails) -> int:
    if job.status == JobStatus.SUCCEEDED:
        return 0
    code = job.driver_exit_code or 1  # 0 or None: stopped, or never started
    return code if code > 0 else 128 - code  # -N: killed by signal N, as a shell reports it

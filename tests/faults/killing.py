"""Everything private that the fault tests need: commands in a world of their own, and ways to kill parts of it.

A `Command` is one of the jobs with a Ray of its own. All its processes, Ray's daemons and workers included, carry a mark
in their environment; only processes with that mark are ever looked at or killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_MARK = "STITCH_RAY_TEST_MARK"
_POLL_S = 0.005


@dataclass
class Command:
    """A running job. `mark` is on all its processes; `log` is its audit, STITCH_RAY_CALL_LOG."""

    process: subprocess.Popen[str]
    mark: str
    log: Path
    deadline_s: float

    def entries(self) -> list[list[str]]:
        """The fields of every whole line of the audit so far, over all commands that wrote to the same log."""
        text = self.log.read_text() if self.log.exists() else ""
        return [line.split("\t") for line in text.split("\n")[:-1]]

    def until(self, condition: Callable[[], bool], what: str) -> bool:
        """Wait for `condition`; False if the command ended first. Fails if neither happens."""
        deadline = time.monotonic() + self.deadline_s
        while time.monotonic() < deadline:
            if condition():
                return True
            if self.process.poll() is not None:
                return False
            time.sleep(_POLL_S)
        raise AssertionError(f"{what}: not seen within {self.deadline_s} s\n{self.errors()}")

    def finish(self) -> tuple[int, str]:
        """Exit code and stderr."""
        try:
            code = self.process.wait(self.deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {self.deadline_s} s\n{self.errors()}") from None
        return code, self.errors()

    def errors(self) -> str:
        return self.log.with_suffix(".stderr").read_text()

    def workers(self, title: str) -> list[int]:
        """Process ids of the Ray workers whose title begins so, in ascending order."""
        return sorted(pid for pid in self.processes() if title_of(pid).startswith(title))

    def processes(self) -> list[int]:
        """Ids of all its processes that are alive."""
        return _marked(self.mark)

    def kill_all(self) -> None:
        """SIGKILL to the driver, Ray's daemons and all workers, until nothing is left."""
        deadline = time.monotonic() + 30
        while pids := self.processes():
            for pid in pids:
                kill(pid)
            assert time.monotonic() < deadline, f"processes {pids} do not die"
            time.sleep(_POLL_S)
        self.process.wait()


@dataclass
class World:
    """Where commands of one job run: a folder for Ray's files, the audit log, and the commands started so far.

    `deadline_s` is how long a test waits for what it expects.
    """

    folder: Path
    log: Path
    job: str
    deadline_s: float
    environment: dict[str, str] = field(default_factory=dict)
    started: list[Command] = field(default_factory=list)

    def start(self, config: Path, out: Path, *options: str) -> Command:
        """`options` go to the command, behind its configuration and run folder."""
        mark = uuid.uuid4().hex
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
            "RAY_TMPDIR": str(self.folder),
            "RAY_AUTH_MODE": "disabled",
            "STITCH_RAY_CALL_LOG": str(self.log),
            _MARK: mark,
            **self.environment,
        }
        with self.log.with_suffix(".stderr").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "-m", f"jobs.{self.job}", str(config), "--out", str(out), *options],
                stdout=subprocess.DEVNULL,
                stderr=errors,
                text=True,
                env=environment,
                start_new_session=True,
            )
        self.started.append(Command(process, mark, self.log, self.deadline_s))
        return self.started[-1]


@contextmanager
def world(log: Path, job: str, deadline_s: float = 240, **environment: str) -> Iterator[World]:
    """Nothing that was started in it survives it."""
    # Not pytest's tmp_path: Ray puts sockets below it, and their paths may have 107 characters at most.
    found = World(Path(tempfile.mkdtemp(prefix="sr-", dir="/tmp")), log, job, deadline_s, environment)
    try:
        yield found
    finally:
        for command in found.started:
            command.kill_all()
        shutil.rmtree(found.folder, ignore_errors=True)


def kill(pid: int) -> None:
    """SIGKILL, if it is there still."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def workers_below(roots: Sequence[int], title: str) -> list[int]:
    """Ray workers whose title begins so among the descendants of `roots`, such as the raylet of a simulated node."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := _parent(int(entry.name))):
            children.setdefault(parent, []).append(int(entry.name))
    found, left = [], list(roots)
    while left:
        pid = left.pop()
        left += children.get(pid, [])
        if title_of(pid).startswith(title):
            found.append(pid)
    return found


def _marked(mark: str) -> list[int]:
    needle = f"{_MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and entry.name != str(os.getpid()):
            try:
                marked = needle in (entry / "environ").read_bytes()
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
            except OSError:  # gone, or not ours
                continue
            if marked and alive:
                found.append(int(entry.name))
    return found


def title_of(pid: int) -> str:
    """Its command line, or what Ray shows in its place; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
    except OSError:
        return ""


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0

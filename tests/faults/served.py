"""A served ensemble of scripted members in a world of its own, to be broken. As a program: that world.

The parent writes one JSON object a line, {name of a function of `_COMMANDS`: arguments}, and the child answers with one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stitch_ray.config.serve import ServeConfig
from tests.faults.killing import Command

MEMBERS = ("Primary", "Auxiliary1", "Auxiliary2", "ReliabilityScorer")
PROFILE = os.environ.get("STITCH_RAY_TEST_PROFILE", "throughput")
_LONGEST_S = 240.0


class Served:
    """The parent's side. `folder` holds policies and calls.log."""

    def __init__(self, command: Command, folder: Path) -> None:
        self._command = command
        self._deployed: dict[str, Any] | None = None
        self.folder = folder
        self.url = ""
        self.profile = ""

    def config(self, **changes: Any) -> ServeConfig:
        from tests.serving.scripted import scripted_config

        return scripted_config(self.folder, profile=PROFILE, **changes)

    def deploy(self, config: dict[str, Any] | None = None, **application: Any) -> str | None:
        """Bring it to this state, unless it is there, and wait. Returns why that failed, if it did.

        config: changes of `scripted_config`; application: arguments of `scripted_application`.
        """
        wanted = {"config": config or {}, "application": application}
        if wanted == self._deployed:
            return None
        self._deployed = None
        found = self._ask("deploy", wanted)
        self.url, self.profile = found["url"], found.get("profile", self.profile)
        if "error" not in found:
            self._deployed = wanted
        return found.get("error")

    def running(self) -> dict[str, int]:
        """Deployment -> replicas that run, as Serve knows."""
        found: dict[str, int] = self._ask("running", {})
        return found

    def pids(self, deployment: str) -> list[int]:
        return self._command.workers(f"ray::ServeReplica:stitch:{deployment}")

    def until(self, condition: Callable[[], bool], what: str, within_s: float = 90) -> float:
        """Seconds until `condition`. Fails if it does not come."""
        started = time.monotonic()
        while not condition():
            assert time.monotonic() - started < within_s, f"{what}: not seen within {within_s} s"
            time.sleep(0.05)
        return time.monotonic() - started

    def until_replaced(self, deployment: str, victims: list[int], number: int) -> float:
        """Seconds until `number` replicas run and none of them is of `victims`."""

        def replaced() -> bool:
            pids = self.pids(deployment)
            return not set(pids) & set(victims) and len(pids) == number and self.running()[deployment] == number

        return self.until(replaced, f"{number} replicas of {deployment}")

    def calls(self, what: str) -> int:
        """How often a line of the members' log holds `what`."""
        log = self.folder / "calls.log"
        return log.read_text().count(what) if log.exists() else 0

    def cannot_start(self, *versions: str) -> None:
        """From now on no replica of these member versions starts."""
        from tests.serving.scripted import cannot_start

        cannot_start(self.folder / "calls.log").write_text(" ".join(versions))

    def _ask(self, command: str, arguments: dict[str, Any]) -> Any:
        process = self._command.process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({command: arguments}) + "\n")
        process.stdin.flush()
        for line in process.stdout:  # Ray's own lines are passed over
            if line.startswith("{"):
                return json.loads(line)
        raise AssertionError(f"the served ensemble is gone\n{self._command.errors()[-4000:]}")


@contextmanager
def served() -> Iterator[Served]:
    """Nothing is deployed yet, and nothing of it survives."""
    folder = Path(tempfile.mkdtemp(prefix="sr-", dir="/tmp"))  # Ray's sockets have short paths at most
    mark = uuid.uuid4().hex
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "disabled",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "STITCH_RAY_TEST_MARK": mark,
    }
    log = folder / "log"
    with log.with_suffix(".stderr").open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.served", PROFILE, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )
    command = Command(process, mark, log, _LONGEST_S)
    try:
        yield Served(command, folder)
    finally:
        command.kill_all()
        shutil.rmtree(folder, ignore_errors=True)


def main(profile: str, folder: Path) -> None:
    from serve_apps import deploying

    deploying.choose_profile(profile)
    from stitch_ray.ray_session import session

    with session(num_cpus=4):
        for line in sys.stdin:
            [(command, arguments)] = json.loads(line).items()
            print(json.dumps(_COMMANDS[command](folder, profile, **arguments)), flush=True)


def _deploy(folder: Path, profile: str, *, config: dict[str, Any], application: dict[str, Any]) -> dict[str, Any]:
    from ray import serve

    from serve_apps import deploying
    from stitch_ray.errors import UserError
    from tests.serving.scripted import scripted_application, scripted_config

    made = scripted_config(folder, profile=profile, **config)
    url = deploying.listen(made.http)
    built = scripted_application(made, log=str(folder / "calls.log"), **application)
    try:
        active = deploying.run([serve.RunTarget(built, name=made.name, route_prefix="/")])
    except (RuntimeError, UserError) as error:
        return {"url": url, "error": f"{type(error).__name__}: {error}"}
    return {"url": url, "profile": active}


def _running(folder: Path, profile: str) -> dict[str, int]:
    from ray import serve

    deployments = serve.status().applications["stitch"].deployments
    return {name: status.replica_states.get("RUNNING", 0) for name, status in deployments.items()}


_COMMANDS = {"deploy": _deploy, "running": _running}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

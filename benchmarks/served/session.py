"""A served ensemble of scripted members, with a Ray session of its own, in a child process. As a program: that child.

The parent writes one JSON object a line, {name of a function of `_COMMANDS`: arguments}, and the child answers with one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOGICAL_CPUS = 8
TOKEN = "a-token-of-the-benchmark"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}
MEMBERS = ("Primary", "Auxiliary1", "Auxiliary2", "ReliabilityScorer")
CONFIDENT, DIALOGUE = {"question": "draft=0.9"}, {"question": "draft=0.3 final=0.8"}

_OPTIONS: dict[str, Any] = {
    "max_ongoing_requests": 64,
    "max_queued_requests": 256,
    "ray_actor_options": {"num_cpus": 0},
    "logging_config": {"enable_access_log": False},
}


class Child:
    """The parent's side."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.url = ""
        self.profile = ""

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Raises RuntimeError, with the end of its log, if the child is gone."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:  # Ray's own lines are passed over
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"the served ensemble ended with status {self._process.wait()}")

    def deploy(self, **changes: Any) -> None:
        """Start scripted members, or change them; see `_scripted`."""
        self._up(self.ask({"scripted": changes}))

    def deploy_bare(self) -> str:
        """Start `bare` beside the ensemble that runs; returns the URL to ask."""
        self.ask({"bare": {}})
        return f"{self.url}/bare/predict"

    def deploy_models(self, config: Mapping[str, Any]) -> None:
        """Start the ensemble of a `ServeConfig`; its token is `TOKEN`."""
        self._up(self.ask({"models": {"values": config}}))

    def replicas(self) -> dict[str, int]:
        """Deployment -> replicas that run."""
        found: dict[str, int] = self.ask({"replicas": {}})
        return found

    def _up(self, found: Mapping[str, str]) -> None:
        self.url, self.profile = found["url"], found["profile"]


@contextmanager
def served(profile: str, **variables: str) -> Iterator[Child]:
    """A Ray session with `profile` and environment `variables`, as long as the block lasts. Nothing is deployed yet."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "RAY_BACKEND_LOG_LEVEL": "fatal", **variables}
    command = [sys.executable, "-m", "benchmarks.served.session", profile]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        try:
            yield Child(process)
        except RuntimeError:
            log.seek(0)
            print(log.read()[-4000:], file=sys.stderr)
            raise
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def main(profile: str) -> None:
    from serve_apps import deploying

    deploying.choose_profile(profile)
    from stitch_ray.ray_session import session

    with tempfile.TemporaryDirectory() as name, session(num_cpus=LOGICAL_CPUS):
        folder = Path(name)
        (folder / "tokens").write_text(TOKEN + "\n")
        for line in sys.stdin:
            [(command, arguments)] = json.loads(line).items()
            print(json.dumps(_COMMANDS[command](folder, profile, **arguments)), flush=True)
        from ray import serve

        serve.shutdown()


def _scripted(
    folder: Path, profile: str, *, latency_s: float = 0.0, primary: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """`latency_s`: of the primary. `primary`: options of its deployment, such as num_replicas."""
    from ray import serve

    from serve_apps import deploying, ensemble
    from tests.serving import scripted

    config = scripted.scripted_config(folder, profile=profile, http={"token_file": str(folder / "tokens")})
    fingerprints = scripted.scripted_fingerprints(config)
    kinds = (
        scripted.ScriptedPrimary,
        scripted.ScriptedAuxiliary,
        scripted.ScriptedAuxiliary,
        scripted.ScriptedScorer,
    )
    versions = (fingerprints.primary, *(fingerprints.auxiliaries or ()), fingerprints.scorer)
    members = []
    for name, kind, version in zip(MEMBERS, kinds, versions, strict=True):
        mine = dict(primary or {}) if name == "Primary" else {}
        options = {**_OPTIONS, "request_router_config": ensemble.ROUTING, **mine}
        latency = latency_s if name == "Primary" else 0.0
        members.append(kind.options(name=name, **options).bind(version, latency))  # type: ignore[attr-defined]
    application = ensemble.assemble(config, fingerprints, members[0], members[1:3], members[3])
    url = deploying.listen(config.http)
    active = deploying.run([serve.RunTarget(application, name=config.name, route_prefix="/")])
    return {"url": url, "profile": active}


def _bare(folder: Path, profile: str) -> dict[str, Any]:
    from ray import serve

    from benchmarks.served import bare

    serve.run(bare.build(_OPTIONS), name="bare", route_prefix=bare.ROUTE)
    return {}


def _models(folder: Path, profile: str, *, values: Mapping[str, Any]) -> dict[str, Any]:
    from serve_apps import deploying
    from stitch_ray.config.serve import ServeConfig

    http = {"port": 0, "token_file": str(folder / "tokens")}
    config = ServeConfig.model_validate({**values, "http": http, "ui": False, "profile": profile})
    deployed = deploying.deploy(config)
    return {"url": deployed.url, "profile": deployed.profile}


def _replicas(folder: Path, profile: str) -> dict[str, int]:
    from ray import serve

    deployments = next(iter(serve.status().applications.values())).deployments
    return {name: status.replica_states.get("RUNNING", 0) for name, status in deployments.items()}


_COMMANDS = {"scripted": _scripted, "bare": _bare, "models": _models, "replicas": _replicas}


if __name__ == "__main__":
    main(sys.argv[1])

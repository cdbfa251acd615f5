"""Starting an ensemble on the Ray session that is open, and waiting until it answers."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stitch_ray.config.serve import HttpConfig, ServeConfig
from stitch_ray.ensemble.serving.estimate import resources
from stitch_ray.ensemble.serving.preflight import Ready, check
from stitch_ray.errors import UserError

THROUGHPUT = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
"""Environment of the throughput profile."""

_PROXY_PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)
"""Beside the one that is served on, at fixed numbers by default: a second Serve on a machine would not start."""

_POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class Deployed:
    """`profile`: the one that is active, which on a cluster may be another than was asked for."""

    url: str
    profile: str


def choose_profile(profile: str) -> None:
    """Set the environment that a Ray started after this takes over. Without effect on one that runs already.

    HAProxy's page of statistics is bound to all addresses, which Ray 2.60 gives no way to change; it tells counts only.

    Raises UserError if this process has read another choice before: Serve reads it once.
    """
    wanted = profile == "throughput"
    constants = sys.modules.get("ray.serve._private.constants")
    if constants is not None and wanted != constants.RAY_SERVE_ENABLE_HA_PROXY:
        raise UserError(f"profile: {profile} must be chosen before Ray Serve is imported; set {', '.join(THROUGHPUT)}")
    for name, value in THROUGHPUT.items():
        if wanted:
            os.environ.setdefault(name, value)
        else:
            os.environ.pop(name, None)
    if wanted:
        os.environ.setdefault("RAY_SERVE_HAPROXY_METRICS_ENABLED", "0")
        for name in _PROXY_PORTS:
            os.environ.setdefault(name, str(free_port("127.0.0.1")))


def deploy(config: ServeConfig | Ready, *, progress: Callable[[str], None] = lambda line: None) -> Deployed:
    """Start the ensemble, or bring the one of that name up to date, and wait until it is ready.

    Needs an open Ray session. Port 0 takes any free port. Raises UserError for what only the user can change, and
    RuntimeError if replicas do not start for another reason.
    """
    from ray import serve

    from serve_apps import ensemble, ui
    from stitch_ray import ray_session

    ready = check(config) if isinstance(config, ServeConfig) else config
    config = ready.config
    if _running() is None:
        ray_session.require(resources(ready), "the ensemble", hint="Lower num_threads or min_replicas")
    url = listen(config.http)
    targets = [serve.RunTarget(ensemble.build(ready), name=config.name, route_prefix="/")]
    if config.ui:
        targets.append(serve.RunTarget(ui.build(config, url), name=page_name(config), route_prefix=ui.ROUTE))
    return Deployed(url, run(targets, progress))


def listen(http: HttpConfig) -> str:
    """Start Serve's proxies, unless this cluster has them; returns the URL. Raises UserError for a port that is taken."""
    from ray import serve

    from serve_apps.ui import local_url

    running = _running()
    if running is not None:
        if http.port not in (0, running):
            raise UserError(
                f"http.port: Serve listens on {running} of this cluster already; write {running}, or end it first"
            )
        return local_url(http.host, running)
    port = http.port or free_port(http.host)
    _check_port(http.host, port)
    serve.start(
        http_options={"host": http.host, "port": port, "request_timeout_s": http.request_timeout_s},
        logging_config={"enable_access_log": False},
    )
    return local_url(http.host, port)


def run(targets: Sequence[Any], progress: Callable[[str], None] = lambda line: None) -> str:
    """Bring `ray.serve.RunTarget`s up, and return the profile that is active. Raises as `deploy`."""
    import ray
    from ray import serve

    serve.run_many(targets, wait_for_applications_running=False)
    _wait([target.name for target in targets], progress)
    profile: str = ray.get(ray.remote(num_cpus=0)(_profile_here).remote())
    return profile


def end(config: ServeConfig) -> None:
    """Remove the ensemble and its page from the cluster."""
    from ray import serve

    for name in (page_name(config), config.name):
        serve.delete(name, _blocking=True)


def page_name(config: ServeConfig) -> str:
    return f"{config.name}-ui"


def free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as found:
        found.bind((host, 0))
        port: int = found.getsockname()[1]
    return port


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind((host, port))
    except OSError as error:
        raise UserError(f"http.port: cannot listen on {host}:{port} ({error.strerror}); choose another port") from error


def _running() -> int | None:
    """The port on which Serve listens in this cluster already; None if it does not run."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else int(client.http_config.port)


def _wait(names: list[str], progress: Callable[[str], None]) -> None:
    from ray import serve

    shown = ""
    while True:
        applications = serve.status().applications
        states = {name: applications[name] for name in names if name in applications}
        line = "; ".join(f"{name} {_counts(state)}" for name, state in states.items())
        if line != shown:
            progress(line)
            shown = line
        if any(state.status == "DEPLOY_FAILED" for state in states.values()):
            raise _failure(states)
        if len(states) == len(names) and all(state.status == "RUNNING" for state in states.values()):
            return
        time.sleep(_POLL_S)


def _counts(state: Any) -> str:
    waiting = [name for name, deployment in state.deployments.items() if deployment.status != "HEALTHY"]
    done = len(state.deployments) - len(waiting)
    return f"{done}/{len(state.deployments)}" + (f", waiting for {', '.join(waiting)}" if waiting else "")


def _failure(states: dict[str, Any]) -> Exception:
    """What the replicas said. Serve gives their tracebacks as text."""
    messages = [state.message for state in states.values()]
    messages += [deployment.message for state in states.values() for deployment in state.deployments.values()]
    text = "\n".join(message for message in messages if message)
    told = re.findall(r"UserError: (.+)", text)
    if told:
        return UserError(told[-1].strip().rstrip("'\""))
    logging.getLogger("ray.serve").debug(text)
    last = [line for line in text.strip().splitlines() if line.strip()]
    return RuntimeError(f"the ensemble did not start: {last[-1] if last else 'Serve gives no reason'}")


def _profile_here() -> str:
    return "throughput" if os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1" else "default"


def shown_command(url: str, *, token_env: str | None, token_file: str | None) -> str:
    """A curl line to try it with; the token is not shown."""
    token = f'"$(head -1 {Path(token_file)})"' if token_file else f'"${token_env}"' if token_env else None
    header = f" -H 'authorization: Bearer '{token}" if token else ""
    return f"curl {url}/v1/predict{header} -H 'content-type: application/json' -d '{{\"question\": \"...\"}}'"

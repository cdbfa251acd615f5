"""`stitch-ray serve`: answer questions over HTTP, or abstain."""

if not __package__:
    raise SystemExit("run: python -m jobs.serve")

import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from stitch_ray.config import ServeConfig, load_config
from stitch_ray.console import Address, Config, DryRun, Set, exits
from stitch_ray.errors import UserError

Detach = Annotated[bool, typer.Option("--detach", help="return when it answers, and leave it running; needs a cluster")]


@exits
def serve(
    config: Config,
    set_: Set = None,
    address: Address = None,
    detach: Detach = False,
    dry_run: DryRun = False,
) -> None:
    """Serve the ensemble over HTTP, OpenAI-compatible, with a page; until Ctrl-C, or with --detach until it is removed.

    On a cluster where it runs already, the same command brings it up to date: without any restart where only policy,
    target_risk or limits changed.
    """
    from stitch_ray.ensemble.serving.estimate import describe, promise, resources
    from stitch_ray.ensemble.serving.preflight import check

    settings = load_config(ServeConfig, config, set_ or [])
    ready = check(settings)
    if dry_run:
        print(describe(ready))
        return
    address = address or os.environ.get("RAY_ADDRESS")
    if detach and not address:
        raise UserError("--detach: a Ray of this command would end with it; give --address of a cluster")
    from serve_apps import deploying

    if not address:
        deploying.choose_profile(settings.profile)
    from stitch_ray.ray_session import session

    with session(address, num_cpus=None if address else _local_cpus(resources(ready))), stop_event() as stopped:
        deployed = deploying.deploy(ready, progress=lambda line: print(f"starting  {line}", file=sys.stderr))
        http = settings.http
        print(f"serving   {deployed.url}{' with a page at /ui/' if settings.ui else ''}")
        print(f"profile   {deployed.profile}{_why(settings.profile, deployed.profile)}")
        print(f"policy    {promise(ready)}")
        print(
            f"try       {deploying.shown_command(deployed.url, token_env=http.token_env, token_file=http.token_file)}"
        )
        sys.stdout.flush()
        if detach:
            return
        try:
            stopped.wait()
        finally:
            if address:
                deploying.end(settings)
        print("stopped")


@contextmanager
def stop_event() -> Iterator[threading.Event]:
    """Set by SIGTERM, which ends a service in order; Ctrl-C interrupts."""
    stopped = threading.Event()
    before = signal.getsignal(signal.SIGTERM)

    def stop(number: int, frame: Any) -> None:
        stopped.set()

    signal.signal(signal.SIGTERM, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)


def _local_cpus(needed: Mapping[str, float]) -> int:
    """Logical CPUs of a Ray that serves this alone: enough for everything, on however few cores it then shares."""
    cores, threads = os.cpu_count() or 1, math.ceil(needed.get("CPU", 0))
    if threads > cores:
        print(f"note: {threads} threads of models share {cores} cores", file=sys.stderr)
    return max(cores, threads)


def _why(wanted: str, active: str) -> str:
    return (
        "" if wanted == active else f", not {wanted}: it is chosen by the environment in which the cluster is started"
    )


if __name__ == "__main__":
    typer.run(serve)

"""Connecting to Ray, checking that a plan fits the cluster, and everything that depends on Ray's version."""

from __future__ import annotations

import logging
import os
import signal
import threading
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stitch_ray.errors import UserError

_NO_PROGRESS_TIMEOUT_S = 900


@contextmanager
def session(address: str | None = None, *, num_cpus: int | None = None) -> Iterator[Any]:
    """Ray for the life of the block: `address`, else RAY_ADDRESS, else a local Ray that ends with it.

    A session that the caller has opened already is used and left open. Yields the `ray` module.
    """
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    if ray.is_initialized():
        _configure_data()
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS")
    in_main_thread = threading.current_thread() is threading.main_thread()
    on_sigterm = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        if address:
            try:
                ray.init(address=address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise UserError(f"--address {address}: no Ray cluster answers there ({error})") from error
        else:
            # The core of a throw-away Ray writes to this terminal; what fails is raised as an exception as well.
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **quiet)
    _configure_data()
    if in_main_thread:
        # As Ctrl-C. Ray's own handler prints a stack, and three seconds later aborts what is being ended in order.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield ray
    finally:
        ray.shutdown()
        if in_main_thread:
            signal.signal(signal.SIGTERM, on_sigterm)


def _configure_data() -> None:
    from ray.data import DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # Ray Data sets its own level when it is imported
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = _NO_PROGRESS_TIMEOUT_S
    context.print_on_execution_start = False


def require(needed: Mapping[str, float], what: str, *, hint: str) -> None:
    """Refuse with the numbers, in place of waiting for ever, if the cluster in total has less than `needed`.

    `hint`: what to lower instead, as the start of a sentence.
    """
    import ray

    have = ray.cluster_resources()
    short = {name: amount for name, amount in needed.items() if amount > have.get(name, 0)}
    if short:
        listed = ", ".join(
            f"{amount:g} {name} (the cluster has {have.get(name, 0):g})" for name, amount in short.items()
        )
        raise UserError(f"{what} needs {listed}. {hint}, or use a larger cluster")


def require_shared(out: Path, inputs: Sequence[str]) -> None:
    """Every node must see `out` and the local `inputs`: a token written below `out` is looked for on each of them."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return

    @ray.remote(num_cpus=0)
    def missing(paths: list[str]) -> tuple[str, list[str]]:
        return ray.util.get_node_ip_address(), [path for path in paths if not Path(path).exists()]

    below = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.is_dir())
    token = below / f".stitch-ray-{uuid.uuid4().hex}"
    wanted = [str(token), *(os.path.abspath(path) for path in inputs if Path(path).exists())]
    try:
        token.touch()
    except OSError as error:
        raise UserError(f"--out {out}: cannot write to {below}: {error.strerror}") from error
    try:
        pinned = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        found = ray.get([missing.options(scheduling_strategy=on).remote(wanted) for on in pinned], timeout=60)
    finally:
        token.unlink(missing_ok=True)
    for host, paths in found:
        if paths:
            named = ", ".join(f"--out {out}" if path == str(token) else path for path in paths)
            raise UserError(f"node {host} does not see {named}; use storage that all nodes share")

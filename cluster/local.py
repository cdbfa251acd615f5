"""A cluster of several nodes on one machine: each node is a raylet of its own with its own workers and object store.

`python -m cluster.local --nodes 2 --cpus-per-node 4` starts one and waits until it is interrupted. Tests use
`simulated_cluster`. The CPUs are promises to Ray's scheduler and may be more than the machine has.
"""

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ray._common.utils import reset_ray_address
from ray.cluster_utils import Cluster


@contextlib.contextmanager
def simulated_cluster(
    nodes: int,
    cpus_per_node: int,
    *,
    dashboard: bool = False,
    object_store_mib: int = 150,
) -> Iterator[tuple[str, Cluster]]:
    """Yield the address (for `ray.init(address=...)` and RAY_ADDRESS) and the Cluster of `nodes` nodes, head included.

    With `dashboard`, jobs can be submitted to `http://{cluster.webui_url}`. Nodes can be taken away and added while
    it runs: `cluster.remove_node(node, allow_graceful=False)`, `cluster.add_node(num_cpus=...)`. Works in the main
    thread only, because Ray sets a signal handler for every node. While it runs, `ray.init(address="auto")` on this
    machine finds this cluster. Unlike a Ray started by `ray.init` it asks for a token only if RAY_AUTH_MODE=token is
    set, and it listens on the machine's network address (Ray replaces a loopback address by that one).
    """
    if nodes < 1 or cpus_per_node < 1:
        raise ValueError(f"nodes and cpus_per_node must be at least 1, not {nodes} and {cpus_per_node}")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    node = {"num_cpus": cpus_per_node, "object_store_memory": object_store_mib * 2**20}
    cluster = Cluster()
    with _python_on_path():
        try:
            # The agent's default port belongs to whichever Ray was first on this machine.
            cluster.add_node(include_dashboard=dashboard, dashboard_agent_listen_port=_free_port(), **node)
            for _ in range(nodes - 1):
                cluster.add_node(**node)
            cluster.wait_for_nodes()
            yield cluster.address, cluster
        finally:
            try:
                cluster.shutdown()
            finally:
                # Ray leaves the address of a cluster whose start or end failed in `ray_current_cluster`, and every
                # later ray.init(num_cpus=...) then refuses to start a Ray of its own.
                reset_ray_address()
                signal.signal(signal.SIGTERM, on_sigterm)


@contextlib.contextmanager
def _python_on_path() -> Iterator[None]:
    """A submitted job runs the `python` that the head finds on PATH: make it the one running here."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m cluster.local", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--nodes", type=int, default=2, help="nodes, the head included (default: 2)")
    parser.add_argument("--cpus-per-node", type=int, default=2, help="CPUs each node offers (default: 2)")
    options = parser.parse_args()
    if options.nodes < 1 or options.cpus_per_node < 1:
        parser.error("--nodes and --cpus-per-node must be at least 1")

    with simulated_cluster(options.nodes, options.cpus_per_node, dashboard=True) as (address, cluster):
        signal.signal(signal.SIGTERM, _exit_on_sigterm)
        url = f"http://{cluster.webui_url}"
        print(f"{options.nodes} nodes with {options.cpus_per_node} CPUs each")
        print(f"  jobs and dashboard  {url}    stitch-ray submit ... --address {url}")
        print(f"  drivers             {address}    RAY_ADDRESS={address} python -m jobs.select ...")
        print("Ctrl-C stops it", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def _exit_on_sigterm(signum: int, frame: FrameType | None) -> NoReturn:
    # Instead of Ray's handler, which would end the process without leaving the `with` above.
    raise SystemExit(128 + signum)


if __name__ == "__main__":
    main()

"""Ray's workers, forked from a process that has done their imports.

A worker that loads a model spends about ten seconds of processor time on importing torch and transformers, and a run of
all tests starts some hundreds of them. Here the raylet starts `launch.py` in place of Python, which asks the process of
`server.py` for a fork and stands in for it until it ends. What then runs is Ray's own `default_worker.py`, with its
arguments, environment, folder and streams; the raylet, its scheduling, its kills and its restarts are untouched.

Nor is there a process that follows the workers' logs, which nobody reads here and which costs more with every worker.

Differences from a worker of one's own: modules are imported already, under the environment of the tests. What depends
on that is tested where Ray starts its workers itself: in the commands that tests run with a Ray of their own, in the
slow tests, and everywhere with STITCH_RAY_TEST_FORK=0.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from tests.forking.launch import SOCKET

_HERE = Path(__file__).parent


@contextmanager
def forked_workers() -> Iterator[None]:
    """A Ray that is started within this block forks its Python workers; the server ends with the block."""
    if os.environ.get("STITCH_RAY_TEST_FORK") == "0":
        yield
        return
    from ray._private import ray_constants
    from ray._private.node import Node

    with tempfile.TemporaryDirectory(prefix="sr-", dir="/tmp") as folder:  # sockets have short paths at most
        socket = Path(folder, "fork")
        environment = {
            **os.environ,
            SOCKET: str(socket),
            "PYTHONPATH": os.pathsep.join([str(_HERE.parents[1]), *sys.path]),
        }
        command = [sys.executable, "-m", "tests.forking.server"]
        server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
        try:
            # An absolute name replaces the folder that Ray puts before it.
            with (
                patch.object(ray_constants, "SETUP_WORKER_FILENAME", str(_HERE / "launch.py")),
                patch.object(Node, "start_log_monitor", lambda node: None),
                patch.dict(os.environ, {SOCKET: str(socket)}),
            ):
                yield
        finally:
            server.communicate()
            assert server.returncode == 0, "the server of forks has failed"

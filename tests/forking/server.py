"""The process that workers are forked from. It has no thread of Python but one, and ends when its standard input does."""

from __future__ import annotations

import array
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from tests.forking.launch import SOCKET

# What a worker of any job imports, but for Ray itself, which reads its environment once when it is loaded. Nothing that
# starts a thread or looks for devices may be among it.
MODULES = (
    "pandas",
    "pyarrow.dataset",
    "fastapi",
    "aiohttp",
    "torch",
    "transformers.models.bert.modeling_bert",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "deepspeed",
    "peft",
    "stitch_ray.engines.hf",
    "stitch_ray.ensemble.hosts",
    "stitch_ray.selection.rater",
)
_THREADS = {"python", "jemalloc_bg_thd"}  # jemalloc starts its own anew in every fork
_POLL_S = 0.1


class Fork:
    """A child and the launcher that waits for it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        header, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(3 * 4))
        size, request = int.from_bytes(header, "big"), b""
        while len(request) < size:
            request += connection.recv(size - len(request))
        streams = array.array("i")
        for _, _, data in ancillary:
            streams.frombytes(data)
        self.pid = os.fork()
        if not self.pid:
            _become_worker(json.loads(request), list(streams))
        for stream in streams:
            os.close(stream)

    def over(self) -> bool:
        """Whether it has ended; its launcher then knows how. A launcher that was killed takes it along."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            code = os.waitstatus_to_exitcode(status)
            _quietly(lambda: self.connection.sendall((code if code >= 0 else 128 - code).to_bytes(4, "big")))
            self.connection.close()
            return True
        if select.select([self.connection], [], [], 0)[0]:
            _quietly(lambda: os.kill(self.pid, signal.SIGKILL))
        return False


def _quietly(action: Any) -> None:
    try:
        action()
    except OSError:
        return


def _become_worker(request: dict[str, Any], streams: list[int]) -> None:
    """In the child: Ray's worker program with its own arguments, environment, folder and streams."""
    for target, stream in enumerate(streams):
        os.dup2(stream, target)
    os.closerange(3, max(streams) + 64)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = request["arguments"]
    sys.path[0] = os.path.dirname(sys.argv[0])
    random.seed()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        code = ended.code
        os._exit(code if isinstance(code, int) else int(code is not None))
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def main() -> None:
    for module in MODULES:
        importlib.import_module(module)
        assert "ray" not in sys.modules, f"{module} imports Ray"
    threads = {name.read_text().strip() for name in Path("/proc/self/task").glob("*/comm")}
    assert threads <= _THREADS, f"threads {threads - _THREADS}: their locks would be copied without them"
    gc.collect()
    gc.freeze()
    forks: list[Fork] = []
    with socket.socket(socket.AF_UNIX) as listener:
        path = os.environ[SOCKET]
        listener.bind(f"{path}.new")
        listener.listen(64)
        os.rename(f"{path}.new", path)
        while True:
            ready = select.select([listener, sys.stdin], [], [], _POLL_S if forks else None)[0]
            if sys.stdin in ready:
                break
            if listener in ready:
                forks.append(Fork(listener.accept()[0]))
            forks = [fork for fork in forks if not fork.over()]
    for fork in forks:
        _quietly(lambda fork=fork: os.kill(fork.pid, signal.SIGKILL))
    os._exit(0)  # nothing to tidy up, and libraries talk a lot while they are torn down


if __name__ == "__main__":
    main()

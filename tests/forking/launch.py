"""Stands in for a worker: asks for a fork, passes on what the raylet gave it, and ends as the fork ends.

Run by the raylet as `python launch.py [flags] default_worker.py --arguments`; imports nothing heavy.
"""

import array
import json
import os
import re
import socket
import sys
import time

SOCKET = "STITCH_RAY_TEST_FORK_SOCKET"
_PATIENCE_S = 120  # the first workers are asked for while the server still imports


def connect(connection: socket.socket) -> None:
    ends = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return connection.connect(os.environ[SOCKET])
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > ends:
                raise
            time.sleep(0.05)


def main() -> None:
    arguments, context = [], {}
    for argument in sys.argv[1:]:
        name, _, value = argument.partition("=")
        if name == "--serialized-runtime-env-context":
            context = json.loads(value or "{}")
        elif name != "--language" and (arguments or not argument.startswith("-")):
            arguments.append(argument)
    for name, value in (context.get("env_vars") or {}).items():  # as Ray's update_envs
        os.environ[name] = re.sub(r"\$\{[A-Z0-9_]+\}", "", os.path.expandvars(value))
    own = context.get("command_prefix") or context.get("override_worker_entrypoint")
    if own or context.get("py_executable") not in (None, sys.executable):
        raise SystemExit("a worker with a command of its own cannot be forked; run with STITCH_RAY_TEST_FORK=0")
    request = json.dumps({"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}).encode()
    with socket.socket(socket.AF_UNIX) as connection:
        connect(connection)
        streams = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))]
        connection.sendmsg([len(request).to_bytes(4, "big")], streams)
        connection.sendall(request)
        status = connection.recv(4)  # comes when the fork ends
    raise SystemExit(int.from_bytes(status, "big") if status else 1)


if __name__ == "__main__":
    main()

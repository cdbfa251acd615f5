"""`python -m tests.forking MODULE ARGUMENTS`: as `python -m MODULE ARGUMENTS`, but the Ray that it starts forks its workers."""

import runpy
import sys

from tests.forking import forked_workers

if __name__ == "__main__":
    del sys.argv[0]
    with forked_workers():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

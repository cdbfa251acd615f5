"""The command line that a submitted job runs on the cluster."""

from __future__ import annotations

import importlib

import pytest

from stitch_ray.config import CONFIGS
from stitch_ray.submission import _command


@pytest.mark.parametrize("job", sorted(set(CONFIGS) - {"serve"}))
def test_every_job_has_a_module_that_can_be_run(job: str) -> None:
    module, *member = _command(job)
    found = importlib.import_module(module)
    if member:
        assert member[0] in {command.name or command.callback.__name__ for command in found.exar.registered_commands}
    else:
        assert callable(getattr(found, job.replace("-", "_")))

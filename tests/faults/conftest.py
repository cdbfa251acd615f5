"""One served ensemble and one table of faults for all tests of serving."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.fault_table import FaultTable
from tests.faults.served import Served, served


@pytest.fixture(scope="session")
def ensemble() -> Iterator[Served]:
    with served() as found:
        yield found


@pytest.fixture(scope="session")
def fault_table() -> Iterator[FaultTable]:
    """Written to benchmarks/results if STITCH_RAY_PUBLISH is set; rows of faults that did not run stay."""
    table = FaultTable()
    yield table
    if os.environ.get("STITCH_RAY_PUBLISH"):
        table.publish()


@pytest.fixture(scope="session")
def thresholds(ensemble: Served) -> dict[str, float]:
    """Of the policy that is deployed where nothing else is said: version -> threshold."""
    from stitch_ray.reliability.policy import Policy

    config: Any = ensemble.config()
    return {Policy.load(config.policy).version: 0.7}

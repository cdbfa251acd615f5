"""Reports of the jobs that these tests run have empty figures: drawing took a quarter to a third of a job so small.

What is drawn is tested by the unit tests of the reports, and drawn here in the demo and with STITCH_RAY_TEST_FORK=0.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(autouse=True, scope="module")
def undrawn(request: pytest.FixtureRequest) -> Iterator[None]:
    if os.environ.get("STITCH_RAY_TEST_FORK") == "0" or request.path.name == "test_demo.py":
        yield
        return
    from stitch_ray.report import figures

    class Undrawn(figures.Figure):  # type: ignore[misc]
        def savefig(self, file: Any, **_: Any) -> None:
            file.write('<svg viewBox="0 0 1 1"></svg>')

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "Figure", Undrawn)
        yield

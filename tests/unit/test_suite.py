"""The suite itself: the order of files, what its last line says, which slow tests belong to a change, and the settings."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests import lanes, machines, needs, touched

TESTS = Path(__file__).parents[1]


def slow_texts() -> dict[str, str]:
    texts = {path.relative_to(TESTS).as_posix(): path.read_text("utf-8") for path in TESTS.glob("*/test_*.py")}
    return {name: text for name, text in texts.items() if "mark.slow" in text and name != "unit/test_suite.py"}


def test_every_file_that_is_named_is_there() -> None:
    there = {path.name for path in TESTS.glob("*/test_*.py")}
    assert set(lanes.LONGEST_FIRST) <= there
    assert {*lanes.TOGETHER, *lanes.TOGETHER.values()} <= there
    assert len(set(lanes.LONGEST_FIRST)) == len(lanes.LONGEST_FIRST)


def test_long_files_come_first_then_those_with_ray_then_units_and_nothing_moves_within_a_file() -> None:
    def item(folder: str, name: str, number: int) -> Any:
        return SimpleNamespace(path=Path("tests", folder, name), number=number)

    items = [item("unit", "test_a.py", 1), item("integration", "test_calibrate.py", 1), item("unit", "test_a.py", 2)]
    items += [item("integration", "test_exar.py", 1), item("integration", "test_select.py", 1)]
    items += [item("integration", "test_select.py", 2)]
    lanes.order(items)
    names = ["test_select.py", "test_select.py", "test_exar.py", "test_calibrate.py", "test_a.py", "test_a.py"]
    assert [one.path.name for one in items] == names
    assert [one.number for one in items] == [1, 2, 1, 1, 1, 2]


def test_what_is_made_once_is_made_once_and_never_seen_half(tmp_path_factory: pytest.TempPathFactory) -> None:
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        folder.mkdir()
        (folder / "file").write_text("whole")

    found = [lanes.made_once(tmp_path_factory, "of-test-suite", make) for _ in range(2)]
    assert found[0] == found[1] != made[0]
    assert len(made) == 1
    assert (found[0] / "file").read_text() == "whole"

    def fail(folder: Path) -> None:
        folder.mkdir()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        lanes.made_once(tmp_path_factory, "of-test-suite-failing", fail)
    assert not found[0].with_name("of-test-suite-failing").exists()


def test_the_last_line_says_what_was_not_run_why_and_what_mends_it() -> None:
    page = needs.missing("no browser", "apt-get install chromium")
    reports = [SimpleNamespace(longrepr=("file", 3, f"Skipped: {page}"))] * 2
    reports += [SimpleNamespace(longrepr=("file", 9, "Skipped: no weather"))]
    line = lanes.skipped_line(lanes.reasons_of(reports))
    assert line == "not run: 2 tests: no browser (apt-get install chromium); 1 tests: no weather"
    assert lanes.skipped_line([]) == "nothing was skipped"


def test_what_is_missing_is_skipped_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        needs.chromium()
    monkeypatch.setenv("STITCH_RAY_DATA", str(tmp_path))
    with pytest.raises(pytest.skip.Exception, match="STITCH_RAY_DATA=FOLDER make test"):
        needs.real_data("exar")
    (tmp_path / "exar").mkdir()
    assert needs.real_data("exar") == tmp_path / "exar"


# Slow tests of a change


def test_every_file_of_slow_tests_belongs_to_an_area_and_every_area_has_some() -> None:
    files = slow_texts()
    named = {name for found in touched.AREAS.values() for name in found}
    assert named == set(files)
    assert all((TESTS.parent / beginning).exists() for beginning in touched.AREAS)


def test_the_area_with_most_changed_lines_comes_first_and_helpers_count_for_their_users() -> None:
    files = slow_texts()
    found = touched.slow_files({"stitch_ray/exclusion/refinement.py": 3, "stitch_ray/submission.py": 50}, files)
    assert found == ["integration/test_submission.py", "integration/test_exar.py"]
    assert touched.slow_files({"README.md": 400, "stitch_ray/console.py": 9}, files) == []
    users = touched.slow_files({"tests/faults/killing.py": 5}, files)
    assert {"faults/test_select_faults.py", "faults/test_finetune_faults.py"} <= set(users)
    assert touched.slow_files({"tests/integration/test_exar.py": 1}, files) == ["integration/test_exar.py"]


def test_a_run_out_of_time_leaves_no_process_and_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(touched, "_TIDY_UP_S", 0.5)
    code = f"import subprocess, sys; subprocess.Popen(['sleep', '600']).wait(); open({str(tmp_path / 'late')!r}, 'w')"
    assert touched._run([sys.executable, "-c", code], 0.5) is None
    assert not (tmp_path / "late").exists()
    assert touched._run([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3


# Settings of other machines


def test_a_setting_that_the_processor_lacks_is_not_run() -> None:
    setting = machines.SETTINGS["ATEN_CPU_CAPABILITY=avx512"]
    assert machines.lacks(setting, frozenset({"avx2"})) == "not run: no avx512f"
    assert machines.lacks(setting, frozenset({"avx2", "avx512f"})) is None
    assert machines.lacks(machines.SETTINGS["as it is"], frozenset()) is None


def test_a_cell_counts_and_names_what_failed() -> None:
    assert machines.cell({"passed": ["a", "b"]}, 0) == "2 passed"
    outcomes = {"passed": ["a"] * 8, "failed": ["tests/unit/test_x.py::test_y[1]"]}
    assert machines.cell(outcomes, 1) == "8 passed, 1 failed: test_x.py::test_y[1]"
    assert machines.cell({}, 1) == "nothing ran"
    assert machines.cell({"passed": ["a"]}, 3) == "1 passed (pytest ended with 3)"
    where = {"cpu": "X", "versions": {"torch": "2"}}
    page = machines.render({"as it is": {"numeric": "8 passed", "date": "2026-01-01"}}, where)
    assert "| as it is | 2026-01-01 |  | 8 passed |  |  |" in page


_THREE_OUTCOMES = """
import pytest
pytestmark = pytest.mark.numeric
@pytest.fixture
def broken(): raise OSError
def test_right(): pass
@pytest.mark.resume
def test_wrong(): assert False
def test_without_its_fixture(broken): pass
"""


def test_tests_are_told_by_mark_and_outcome(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  numeric\n  resume\n")
    (tmp_path / "test_some.py").write_text(_THREE_OUTCOMES)
    (tmp_path / "test_other.py").write_text("def test_unmarked(): pass")
    tally = tmp_path / "tally.json"
    environment = {**os.environ, "STITCH_RAY_TALLY": str(tally), "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-m", "pytest", "-n", "1", "-p", "tests.tally"]
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=False).returncode == 1
    assert json.loads(tally.read_text()) == {
        "numeric": {
            "passed": ["test_some.py::test_right"],
            "failed": ["test_some.py::test_wrong"],
            "error": ["test_some.py::test_without_its_fixture"],
        },
        "resume": {"failed": ["test_some.py::test_wrong"]},
    }


def test_weights_of_the_unaligned_setting_begin_off_every_boundary_and_are_the_same(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np; from safetensors.numpy import save_file; "
        "save_file({'a': np.arange(7, dtype=np.float32)}, sys.argv[1], {'note': 'x'})"
    )
    path = tmp_path / "x.safetensors"
    environment = machines._environment(machines.SETTINGS["unaligned weights"])
    subprocess.run([sys.executable, "-c", code, str(path)], env=environment, check=True)
    (length,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (length + 8) % 64 == 8
    assert json.loads(path.read_bytes()[8 : 8 + length])["__metadata__"] == {"note": "x"}
    with safe_open(path, "np") as file:
        np.testing.assert_array_equal(file.get_tensor("a"), np.arange(7, dtype=np.float32))

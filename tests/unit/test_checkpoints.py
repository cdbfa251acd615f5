"""Checkpoint folders: complete or absent, checked before use, safe against a kill at any instant."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from stitch_ray.training.checkpoints import begin, commit, describe, latest_valid, listed, prune

pytestmark = pytest.mark.numeric

STATE = {"state-00000-00000.safetensors": b"weights" * 1000, "state-00001-00000.safetensors": b"moments" * 1000}


def save(root: Path, step: int) -> Path:
    building = begin(root, step)
    files = {}
    for file, content in STATE.items():
        (building / file).write_bytes(content + str(step).encode())
        files.update(describe(building, [file]))
    return commit(root, step, files, {"step": step, "coba": {"losses": [0.5]}})


def steps(root: Path) -> list[int]:
    return [step for step, _ in listed(root)]


def test_a_saved_checkpoint_is_found_with_its_progress(tmp_path: Path) -> None:
    save(tmp_path, 100)
    path = save(tmp_path, 200)
    found = latest_valid(tmp_path, pytest.fail)
    assert found is not None
    assert (found.path, found.step, found.progress) == (path, 200, {"step": 200, "coba": {"losses": [0.5]}})
    assert path.name == "step-000200"
    assert {file.name for file in path.iterdir()} == {*STATE, "progress.json", "manifest.json"}


def test_no_checkpoint_is_no_warning(tmp_path: Path) -> None:
    assert latest_valid(tmp_path / "absent", pytest.fail) is None


def test_steps_beyond_six_digits_are_newer(tmp_path: Path) -> None:
    save(tmp_path, 999_999)
    save(tmp_path, 1_000_000)
    found = latest_valid(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 1_000_000


def truncate(path: Path) -> None:
    os.truncate(path / "state-00001-00000.safetensors", 10)


def flip_byte(path: Path) -> None:
    content = bytearray((path / "state-00001-00000.safetensors").read_bytes())
    content[1234] ^= 1
    (path / "state-00001-00000.safetensors").write_bytes(content)


def remove_file(path: Path) -> None:
    (path / "state-00001-00000.safetensors").unlink()


def change_progress(path: Path) -> None:
    (path / "progress.json").write_text((path / "progress.json").read_text().replace("0.5", "0.6"))


def remove_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def cut_manifest(path: Path) -> None:
    os.truncate(path / "manifest.json", 40)


def foreign_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"job": "select"}')


def manifest_of_another_step(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "step": 100}))


@pytest.mark.parametrize(
    ("harm", "warning"),
    [
        (truncate, r"state-00001-00000.safetensors has 10 bytes instead of 7003"),
        (flip_byte, r"state-00001-00000.safetensors has changed .*SHA-256"),
        (remove_file, r"state-00001-00000.safetensors is missing"),
        (change_progress, r"progress.json has changed"),
        (remove_manifest, r"manifest.json is missing"),
        (cut_manifest, r"manifest.json cannot be read"),
        (foreign_manifest, r"manifest.json cannot be read"),
        (manifest_of_another_step, r"manifest.json is not that of step 200"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(
    tmp_path: Path, harm: Callable[[Path], None], warning: str
) -> None:
    save(tmp_path, 100)
    path = save(tmp_path, 200)
    harm(path)
    warnings: list[str] = []
    found = latest_valid(tmp_path, warnings.append)
    assert found is not None
    assert found.step == 100
    assert len(warnings) == 1
    assert str(path) in warnings[0]
    assert re.search(warning, warnings[0])
    assert steps(tmp_path) == [100]
    assert (tmp_path / "step-000200.corrupt").is_dir()


def test_a_step_that_was_set_aside_can_be_saved_and_set_aside_again(tmp_path: Path) -> None:
    for _ in range(2):
        truncate(save(tmp_path, 100))
        assert latest_valid(tmp_path, lambda warning: None) is None
    assert {path.name for path in tmp_path.iterdir()} == {"step-000100.corrupt", "step-000100.corrupt-2"}
    save(tmp_path, 100)
    assert latest_valid(tmp_path, pytest.fail) is not None


def test_a_step_is_saved_once(tmp_path: Path) -> None:
    before = save(tmp_path, 100)
    with pytest.raises(OSError, match="not empty"):
        save(tmp_path, 100)
    found = latest_valid(tmp_path, pytest.fail)
    assert found is not None
    assert found.path == before


def test_leftovers_of_killed_writers_are_no_checkpoints_and_go_at_the_next_save(tmp_path: Path) -> None:
    save(tmp_path, 100)
    building = begin(tmp_path, 200)
    (building / "state-00000-00000.safetensors").write_bytes(b"half")
    (tmp_path / ".step-000050.removing").mkdir()
    (tmp_path / "notes").mkdir()
    found = latest_valid(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 100
    save(tmp_path, 300)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000100", "step-000300", "notes"}


def test_a_file_of_another_worker_that_never_arrived_is_noticed(tmp_path: Path) -> None:
    building = begin(tmp_path, 100)
    (building / "state-00000-00000.safetensors").write_bytes(b"there")
    files = describe(building, ["state-00000-00000.safetensors"])
    files["state-00001-00000.safetensors"] = {"bytes": 5, "sha256": "0"}
    commit(tmp_path, 100, files, {})
    warnings: list[str] = []
    assert latest_valid(tmp_path, warnings.append) is None
    assert "state-00001-00000.safetensors is missing" in warnings[0]


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, None, [500]),
        (2, None, [400, 500]),
        (2, 200, [200, 400, 500]),
        (2, 500, [400, 500]),
        (9, 100, [100, 200, 300, 400, 500]),
    ],
)
def test_prune_keeps_the_newest_and_the_best(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    for step in (100, 200, 300, 400, 500):
        save(tmp_path, step)
    prune(tmp_path, keep, best)
    assert steps(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_a_kill_at_any_instant_leaves_the_old_checkpoint_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forked writer saves step 200 and prunes; it is killed before the first system call that matters, the second, ..."""
    outcomes = []
    for instant in range(100):
        root = tmp_path / str(instant)
        save(root, 50)
        save(root, 100)
        killed = _fork_and_kill(lambda root=root: (save(root, 200), prune(root, 1, None)), instant, monkeypatch)
        found = latest_valid(root, pytest.fail)
        assert found is not None
        outcomes.append(found.step)
        assert {len(list(path.iterdir())) for _, path in listed(root)} == {len(STATE) + 2}
        save(root, 300)
        assert not list(root.glob(".*"))
        if not killed:
            break
    assert not killed
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {100, 200}
    assert len(outcomes) > 15


def _fork_and_kill(work: Callable[[], object], instant: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run `work` in a child that kills itself before call number `instant`; True if it was killed."""
    child = os.fork()
    if child == 0:
        calls = 0

        def deadly(call: Callable[..., object]) -> Callable[..., object]:
            def wrapped(*args: object, **kwargs: object) -> object:
                nonlocal calls
                if calls == instant:
                    os.kill(os.getpid(), signal.SIGKILL)
                calls += 1
                return call(*args, **kwargs)

            return wrapped

        for function in ("open", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"):
            monkeypatch.setattr(os, function, deadly(getattr(os, function)))
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)

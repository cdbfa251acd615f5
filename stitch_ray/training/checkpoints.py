"""Folders of checkpoints that appear whole or not at all, and are checked before anything is read from them.

    checkpoints/step-000100/   state-*.safetensors, progress.json, manifest.json (size and SHA-256 of the others)
    checkpoints/.step-000200.tmp/      being written, or left behind by a writer that was killed
    checkpoints/step-000150.corrupt/   set aside by `latest_valid`; nothing here removes it

Saving takes three calls: `begin` on one worker, `describe` on every worker for the files it wrote, `commit` on one.
A folder has its final name only once all its bytes are on the disk, so a kill at any instant costs the checkpoint in
progress and nothing else. `begin`, `commit`, `prune` and `latest_valid` are for one process at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from stitch_ray.runs import write_json

MANIFEST, PROGRESS = "manifest.json", "progress.json"


class FileFacts(TypedDict):
    """What the manifest knows of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files were all found as they were written."""

    path: Path
    step: int
    progress: dict[str, Any]


def name(step: int) -> str:
    """Folder of the checkpoint after `step` optimizer steps."""
    return f"step-{step:06d}"


def building_name(step: int) -> str:
    """Folder that the workers write into between `begin` and `commit`."""
    return f".{name(step)}.tmp"


def begin(root: Path, step: int) -> Path:
    """An empty folder to write the files of a checkpoint into. Removes what killed writers left behind."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".step-*"):
        shutil.rmtree(leftover)
    building = root / building_name(step)
    building.mkdir()
    return building


def describe(folder: Path, names: Iterable[str]) -> dict[str, FileFacts]:
    """Bring files to the disk and hash them: every worker does it for those that it wrote."""
    found: dict[str, FileFacts] = {}
    for file in names:
        _sync(folder / file)
        found[file] = _facts(folder / file)
    return found


def commit(root: Path, step: int, files: Mapping[str, FileFacts], progress: Mapping[str, Any]) -> Path:
    """Turn the folder of `begin` into a checkpoint. `files` are those of all workers, as `describe` gave them.

    Raises OSError if there is a checkpoint of that step: a step is saved once.
    """
    building, final = root / building_name(step), root / name(step)
    write_json(building / PROGRESS, dict(progress))
    everything = {**files, **describe(building, [PROGRESS])}
    write_json(building / MANIFEST, {"step": step, "files": everything})
    _sync(building / MANIFEST)
    _sync(building)
    building.rename(final)
    _sync(root)
    return final


def listed(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint, oldest first. Their files are not looked at."""
    matches = [(re.fullmatch(r"step-(\d{6,})", path.name), path) for path in root.glob("step-*")]
    return sorted((int(match[1]), path) for match, path in matches if match)


def latest_valid(root: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose files all have their size and SHA-256; None if there is none.

    A newer one that is damaged is renamed to `step-000100.corrupt`, and `warn` is told the file and the damage.
    """
    for step, path in reversed(listed(root)):
        found = damage(path, step)
        if found is None:
            return Checkpoint(path, step, json.loads((path / PROGRESS).read_text(encoding="utf-8")))
        aside = _set_aside(path)
        warn(f"checkpoint {path} is damaged and not used: {found}; it is now {aside.name}, remove it when you like")
    return None


def damage(path: Path, step: int) -> str | None:
    """What is wrong with a checkpoint, with the name of the file; None if nothing is."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, FileFacts] = manifest["files"]
        expected = [(file, facts["bytes"], facts["sha256"]) for file, facts in files.items()]
        if manifest["step"] != step or PROGRESS not in files:
            return f"{MANIFEST} is not that of step {step}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} cannot be read"
    for file, size, _ in expected:  # cheap, and finds most of what goes wrong
        if not (path / file).is_file():
            return f"{file} is missing"
        if (actual := (path / file).stat().st_size) != size:
            return f"{file} has {actual} bytes instead of {size}"
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter's lock
        found = pool.map(_facts, (path / file for file, _, _ in expected))
        changed = [file for (file, _, sha256), facts in zip(expected, found, strict=True) if facts["sha256"] != sha256]
    return f"{changed[0]} has changed since it was written (SHA-256 differs)" if changed else None


def prune(root: Path, keep: int, best_step: int | None) -> None:
    """Remove checkpoints except the newest `keep` and that of `best_step`."""
    found = listed(root)
    for step, path in found[: max(0, len(found) - keep)]:
        if step != best_step:
            # Out of sight first: a kill in the middle leaves no damaged checkpoint to be warned of.
            removing = path.with_name(f".{path.name}.removing")
            path.rename(removing)
            shutil.rmtree(removing)


def _set_aside(path: Path) -> Path:
    aside, number = path.with_name(f"{path.name}.corrupt"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.corrupt-{number}")
    return path.rename(aside)


def _facts(path: Path) -> FileFacts:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

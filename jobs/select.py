"""`stitch-ray select`: rate instruction data by the model's own uncertainty and keep the best part."""

if not __package__:
    raise SystemExit("run: python -m jobs.select")

from typing import Annotated

import typer

from stitch_ray.api import run_job
from stitch_ray.config import SelectConfig, load_config
from stitch_ray.console import Address, Config, Limit, Out, Overwrite, Set, exits, progress_bar


@exits
def select(
    config: Config,
    set_: Set = None,
    out: Out = None,
    address: Address = None,
    overwrite: Overwrite = False,
    limit: Limit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be read and rated, and stop")] = False,
) -> None:
    """Rate instruction data by the model's own uncertainty and keep the best part."""
    overrides = [*(set_ or []), *([f"data.limit={limit}"] if limit else [])]
    settings = load_config(SelectConfig, config, overrides)
    if dry_run:
        from stitch_ray.selection.estimate import describe, estimate  # torch loads only where it is needed
        from stitch_ray.selection.preflight import check

        print(describe(estimate(check(settings))))
        return
    with progress_bar() as progress:
        summary = run_job("select", settings, out, address=address, overwrite=overwrite, progress=progress)
    print(summary.line)


if __name__ == "__main__":
    typer.run(select)

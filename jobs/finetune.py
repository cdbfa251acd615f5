"""`stitch-ray finetune`: fine-tune a causal language model on one or several tasks."""

if not __package__:
    raise SystemExit("run: python -m jobs.finetune")

from typing import Annotated

import typer

from stitch_ray.api import run_job
from stitch_ray.config import FinetuneConfig, load_config
from stitch_ray.console import Address, Config, Limit, Out, Overwrite, Set, exits, progress_bar


@exits
def finetune(
    config: Config,
    set_: Set = None,
    out: Out = None,
    address: Address = None,
    overwrite: Overwrite = False,
    limit: Limit = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be trained, and stop")] = False,
) -> None:
    """Fine-tune a causal language model on one or several tasks."""
    settings = load_config(FinetuneConfig, config, [*(set_ or []), *([f"limit={limit}"] if limit else [])])
    if dry_run:
        from stitch_ray.training.estimate import describe  # torch loads only where it is needed
        from stitch_ray.training.preflight import check

        print(describe(check(settings)))
        return
    with progress_bar() as progress:
        summary = run_job("finetune", settings, out, address=address, overwrite=overwrite, progress=progress)
    print(summary.line)


if __name__ == "__main__":
    typer.run(finetune)

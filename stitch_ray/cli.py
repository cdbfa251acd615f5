"""`stitch-ray`: a thin Typer application over jobs/."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.ask import ask
from jobs.calibrate import calibrate
from jobs.demo import demo
from jobs.doctor import doctor
from jobs.exar import exar
from jobs.finetune import finetune
from jobs.merge import merge
from jobs.predict import predict
from jobs.sample_answers import sample_answers
from jobs.select import select
from jobs.serve import serve
from jobs.submit import submit
from jobs.tiny_model import tiny_model
from jobs.train_scorer import train_scorer
from stitch_ray.api import check, describe
from stitch_ray.config import CONFIGS, load_config
from stitch_ray.console import Config, Set, exits
from stitch_ray.errors import UserError
from stitch_ray.runs import MANIFEST, read_manifest

app = typer.Typer(
    name="stitch-ray",
    help="Select data, fine-tune and serve LLMs on Ray, and know when an answer can be trusted.",
    epilog="Exit codes: 0 done, 1 failed (the same command resumes), 2 change something, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Job = Annotated[str, typer.Argument(help=f"one of: {', '.join(CONFIGS)}", metavar="JOB", show_default=False)]

_JOBS = (
    demo,
    select,
    finetune,
    sample_answers,
    train_scorer,
    calibrate,
    predict,
    serve,
    ask,
    merge,
    tiny_model,
    submit,
    doctor,
)
for command in _JOBS:
    app.command(name=command.__name__.replace("_", "-"))(command)
app.add_typer(exar)


@app.command()
@exits
def validate(job: Job, config: Config, set_: Set = None) -> None:
    """Check a configuration and the files, models and tokenizers it names; change nothing."""
    settings = load_config(_known(job), config, set_ or [])
    ready = check(job, settings)
    print(f"{config}: valid; {job} work hash {ready.work_hash}")


@app.command()
@exits
def schema(job: Job) -> None:
    """Print the JSON Schema of a job's configuration, for editors."""
    print(json.dumps(_known(job).model_json_schema(), indent=2))


@app.command()
@exits
def plan(
    config: Config,
    set_: Set = None,
    job: Annotated[str, typer.Option("--job", help=f"one of: {', '.join(CONFIGS)}")] = "select",
) -> None:
    """Say what a job would read and do, and how long at least where that can be told (as --dry-run)."""
    print(describe(job, load_config(_known(job), config, set_ or [])))


@app.command()
@exits
def clean(
    folders: Annotated[list[Path], typer.Argument(help="run folders, or a folder that holds some", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="remove; without it, only list")] = False,
    failed: Annotated[bool, typer.Option("--failed", help="only runs that did not finish")] = False,
) -> None:
    """Remove old run folders; touches nothing that has no manifest of this tool."""
    candidates = [
        path for folder in folders for path in (folder, *sorted(m.parent for m in folder.glob(f"*/{MANIFEST}")))
    ]
    found = {path.resolve(): (path, manifest) for path in candidates if (manifest := read_manifest(path))}
    if not found:
        raise UserError(f"no run folder in {', '.join(map(str, folders))}")
    for path, manifest in found.values():
        status = manifest.get("status", "?")
        if not path.exists() or (failed and status == "done"):  # it may have stood inside one that is gone
            continue
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
        if yes:
            shutil.rmtree(path)
        print(f"{'removed' if yes else 'would remove'} {path} ({status}, {size:.1f} MB)")


def _known(job: str) -> type[Any]:
    if job not in CONFIGS:
        raise UserError(f"unknown job {job!r}; known: {', '.join(CONFIGS)}")
    return CONFIGS[job]


def main() -> None:
    """Entry point of the `stitch-ray` command."""
    app()

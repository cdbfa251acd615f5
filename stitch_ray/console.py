"""What all commands share: exit codes, error lines, a progress bar on terminals."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, ParamSpec

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from stitch_ray.config import CONFIGS, load_config
from stitch_ray.errors import UserError
from stitch_ray.runs import Step

P = ParamSpec("P")

FAILED, MISUSED, INTERRUPTED = 1, 2, 130

Config = Annotated[Path, typer.Argument(help="configuration file (YAML)", metavar="CONFIG.yaml", show_default=False)]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="override one key of the file (rating.alpha=0.5); repeatable"),
]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="run folder; default runs/JOB-<hash>: resumes")]
Address = Annotated[
    str | None,
    typer.Option("--address", metavar="ADDR", help="Ray cluster; default RAY_ADDRESS, else a local Ray for this run"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="start over in a folder that holds another run")]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="read only the first N rows", min=1)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="say what would be done, and stop")]


def exits(command: Callable[P, None]) -> Callable[P, None]:
    """Exceptions become one line on stderr and an exit code: 2 change something, 1 failed, 130 interrupted."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            print("interrupted; the same command resumes", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except typer.Exit:
            raise
        except Exception as error:
            mistake = user_error(error)
            if mistake is not None:
                for line in str(mistake).splitlines():
                    print(f"error: {line}", file=sys.stderr)
                raise typer.Exit(MISUSED) from None
            if os.environ.get("STITCH_RAY_TRACEBACK"):
                raise
            last = (str(error).strip().splitlines() or [""])[-1]
            print(f"failed: {type(error).__name__}: {last}", file=sys.stderr)
            print("STITCH_RAY_TRACEBACK=1 shows where; the same command resumes", file=sys.stderr)
            raise typer.Exit(FAILED) from None

    return wrapped


def job_command(job: str, *, limit: str | None = None) -> Callable[..., None]:
    """The command of a job: everything between its configuration and the summary that it prints last.

    `limit` is the key that --limit sets; None: the job has no such option.
    """

    def command(
        config: Config,
        set_: Set = None,
        out: Out = None,
        address: Address = None,
        overwrite: Overwrite = False,
        limit_: Limit = None,
        dry_run: DryRun = False,
    ) -> None:
        from stitch_ray.api import describe, run_job

        settings = load_config(CONFIGS[job], config, [*(set_ or []), *([f"{limit}={limit_}"] if limit_ else [])])
        if dry_run:
            print(describe(job, settings))
            return
        with progress_bar() as progress:
            summary = run_job(job, settings, out, address=address, overwrite=overwrite, progress=progress)
        if summary.text:
            print(summary.text)
        print(summary.line)

    command.__name__, command.__doc__ = job.replace("-", "_"), CONFIGS[job].__doc__
    if limit is None:
        signature = inspect.signature(command, eval_str=True)
        options = [option for name, option in signature.parameters.items() if name != "limit_"]
        command.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    return exits(command)


def user_error(error: BaseException | None) -> UserError | None:
    """The UserError that `error` is, or that a Ray worker raised to cause it."""
    while error is not None:
        if isinstance(error, UserError):
            return UserError(str(error.args[0])) if error.args else error
        error = getattr(error, "cause", None) or error.__cause__
    return None


@contextmanager
def progress_bar() -> Iterator[Callable[[Step], None]]:
    """A bar with rows/s, tokens/s and the time left on a terminal; silence elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda step: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, tuple[TaskID, float, int]] = {}
    with Progress(*columns, console=console) as bar:

        def show(step: Step) -> None:
            if step.stage not in tasks:
                task = bar.add_task(step.stage, total=step.total, completed=step.done, rate="")
                tasks[step.stage] = (task, time.monotonic(), step.done)
            task, started, before = tasks[step.stage]
            seconds = time.monotonic() - started
            rate = (
                f"{(step.done - before) / seconds:,.1f} {step.unit}/s" if seconds > 0.5 and step.done > before else ""
            )
            if rate and step.tokens:
                rate += f", {step.tokens / seconds:,.0f} tokens/s"
            bar.update(task, completed=step.done, total=step.total, rate=rate)

        yield show

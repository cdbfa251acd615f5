"""`stitch-ray tiny-model`: a toy Llama trained on the spot, for demos and tests."""

if not __package__:
    raise SystemExit("run: python -m jobs.tiny_model")

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from stitch_ray.console import exits
from stitch_ray.data import formats, readers
from stitch_ray.data.quarantine import BadRow
from stitch_ray.records import Example

_NUM_REASONS_SHOWN = 3


def main(data: list[str], out: Path, parameters: str, steps: int, seed: int, overwrite: bool) -> int:
    """Train on every readable example of `data`; rows that cannot be used are counted and the first ones named."""
    from stitch_ray.training.tiny import make_tiny_model  # torch loads only where it is needed

    bad_rows: list[str] = []
    summary = make_tiny_model(
        _examples(data, bad_rows),
        out,
        parameters=parameters,
        steps=steps,
        seed=seed,
        overwrite=overwrite,
        progress=_show_progress if sys.stderr.isatty() else None,
    )
    for reason in bad_rows[:_NUM_REASONS_SHOWN]:
        print(f"skipped {reason}", file=sys.stderr)
    skipped = f" ({len(bad_rows):,} rows skipped)" if bad_rows else ""
    print(
        f"{out}: {summary['parameters']:,} parameters, {summary['vocab_size']:,} tokens in the vocabulary, "
        f"{summary['examples']:,} examples{skipped}, loss {summary['first_loss']:.2f} to {summary['last_loss']:.2f} "
        f"in {summary['steps']} steps, {summary['seconds']:.0f} s"
    )
    return 0


def _examples(data: list[str], bad_rows: list[str]) -> Iterator[Example]:
    """Examples of all files; what is wrong with the other rows goes into `bad_rows`."""
    for source in readers.expand(data):
        for row in readers.iter_rows(source):
            try:
                yield formats.convert(row, "auto")
            except BadRow as problem:
                bad_rows.append(f"{row.source}:{row.line}: {problem}")


def _show_progress(step: int, steps: int, loss: float) -> None:
    print(f"\rstep {step}/{steps}  loss {loss:.3f}", end="\n" if step == steps else "", file=sys.stderr, flush=True)


@exits
def tiny_model(
    data: Annotated[list[str], typer.Option("--data", help="data file, folder or glob; may be repeated")],
    out: Annotated[Path, typer.Option("--out", help="folder of the new model")],
    more_data: Annotated[list[str] | None, typer.Argument(metavar="[FILE]...", help="more data files")] = None,
    parameters: Annotated[str, typer.Option("--parameters", help="size of the model: 500k, 5m, 30m")] = "5m",
    steps: Annotated[int, typer.Option("--steps", help="training steps of 1,024 tokens")] = 200,
    seed: Annotated[int, typer.Option("--seed", help="seed of weights and order of examples")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a model that is already there")] = False,
) -> None:
    """Make a small Llama in Hugging Face format from instruction data: a toy for demos and tests."""
    raise typer.Exit(main([*data, *(more_data or [])], out, parameters, steps, seed, overwrite))


if __name__ == "__main__":
    typer.run(tiny_model)

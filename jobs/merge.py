"""`stitch-ray merge`: a LoRA adapter and its base model become one plain model folder."""

if not __package__:
    raise SystemExit("run: python -m jobs.merge")

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stitch_ray.console import exits


class Dtype(StrEnum):
    """Number formats of a written model; auto: the base model's."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@exits
def merge(
    adapter: Annotated[Path, typer.Argument(help="folder of the adapter", metavar="ADAPTER", show_default=False)],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder of the new model")],
    base: Annotated[str | None, typer.Option("--base", help="base model; default: the one the adapter names")] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="number format of the new model")] = Dtype.AUTO,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace a model that is already there")] = False,
) -> None:
    """Add a LoRA adapter to its base model; the result is a plain Hugging Face folder."""
    from stitch_ray.training.export import merge_adapter  # torch loads only where it is needed

    facts = merge_adapter(str(adapter), out, base=base, dtype=dtype.value, overwrite=overwrite)
    print(
        f"{out}: {facts['parameters']:,} parameters in {facts['dtype']}, base {facts['base']}; "
        f"merged logits differ from the adapter's by {facts['difference']:.1e} (float32)"
    )


if __name__ == "__main__":
    typer.run(merge)

"""`stitch-ray demo`: the main job end to end, on data and a model made on the spot."""

if not __package__:
    raise SystemExit("run: python -m jobs.demo")

import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.tiny_model import main as make_model
from stitch_ray.api import as_config, run_select
from stitch_ray.console import Overwrite, exits, progress_bar
from stitch_ray.data.synthetic import instruction_corpus

_ROWS = 400


@exits
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder of the demo")] = Path("runs/demo"),
    overwrite: Overwrite = False,
) -> None:
    """Make a corpus and a tiny model, select the best fifth of the corpus, and say what the selection did."""
    corpus, model = out / "corpus.json", out / "tiny-model"
    out.mkdir(parents=True, exist_ok=True)
    rows = instruction_corpus(_ROWS)
    corpus.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    if overwrite or not (model / "config.json").exists():
        make_model([str(corpus)], model, "1m", 150, 0, overwrite)
    config = as_config({"data": {"paths": [str(corpus)]}, "models": [{"path": str(model)}]})
    with progress_bar() as progress:
        summary = run_select(config, out / "select", overwrite=overwrite, progress=progress)
    kept = [json.loads(line) for line in (summary.folder / "selected.jsonl").read_text("utf-8").splitlines()]
    good, share = (sum(row["quality"] == "good" for row in of) / len(of) for of in (kept, rows))
    print(f"good answers: {share:.0%} of the corpus, {good:.0%} of what was kept (the model is a toy)")
    print(f"report: {summary.folder / 'report.html'}")
    print(summary.line)


if __name__ == "__main__":
    typer.run(demo)

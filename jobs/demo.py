"""`stitch-ray demo`: select, then fine-tune on what was kept, on data and a model made on the spot."""

if not __package__:
    raise SystemExit("run: python -m jobs.demo")

import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.tiny_model import main as make_model
from stitch_ray.api import as_config, run_job
from stitch_ray.config import FinetuneConfig, SelectConfig
from stitch_ray.console import Overwrite, exits, progress_bar
from stitch_ray.data.synthetic import instruction_corpus

_ROWS = 400


@exits
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder of the demo")] = Path("runs/demo"),
    overwrite: Overwrite = False,
) -> None:
    """Make a corpus and a tiny model, select the best half of the corpus, and fine-tune the model on it."""
    corpus, model = out / "corpus.json", out / "tiny-model"
    out.mkdir(parents=True, exist_ok=True)
    rows = instruction_corpus(_ROWS)
    corpus.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    if overwrite or not (model / "config.json").exists():
        make_model([str(corpus)], model, "1m", 150, 0, overwrite)

    choosing = {"data": {"paths": [str(corpus)]}, "models": [{"path": str(model)}], "select": {"proportion": 0.5}}
    with progress_bar() as progress:
        config = as_config(choosing, SelectConfig)
        selected = run_job("select", config, out / "select", overwrite=overwrite, progress=progress)
    chosen = selected.folder / "selected.jsonl"
    kept = [json.loads(line) for line in chosen.open(encoding="utf-8")]
    good, share = (sum(row["quality"] == "good" for row in of) / len(of) for of in (kept, rows))
    print(f"good answers: {share:.0%} of the corpus, {good:.0%} of what was kept (the model is a toy)")
    print(selected.line)

    training = {
        "model": {"path": str(model)},
        "tasks": [{"name": "instructions", "data": str(chosen)}],
        "max_length": 512,
        "batch": {"tokens": 1024},
        "epochs": 3,
        "optimizer": {"learning_rate": 1e-3},
        "workers": 2,
        "split": {"validation": 0.1},
        "eval": {"every": 10},
    }
    with progress_bar() as progress:
        trained = run_job(
            "finetune", as_config(training, FinetuneConfig), out / "finetune", overwrite=overwrite, progress=progress
        )
    print(trained.line)
    print(f"reports: {selected.folder / 'report.html'}, {trained.folder / 'report.html'}")


if __name__ == "__main__":
    typer.run(demo)

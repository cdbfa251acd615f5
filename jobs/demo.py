"""`stitch-ray demo`: select, fine-tune, and learn when to answer, on data and models made on the spot."""

if not __package__:
    raise SystemExit("run: python -m jobs.demo")

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.tiny_model import main as make_model
from stitch_ray.api import as_config, run_job
from stitch_ray.config import CONFIGS
from stitch_ray.console import Overwrite, exits, progress_bar
from stitch_ray.data.made_questions import short_questions
from stitch_ray.data.synthetic import instruction_corpus
from stitch_ray.ray_session import session
from stitch_ray.runs import Summary

_ROWS, _QUESTIONS = 400, 2400
_HELD_OUT = 0.6  # of the questions: what sample-answers calls stack, isotonic, calibrate and test
_SIGNALS = ["sequence_log_probability", "mean_token_entropy", "self_consistency", "semantic_entropy", "answer_length"]


@exits
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder of the demo")] = Path("runs/demo"),
    overwrite: Overwrite = False,
) -> None:
    """Make data and a tiny model, select, fine-tune, sample answers, train a scorer, and calibrate when to answer."""
    out.mkdir(parents=True, exist_ok=True)
    corpus, questions, model = out / "corpus.json", out / "questions.json", out / "tiny-model"
    rows = instruction_corpus(_ROWS)
    corpus.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    questions.write_text(json.dumps(short_questions(_QUESTIONS), indent=1), encoding="utf-8")
    if overwrite or not (model / "config.json").exists():
        make_model([str(corpus)], model, "1m", 150, 0, overwrite)

    def run(job: str, config: dict[str, Any]) -> Summary:
        with progress_bar() as progress:
            summary = run_job(job, as_config(config, CONFIGS[job]), out / job, overwrite=overwrite, progress=progress)
        print("\n".join(filter(None, ("", summary.text, summary.line))))
        return summary

    with session():  # one Ray for all of it
        choosing = {"data": {"paths": [str(corpus)]}, "models": [{"path": str(model)}], "select": {"proportion": 0.5}}
        chosen = run("select", choosing).folder / "selected.jsonl"
        kept = [json.loads(line) for line in chosen.open(encoding="utf-8")]
        good, share = (sum(row["quality"] == "good" for row in of) / len(of) for of in (kept, rows))
        print(f"good answers: {share:.0%} of the corpus, {good:.0%} of what was kept (the model is a toy)")

        training = {
            "model": {"path": str(model)},
            "tasks": [{"name": "instructions", "data": str(chosen)}, {"name": "questions", "data": str(questions)}],
            "max_length": 512,
            "batch": {"tokens": 1024},
            "epochs": 14,
            "optimizer": {"learning_rate": 3e-3, "warmup": 0.1},
            "workers": 2,
            "split": {"validation": 0.05, "test": _HELD_OUT},
            "eval": {"every": 50},
        }
        trained = run("finetune", training).folder / "model"

        sampling = {
            "data": {"paths": [str(questions)]},
            "model": {"path": str(trained)},
            "samples": {"num": 4, "max_tokens": 4},
            "signals": {"names": _SIGNALS},
        }
        answers = run("sample-answers", sampling).folder
        scoring = {
            "answers": [str(answers)],
            "encoder": {"path": str(trained), "max_length": 64},
            "signals": _SIGNALS,
            "training": {"epochs": 1, "learning_rate": 1e-3, "resources": {"num_threads": 2}},
        }
        scorer = run("train-scorer", scoring).folder
        run("calibrate", {"answers": [str(answers)], "scorer": str(scorer)})
        print(f"\nreports: {', '.join(str(path) for path in sorted(out.glob('*/report.html')))}")


if __name__ == "__main__":
    typer.run(demo)

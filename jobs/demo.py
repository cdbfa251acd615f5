"""`stitch-ray demo`: from a corpus to a served answer that can be trusted, on data and models made on the spot."""

if not __package__:
    raise SystemExit("run: python -m jobs.demo")

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.tiny_model import main as make_model
from stitch_ray.api import as_config, run_job
from stitch_ray.client import Client
from stitch_ray.client.words import abstention, percent
from stitch_ray.config import CONFIGS
from stitch_ray.config.reliability import AnswerSplitConfig
from stitch_ray.config.serve import ServeConfig
from stitch_ray.console import Overwrite, exits, progress_bar
from stitch_ray.data.made_experts import SKILLS, expert_server
from stitch_ray.data.made_questions import short_questions
from stitch_ray.data.splits import split_among
from stitch_ray.data.synthetic import instruction_corpus
from stitch_ray.ray_session import session
from stitch_ray.records import question_group
from stitch_ray.runs import Summary, write_text

_ROWS, _QUESTIONS = 400, 2400
_HELD_OUT = 0.6  # of the questions: what sample-answers calls stack, isotonic, calibrate and test
_STEPS = 150  # of the tiny model that is made
_MAX_TOKENS = 4
_COMPARED = ["self_consistency", "semantic_entropy"]
_SIGNALS = ["sequence_log_probability", "mean_token_entropy", "mean_token_margin"]  # cost nothing beside the answer
_ASKED = 6


@exits
def demo(
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder of the demo")] = Path("runs/demo"),
    overwrite: Overwrite = False,
) -> None:
    """Make data and a tiny model; select, fine-tune, train a scorer, calibrate; then serve an ensemble and ask it."""
    out.mkdir(parents=True, exist_ok=True)
    corpus, questions, model = out / "corpus.json", out / "questions.json", out / "tiny-model"
    rows = instruction_corpus(_ROWS)
    corpus.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    questions.write_text(json.dumps(short_questions(_QUESTIONS), indent=1), encoding="utf-8")
    if overwrite or not (model / "config.json").exists():
        make_model([str(corpus)], model, "1m", _STEPS, 0, overwrite)

    def run(job: str, config: dict[str, Any]) -> Summary:
        with progress_bar() as progress:
            summary = run_job(job, as_config(config, CONFIGS[job]), out / job, overwrite=overwrite, progress=progress)
        print("\n".join(filter(None, ("", summary.text, summary.line))))
        return summary

    from serve_apps.deploying import choose_profile

    choose_profile("throughput")
    # one Ray for all of it; threads may share cores
    with session(num_cpus=4), expert_server(_port(out / "experts-port.txt")) as experts:
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
            "samples": {"num": 4, "max_tokens": _MAX_TOKENS},
            "signals": {"names": [*_SIGNALS, *_COMPARED]},
        }
        answers = run("sample-answers", sampling).folder
        scoring = {
            "answers": [str(answers)],
            "encoder": {"path": str(trained), "max_length": 64},
            "signals": _SIGNALS,
            "training": {"epochs": 1, "learning_rate": 1e-3, "resources": {"num_threads": 2}},
        }
        scorer = run("train-scorer", scoring).folder

        ensemble = {
            "primary": {"model": {"path": str(trained)}, "max_tokens": _MAX_TOKENS},
            "auxiliaries": [{"endpoint": {"url": experts, "model": name, "name": name}} for name in SKILLS],
            "route": "dialogue",
        }
        predicting = {
            "data": {"paths": [str(questions)]},
            "ensemble": ensemble,
            "scorer": str(scorer),
            "calibration": True,
            "splits": ["isotonic", "calibrate", "test"],
        }
        predictions = run("predict", predicting).folder
        policy = run("calibrate", {"predictions": [str(predictions)], "route": "dialogue"}).folder
        serving = {
            "ensemble": ensemble,
            "scorer": str(scorer),
            "policy": str(policy),
            "http": {"port": 0},
            "feedback": {"folder": str(out / "feedback")},
        }
        _serve_and_ask(as_config(serving, ServeConfig), questions)
        print(f"\nreports: {', '.join(str(path) for path in sorted(out.glob('*/report.html')))}")


def _port(file: Path) -> int:
    """A server is known by its address, so that a demo that goes on needs the same one."""
    if not file.exists():
        from serve_apps.deploying import free_port

        write_text(file, str(free_port("127.0.0.1")))
    return int(file.read_text("utf-8"))


def _serve_and_ask(config: ServeConfig, questions: Path) -> None:
    """Bring the ensemble up, ask it what no job has learned from, and take it down again."""
    from serve_apps.deploying import deploy, end

    split = AnswerSplitConfig()  # type: ignore[call-arg]
    rows = json.loads(questions.read_text(encoding="utf-8"))
    groups = {row["id"]: question_group(row["question"], None) for row in rows}
    unseen = [row for row in rows if split_among(groups[row["id"]], split.shares, split.salt) == "test"][:_ASKED]
    url = deploy(config).url
    print(f"\nserved at {url}: the fine-tuned model, the scorer, and two calculators that err now and then")
    try:
        with Client(url) as client:
            for row in unseen:
                reply = client.predict(row["question"])
                sure = "unscored" if reply.confidence is None else f"confidence {percent(reply.confidence)}"
                said = (
                    f"{reply.answer} ({sure}, {reply.reason})"
                    if reply.answer
                    else f"{abstention(reply.reason)} ({sure})"
                )
                print(f"  {row['question']}: {said}; right is {row['answer']}")
                if reply.answer:
                    client.feedback(reply.id, correct=reply.answer == row["answer"])
    finally:
        end(config)


if __name__ == "__main__":
    typer.run(demo)

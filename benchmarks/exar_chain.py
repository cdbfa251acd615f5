"""The whole EXAR chain with toy models: on questions that such a model half knows, and on Dolly's open questions.

    python -m benchmarks.exar_chain [--only few] [--data DIR] [--out DIR]

`stitch-ray exar run` on each set, from a toy Llama made on the spot; every figure is of the questions that no stage has
learned from. The made questions are those of the demo: medians of digits, which the model learns, and remainders, which
it can only guess. Dolly's are dolly_openqa.xlsx in the folder `exar` of STITCH_RAY_DATA or ../shared/data.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from benchmarks.exar_answers import folder
from benchmarks.exar_scorer import minilm
from benchmarks.harness import publish, table
from stitch_ray.api import as_config, run_job
from stitch_ray.config import CONFIGS
from stitch_ray.data import formats, readers
from stitch_ray.data.made_questions import short_questions
from stitch_ray.data.synthetic import instruction_corpus
from stitch_ray.exclusion.measures import Verdicts, Within, verdict_text
from stitch_ray.ray_session import session
from stitch_ray.reliability.metacognition import Metacognition
from stitch_ray.runs import read_manifest
from stitch_ray.training.tiny import make_tiny_model

Values = dict[str, Any]


def main(
    only: Annotated[list[str] | None, typer.Option(help="few, many or dolly; default: all")] = None,
    data: Annotated[Path | None, typer.Option(help="folder with dolly/")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the runs; default: a temporary one")] = None,
    seed: Annotated[int, typer.Option(help="of everything")] = 0,
    name: Annotated[str, typer.Option(help="name of the result files")] = "exar-chain-cpu",
) -> None:
    """Run the chains and publish their tables."""
    sections, facts = {}, {}
    with tempfile.TemporaryDirectory(prefix="stitch-ray-exar-") as scratch, session(num_cpus=4):
        for title, prepare in (("few", _few), ("many", _many), ("dolly", _dolly)):
            if not only or title in only:
                place = (out or Path(scratch)) / title
                place.mkdir(parents=True, exist_ok=True)
                config = {**prepare(place, folder(data)), "seed": seed}
                summary = run_job("exar-run", as_config(config, CONFIGS["exar-run"]), place / "run")
                facts[title] = _facts(place / "run", summary.facts)
                sections[_TITLES[title]] = _text(facts[title], config, (place, folder(data), Path(minilm()).parent))
                print(f"{summary.text}\n{summary.line}", flush=True)
    publish(
        name,
        "The EXAR chain",
        sections,
        facts,
        " ".join(["python -m benchmarks.exar_chain", *(f"--only {title}" for title in only or []), f"--seed {seed}"]),
    )


_TITLES = {
    "few": "Made questions, few of them for DATASET+",
    "many": "Made questions, many of them for DATASET+",
    "dolly": "Dolly's open questions, of which the model knows none",
}


def _few(place: Path, _data: Path) -> Values:
    tuning = {"optimizer": {"learning_rate": 2e-3, "warmup": 0.1}, "epochs": 5}
    return _made(place, 3000, {"test": 0.3, "plus": 0.4}, tuning, tuning)


def _many(place: Path, _data: Path) -> Values:
    """As many for stage zero; the validator sees each answer four times, the EXAR model once."""
    tuning = {"optimizer": {"learning_rate": 2e-3, "warmup": 0.1}}
    return _made(place, 6000, {"test": 0.15, "plus": 0.7}, {**tuning, "epochs": 4}, {**tuning, "epochs": 1})


def _made(place: Path, count: int, split: Values, validator: Values, exar: Values) -> Values:
    questions = place / "questions.json"
    questions.write_text(json.dumps(short_questions(count), indent=1), encoding="utf-8")
    corpus = place / "corpus.json"
    corpus.write_text(json.dumps(instruction_corpus(400)), encoding="utf-8")
    _tiny(corpus, place / "tiny", {}, parameters="1m", steps=150)
    common = {"max_length": 96, "resources": {"num_threads": 2}}
    zero = {"epochs": 14, "batch": {"tokens": 1024}, "optimizer": {"learning_rate": 3e-3, "warmup": 0.1}}
    return {
        "data": {"paths": [str(questions)]},
        "model": {"path": str(place / "tiny"), "num_threads": 1},
        "split": split,
        "stage_zero": {**common, **zero},
        "validator": {**common, "batch": {"tokens": 2048}, **validator},
        "exar": {**common, "batch": {"tokens": 2048}, **exar},
        "attempts": {"max_attempts": 6, "max_tokens": 4},
    }


def _dolly(place: Path, data: Path) -> Values:
    source, fields = data / "dolly" / "dolly_openqa.xlsx", {"question": "Question", "answer": "response"}
    _tiny(source, place / "tiny", fields, parameters="2m", steps=300)
    tuning = {"max_length": 256, "batch": {"tokens": 2048}, "resources": {"num_threads": 2}}
    return {
        "data": {"paths": [str(source)], "fields": fields},
        "model": {"path": str(place / "tiny"), "num_threads": 1},
        "split": {"test": 0.2, "plus": 0.3},
        "stage_zero": {**tuning, "epochs": 40, "optimizer": {"learning_rate": 3e-3}},
        "predictions": {"questions": "all"},
        "rule": {"encoder": minilm()},
        "validator": {**tuning, "epochs": 4, "optimizer": {"learning_rate": 1e-3}},
        "exar": {**tuning, "epochs": 5, "optimizer": {"learning_rate": 2e-3}},
        "attempts": {"max_attempts": 6, "max_tokens": 48},
        "labels": {"metric": "rouge_l", "convention": "rouge_101", "threshold": 0.5},
    }


def _tiny(source: Path, out: Path, fields: dict[str, str], *, parameters: str, steps: int) -> None:
    if not (out / "config.json").exists():
        examples = [formats.convert(row, fields=fields) for row in readers.iter_rows(str(source))]
        make_tiny_model(examples, out, parameters=parameters, steps=steps, seed=0)


def _facts(run: Path, facts: Any) -> Values:
    plus = read_manifest(run / "stages" / "plus") or {}
    seconds = sum((read_manifest(stage) or {}).get("seconds", 0.0) for stage in (run / "stages").iterdir())
    measured = json.loads((run / "metrics.json").read_text("utf-8"))
    return {"sides": facts["sides"], "dataset_plus": plus["counts"], "seconds": round(seconds), **measured}


def _text(facts: Values, config: Values, hidden: Sequence[Path | None]) -> str:
    """The configuration, without the folders in `hidden`, and what came out."""
    shown = yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False)  # without anchors
    for place in filter(None, hidden):
        shown = shown.replace(f"{place}/", "")
    plus, changes = facts["dataset_plus"], facts["changes"]
    lines = [
        f"Questions: {facts['sides']['zero']} for stage zero, {facts['sides']['plus']} for DATASET+, {facts['sides']['test']} "
        f"unseen. DATASET+ has {plus['distinct answers']} distinct answers, {plus['of them CORRECT']} of them CORRECT. The "
        f"stages took {facts['seconds']} s.",
        f"First answers: {changes['wrong_to_right']} wrong became right, {changes['right_to_wrong']} right became wrong; "
        f"{changes['wrong_to_abstention']} wrong and {changes['right_to_abstention']} right ones were withheld.",
    ]
    if facts["validator"] is not None:
        measured = dict(facts["validator"])
        meta = measured.pop("metacognition")
        verdicts = Verdicts(**measured, metacognition=None if meta is None else Metacognition(**meta))
        lines.append(f"{verdict_text(verdicts, Within(**facts['within_questions']))}.")
    notes = "\n".join(f"- {note}" for note in facts["notes"])
    rows = table([_row(row) for row in facts["systems"]])
    return "\n\n".join(["\n".join(lines), rows, notes, f"```yaml\n{shown}```"])


def _row(row: Values) -> Values:
    selective = "-" if row["selective"] is None else f"{row['selective']:.1%}"
    return {
        "way": row["name"],
        "right [95 %]": f"{row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}]",
        "answered": f"{row['coverage']:.1%}",
        "right of those answered": selective,
        "to the first answer": f"{row['difference']:+.1%} [{row['difference_low']:+.1%}, {row['difference_high']:+.1%}]",
        "calls": f"{row['calls']:.2f}",
        "tokens": f"{row['tokens']:.0f}",
    }


if __name__ == "__main__":
    typer.run(main)

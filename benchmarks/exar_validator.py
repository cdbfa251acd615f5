"""A generative validator on the published answers of EXAR's models: trained on the rule's labels, measured on people's.

    python -m benchmarks.exar_validator [--data DIR] [--seeds 3] [--out DIR]

The jobs of a user one after another: `exar label`, `exar merge`, `finetune` with objective `validator`, `exar judge`. The
base is a toy Llama made on the spot, fine-tuned on the same questions with their gold answers first (stage zero). It
learns from answers to questions that no person labelled and is measured on those that people did; then the three answers
that are there to every judged question are replayed as three attempts. Data as in `benchmarks.exar_scorer`.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow.parquet as pq
import typer

from benchmarks.exar_answers import PUBLISHED, Row, apart, dolly, folder, squad
from benchmarks.harness import publish, table
from stitch_ray.api import as_config, run_job
from stitch_ray.config import CONFIGS
from stitch_ray.data import formats, readers
from stitch_ray.exclusion.labelling import label_files
from stitch_ray.exclusion.labels import CORRECT
from stitch_ray.exclusion.measures import Answering, Samples, majority, systems
from stitch_ray.exclusion.refinement import Attempt, Refinement, Rules
from stitch_ray.ray_session import session
from stitch_ray.training.tiny import make_tiny_model

SOURCES = {"squad": squad, "dolly": dolly}


def main(
    data: Annotated[Path | None, typer.Option(help="folder with squad/ and dolly/")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the runs; default: a temporary one")] = None,
    seeds: Annotated[int, typer.Option(help="runs of every validator")] = 3,
    parameters: Annotated[str, typer.Option(help="size of the toy model")] = "2m",
    epochs: Annotated[float, typer.Option(help="passes of the validator over its answers")] = 4,
    name: Annotated[str, typer.Option(help="name of the result files")] = "exar-validator-cpu",
) -> None:
    """Train and measure the validator of both sets, once a seed."""
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="stitch-ray-exar-") as scratch, session(num_cpus=4):
        for source, read in SOURCES.items():
            learned, judged = apart(read(folder(data)))
            facts[source] = _measured(
                source, learned, judged, (out or Path(scratch)) / source, seeds, parameters, epochs
            )
    text = (
        "Intervals are 95 %, from 1,000 resamples of the questions. "
        + "; ".join(
            f"{source}: {one['learned']} distinct answers to learn from beside the gold answers, {one['verdicts'][0]['human']['num']} "
            "distinct answers that people judged"
            for source, one in facts.items()
        )
        + ". The published rows are the reported figures of validators of 7 billion parameters on the answers that they were "
        "trained on. Within questions: the mean AUROC between answers to one question, and how many questions have both kinds.\n\n"
    )
    publish(
        name,
        "A generative validator on EXAR's answers",
        {
            "Verdicts": text + table([row for source, one in facts.items() for row in _verdict_rows(source, one)]),
            "Three recorded answers as three attempts": _REPLAYED
            + table([row for source, one in facts.items() for row in _replay_rows(source, one)]),
        },
        facts,
        f"python -m benchmarks.exar_validator --seeds {seeds} --parameters {parameters} --epochs {epochs:g}",
    )


_REPLAYED = (
    "The recorded answers of the published models at temperatures .1, .6 and .8, as people judged them, in that order: the "
    "first that the validator accepts is given, or none. Nothing was excluded when they were made, so this tells what a "
    "validator is worth, not what excluding is. An answer that comes again after it was turned down stays turned down, also "
    "where people judged it the other way the second time.\n\n"
)


def _measured(
    source: str, learned: list[Row], judged: list[Row], out: Path, seeds: int, parameters: str, epochs: float
) -> dict[str, Any]:
    out.mkdir(parents=True, exist_ok=True)
    # Stage zero's thousand answers to Dolly's questions have no BERTScore: there the rule does without.
    without = any(row["bert_f"] is None for row in learned)
    files = {part: _write(out / f"{part}.jsonl", rows) for part, rows in (("learned", learned), ("judged", judged))}
    labelled = label_files([str(files["learned"])], out / "labels", without_bert=without)
    label_files([str(files["judged"])], out / "labels-judged")
    merging = {"answers": [str(out / "labels")], "gold": True, "balance": "weights", "split": {"test": 0.0}}
    merged = _run("exar-merge", merging, out / "plus")
    gold = {row["question"]: row["gold"] for row in learned}
    questions = _write(out / "questions.jsonl", [{"question": q, "answer": answer} for q, answer in gold.items()])
    examples = [formats.convert(row) for row in readers.iter_rows(str(questions))]
    if not (out / "tiny" / "config.json").exists():
        make_tiny_model(examples, out / "tiny", parameters=parameters, steps=300, seed=0)
    common = {"max_length": 256, "batch": {"tokens": 2048}, "resources": {"num_threads": 2}, "split": {"validation": 0}}
    zero = _run(
        "finetune",
        {
            **common,
            "model": {"path": str(out / "tiny")},
            "tasks": [{"name": "qa", "data": str(questions), "format": "question_answer"}],
            "epochs": 3,
            "optimizer": {"learning_rate": 2e-3},
        },
        out / "stage-zero",
    )
    found: dict[str, Any] = {
        "learned": merged.facts["counts"]["answers to learn from"],
        "agreement": {key: labelled.facts[key] for key in ("rule_given", "rule_human")},
        "verdicts": [],
        "replayed": [],
    }
    for seed in range(seeds):
        task = {"name": "validator", "data": str(out / "plus" / "validator.jsonl"), "objective": "validator"}
        trained = _run(
            "finetune",
            {
                **common,
                "model": {"path": str(zero.folder / "model")},
                "tasks": [{**task, "format": "judged_answer"}],
                "epochs": epochs,
                "optimizer": {"learning_rate": 1e-3},
                "seed": seed,
            },
            out / f"validator-{seed}",
        )
        model = {"path": str(trained.folder / "model"), "num_threads": 2}
        verdicts = _run("exar-judge", {"answers": [str(out / "labels-judged")], "model": model}, out / f"judge-{seed}")
        print(f"{source}, seed {seed}\n{verdicts.text}", flush=True)
        found["verdicts"].append(json.loads((verdicts.folder / "metrics.json").read_text("utf-8")))
        found["replayed"].append(_replayed(judged, pq.read_table(verdicts.folder / "verdicts.parquet").to_pylist()))
    return found


def _run(job: str, config: dict[str, Any], out: Path) -> Any:
    return run_job(job, as_config(config, CONFIGS[job]), out)


def _write(file: Path, rows: list[Row]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def _replayed(judged: list[Row], verdicts: list[Row]) -> list[Row]:
    """What the recorded answers come to, in several ways."""
    said = {(row["question"], row["answer"]): row["probability"] for row in verdicts}
    by_question: dict[str, list[Row]] = defaultdict(list)
    for row in sorted(judged, key=lambda row: row["temperature"]):
        by_question[row["question"]].append(row)
    own = list(by_question.values())
    right = [[row["human"] == CORRECT for row in rows] for rows in own]
    votes = [
        majority(Samples(tuple(row["answer"] for row in rows), (0.0,) * 3, (False,) * 3, (0,) * 3, 0), 3)
        for rows in own
    ]
    ways = [
        _answering("first answer", [(flags[0], True) for flags in right], [1.0] * len(own)),
        _attempted("validator", own, lambda row: said.get((row["question"], row["answer"]))),
        _attempted("oracle", own, lambda row: float(row["human"] == CORRECT)),
        _answering(
            "majority of 3", [(flags[place], True) for flags, place in zip(right, votes, strict=True)], [3.0] * len(own)
        ),
    ]
    return [
        {"name": one.name, "right": one.accuracy, "low": one.low, "high": one.high, "answered": one.coverage,
         "selective": one.selective, "calls": one.calls}
        for one in systems(ways)
    ]  # fmt: skip


def _attempted(name: str, questions: list[list[Row]], judge: Any) -> Answering:
    ends, calls = [], []
    for rows in questions:
        state = Refinement(Rules(max_attempts=len(rows), exclude="none"))
        for row in rows:
            checked = state.check(row["answer"])
            probability = judge(row) if checked == "judged" else None
            if checked == "judged" and probability is None:
                checked = "judge_failed"
            state = state.add(
                Attempt(answer=row["answer"], temperature=row["temperature"], checked=checked, probability=probability)
            )
            if state.outcome is not None:
                break
        assert state.outcome is not None
        answered = state.outcome.answer is not None
        ends.append((answered and rows[len(state.attempts) - 1]["human"] == CORRECT, answered))
        calls.append(float(state.calls))
    return _answering(name, ends, calls)


def _answering(name: str, ends: list[tuple[bool, bool]], calls: list[float]) -> Answering:
    right, answered = (np.array(flags, bool) for flags in zip(*ends, strict=True))
    return Answering(name=name, right=right, answered=answered, calls=np.array(calls), tokens=np.zeros(len(ends)))


def _verdict_rows(source: str, found: dict[str, Any]) -> list[Row]:
    said = PUBLISHED[source]
    empty = dict.fromkeys(
        ("balanced accuracy", "MCC", "AUROC", "within questions", "Brier", "ECE", "meta-d' / d'", "unparsable"), ""
    )
    rows = [
        {
            "answers": f"{source}, own training rows",
            "validator": "published",
            "accuracy": f"{said['accuracy']:.3f}",
            "commoner verdict": f"{said['majority']:.3f}",
            **empty,
            "MCC": f"{said['mcc']:.3f}",
        }
    ]
    for truth, by in (("human", "people"), ("label", "rule")):
        for seed, one in enumerate(found["verdicts"]):
            rows.append(_verdict_row(f"{source}, {by}", f"ours, seed {seed}", one[truth]))
    return rows


def _verdict_row(answers: str, validator: str, one: dict[str, Any]) -> Row:
    auroc, meta = one["scores"]["rows"][0]["metrics"]["auroc"], one["metacognition"]
    within = one["within_questions"]

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    return {
        "answers": answers,
        "validator": validator,
        "accuracy": shown(one["accuracy"]),
        "commoner verdict": shown(one["majority"]),
        "balanced accuracy": shown(one["balanced_accuracy"]),
        "MCC": shown(one["mcc"]),
        "AUROC": f"{auroc['value']:.3f} [{auroc['low']:.3f}, {auroc['high']:.3f}]",
        "within questions": f"{shown(within['auroc'])} ({within['questions']})",
        "Brier": shown(one["brier"]),
        "ECE": shown(one["ece"]),
        "meta-d' / d'": "-" if meta is None else f"{meta['meta_d_prime']:.2f} / {meta['d_prime']:.2f}",
        "unparsable": one["replies"]["unparsable"],
    }


def _replay_rows(source: str, found: dict[str, Any]) -> list[Row]:
    first = found["replayed"][0]
    rows = [_replay_row(source, row["name"], row) for row in first if row["name"] != "validator"]
    for seed, run in enumerate(found["replayed"]):
        rows += [_replay_row(source, f"validator, seed {seed}", row) for row in run if row["name"] == "validator"]
    return rows


def _replay_row(source: str, name: str, row: Row) -> Row:
    selective = "-" if row["selective"] is None else f"{row['selective']:.1%}"
    return {
        "answers": source,
        "by": name,
        "right": f"{row['right']:.1%} [{row['low']:.1%}, {row['high']:.1%}]",
        "of those answered": selective,
        "answered": f"{row['answered']:.0%}",
        "calls": f"{row['calls']:.2f}",
    }


if __name__ == "__main__":
    typer.run(main)

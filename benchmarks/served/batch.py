"""The same questions through `predict`, and asked one after the other of the served ensemble."""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from benchmarks.harness import table
from benchmarks.served.load import Load, measure
from benchmarks.served.session import AUTHORIZED, LOGICAL_CPUS, served
from stitch_ray.config.ensemble import EnsembleConfig
from stitch_ray.ensemble.fingerprints import ensemble_fingerprints
from stitch_ray.records import Example, Turn
from stitch_ray.reliability.policy import Policy, Target
from stitch_ray.reliability.probability import Isotonic
from stitch_ray.reliability.scorer.file import ScorerFile
from stitch_ray.reliability.scorer.logistic import LogisticStack
from stitch_ray.training.tiny import make_tiny_model

PARAMETERS, ANSWER_TOKENS, CONCURRENCY = "5m", 32, 32
THRESHOLD = 0.5
BAR = 3.0


def compare(questions: int) -> tuple[str, dict[str, Any]]:
    """Questions a second, and whether both give the same answers."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = _questions(questions)
        (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ensemble = _prepare(folder, rows)
        values = {"ensemble": ensemble, "scorer": str(folder / "scorer"), "policy": str(folder / "policy.json")}
        loads, answers = _one_by_one(values, [row["question"] for row in rows])
        whole_s, asking_s, found = _predict(values, folder)
    alone, many = loads[1], loads[CONCURRENCY]
    sides = {
        "loop over HTTP, one after the other": (len(rows), alone.whole_s, ""),
        f"{CONCURRENCY} at a time over HTTP": (len(rows), many.whole_s, ""),
        "predict, asking": (len(rows), asking_s, ""),
        "predict, whole job": (len(rows), whole_s, "questions, models and actors, report"),
    }
    lines = [
        {
            "side": side,
            "seconds": f"{seconds:.1f}",
            "questions/s": f"{num / seconds:.1f}",
            "x loop": f"{alone.whole_s / seconds:.2f}",
            "includes": included,
        }
        for side, (num, seconds, included) in sides.items()
    ]
    same = sum(found.get(question) == answer for question, answer in answers.items())
    times = alone.whole_s / asking_s
    note = (
        f"{len(rows)} questions, a model of {PARAMETERS} parameters with up to {ANSWER_TOKENS} tokens an answer, a scorer "
        f"of one signal, route none; one replica or actor of one thread each, predict with {CONCURRENCY} questions under "
        f"way. The service is up before the clock starts; predict's whole job starts its actors in an open Ray session. "
        f"Asking, predict is {times:.2f} x the loop (bar {BAR:g}: {'met' if times >= BAR else 'MISSED'}), as a whole "
        f"job {alone.whole_s / whole_s:.2f} x. {same} of {len(answers)} decisions and answers are equal."
    )
    facts = {"whole_s": whole_s, "asking_s": asking_s, "equal": same, "questions": len(rows)}
    return f"{table(lines)}\n\n{note}", {**facts, "http": {str(key): load.facts() for key, load in loads.items()}}


def _questions(num: int) -> list[dict[str, str]]:
    drawn = random.Random(0)
    words = ("red", "green", "blue", "old", "new", "small", "large", "quiet", "wooden", "round")
    return [
        {
            "id": f"q{n}",
            "question": f"Which {' '.join(drawn.choices(words, k=drawn.randint(2, 8)))} thing is number {n}?",
            "answer": " ".join(drawn.choices(words, k=30)),
        }
        for n in range(num)
    ]


def _prepare(folder: Path, rows: list[dict[str, str]]) -> dict[str, Any]:
    """Model, scorer and policy in `folder`; returns the ensemble."""
    examples = [
        Example(messages=(Turn("user", row["question"]), Turn("assistant", row["answer"])), source="", line=n, raw="")
        for n, row in enumerate(rows[:64])
    ]
    make_tiny_model(examples, folder / "model", parameters=PARAMETERS, steps=5)
    model = {"path": str(folder / "model"), "name": "primary", "dtype": "float32"}
    ensemble = {"primary": {"model": model, "max_tokens": ANSWER_TOKENS}}
    scorer = ScorerFile(
        encoder_fingerprint=None,
        loss=None,
        max_length=None,
        stack=LogisticStack(("perplexity",), (0.0,), (10.0,), (-1.0,), 1.0),
        isotonic=Isotonic((-50.0, 2.0), (0.05, 0.95)),
        answers_from=None,
    )
    (folder / "scorer").mkdir()
    scorer.save(folder / "scorer")
    config = EnsembleConfig.model_validate(ensemble)
    fingerprints = ensemble_fingerprints(config, ScorerFile.load(folder / "scorer").fingerprint)
    target = Target(None, 0.1, 0.1, THRESHOLD, 100, 40, 0.1, 0.4, 0.01, "learn_then_test", None)
    Policy((target,), fingerprints, {"loss": "error"}).save(folder / "policy.json")
    return ensemble


def _one_by_one(
    values: Mapping[str, Any], questions: list[str]
) -> tuple[dict[int, Load], dict[str, tuple[str, str | None]]]:
    """The load with one client and with many; question -> decision and answer."""
    bodies = [{"question": question} for question in questions]
    answers: dict[str, tuple[str, str | None]] = {}
    loads = {}
    with served("throughput") as child:
        child.deploy_models(values)
        url = f"{child.url}/v1/predict"
        measure(url, bodies, clients=1, requests=10, headers=AUTHORIZED).check()
        for clients in (1, CONCURRENCY):
            loads[clients] = measure(
                url, bodies, clients=clients, requests=len(bodies), headers=AUTHORIZED, keep=clients == 1
            ).check()
    for question, response in zip(questions, loads[1].responses, strict=True):
        answers[question] = (response["decision"], response["answer"])
    return loads, answers


def _predict(values: Mapping[str, Any], folder: Path) -> tuple[float, float, dict[str, tuple[str, str | None]]]:
    """Seconds of the job, seconds of asking, and question -> decision and answer."""
    from stitch_ray.api import as_config, run_job
    from stitch_ray.config.predict import PredictConfig
    from stitch_ray.ray_session import session

    data = {"paths": [str(folder / "questions.jsonl")]}
    config = as_config({**values, "data": data, "concurrency": CONCURRENCY}, PredictConfig)
    with session(num_cpus=LOGICAL_CPUS):
        began = time.perf_counter()
        summary = run_job("predict", config, folder / "run")
        whole = time.perf_counter() - began
    rows = pq.read_table(folder / "run" / "predictions.parquet").to_pylist()
    found = {row["question"]: (row["decision"], row["answer"]) for row in rows}
    return whole, float(summary.facts["asking_seconds"]), found

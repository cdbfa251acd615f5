"""The actor that answers planned batches of questions, and labels and measures what it answered.

Every stage of a batch has a file, written by rename: `samples/` holds answers as they came, `labels-<key>/` and
`signals-<key>/` what was made of them. What has a file is not done again, so other labels cost no answer.
"""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.batch_files import audit, batch_file, count_attempt, counts_of, readable, write_batch
from stitch_ray.config.sample_answers import SampleAnswersConfig
from stitch_ray.data.splits import split_among
from stitch_ray.reliability.answers.distractors import DistractorItem, ask
from stitch_ray.reliability.answers.judging import Judging
from stitch_ray.reliability.answers.questions import Prompter, Question, read_questions
from stitch_ray.reliability.answers.respondent import Respondent, respondent
from stitch_ray.reliability.answers.sampling import SAMPLE_SCHEMA, Row, answer_rows, distractor_rows, requests_for

log = logging.getLogger(__name__)

_ADVICE = "lower model.batch_tokens, samples.max_tokens or samples.num"


@dataclass(frozen=True, slots=True)
class AnswerJob:
    """What an actor needs to know: everything but the batches. `labels`, `signals`: folders, None where none are asked
    for."""

    config: SampleAnswersConfig
    prompter: Prompter | None
    name: str
    questions: Path
    samples: Path
    labels: Path | None
    signals: Path | None
    attempts: Path
    call_log: str | None = None

    def is_done(self, batch_id: int) -> bool:
        """Whether nothing is left to do for the batch."""
        return (
            not self.unanswered(batch_id)
            and (self.labels is None or labelled(batch_file(self.labels, batch_id)))
            and (self.signals is None or readable(batch_file(self.signals, batch_id)))
        )

    def unanswered(self, batch_id: int) -> list[Question]:
        """Questions of the batch to ask: all without a file; a server is asked again what it failed to answer before.

        A local model is not: it would fail for the same reason.
        """
        file = batch_file(self.samples, batch_id)
        if not readable(file):
            return read_questions(batch_file(self.questions, batch_id))
        failed = failures(file) if self.prompter is None else {}
        if not failed:
            return []
        return [one for one in read_questions(batch_file(self.questions, batch_id)) if one.example_id in failed]


def labelled(file: Path) -> bool:
    """Whether the labels are there: those of a judge that could not be reached are not."""
    return readable(file) and not counts_of(file).get("judge_failed")


def failures(samples: Path) -> dict[str, str]:
    """Reason by example id, of the questions that got no answer."""
    table = pq.read_table(samples, columns=["example_id", "error"])
    pairs = zip(table["example_id"].to_pylist(), table["error"].to_pylist(), strict=True)
    return {example_id: reason for example_id, reason in pairs if reason is not None}


class Sampler:
    """A Ray Data actor. Loads a model when the first batch needs it; a call does one batch and returns what it cost."""

    def __init__(self, job: AnswerJob) -> None:
        self._job = job
        if job.config.model and job.config.model.engine == "transformers":
            import torch

            torch.set_num_threads(job.config.model.num_threads)  # encoders compute here too, perhaps without the model

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = [self._report(int(number)) for number in batch["batch_id"]]
        return {key: np.array([row[key] for row in done]) for key in done[0]}

    @cached_property
    def _respondent(self) -> Respondent:
        return respondent(self._job.config, self._job.prompter)

    @cached_property
    def _judging(self) -> Judging:
        return Judging(self._job.config)

    def _report(self, batch_id: int) -> dict[str, Any]:
        """What the batch cost, or why it failed: Ray Data wraps what a worker raises and loses the reason."""
        started = time.time()
        cost = {
            "questions": 0,
            "failed": 0,
            "reason": "",
            "answers": 0,
            "tokens": 0,
            "sampling_seconds": 0.0,
            "error": "",
        }
        try:
            cost.update(self._do(batch_id))
        except Exception as error:
            log.exception("batch %d", batch_id)
            cost["error"] = f"batch {batch_id} of {self._job.name}: {str(error) or type(error).__name__}"
        where = {"batch_id": batch_id, "actor": os.getpid(), "node": platform.node()}
        return {**cost, **where, "started": started, "seconds": time.time() - started}

    def _do(self, batch_id: int) -> dict[str, Any]:
        job = self._job
        count_attempt(job.attempts, batch_id, _ADVICE)
        cost: dict[str, Any] = {}
        file = batch_file(job.samples, batch_id)
        asked = job.unanswered(batch_id)
        if asked:
            audit(job.call_log, "samples", batch_id, len(asked))
            started = time.time()
            rows = self._sample(batch_id, asked)
            tokens = sum(row.get("tokens") or 0 for row in rows)
            cost = {"answers": len(rows), "tokens": tokens, "sampling_seconds": time.time() - started}
        questions = {one.example_id: one for one in read_questions(batch_file(job.questions, batch_id))}
        failed = failures(file)
        # From the file, not from memory: a resumed batch has the same numbers, down to their rounding.
        rows = [row for row in pq.read_table(file).to_pylist() if row["error"] is None]
        if job.labels is not None and not labelled(batch_file(job.labels, batch_id)):
            audit(job.call_log, "labels", batch_id, len(rows))
            write_batch(batch_file(job.labels, batch_id), *self._judging.labels(rows, questions))
        if job.signals is not None and not readable(batch_file(job.signals, batch_id)):
            audit(job.call_log, "signals", batch_id, len(rows))
            made = self._judging.signals(rows, questions, lambda: self._respondent.engine)
            write_batch(batch_file(job.signals, batch_id), *made)
        cost |= {"questions": len(questions), "failed": len(failed), "reason": next(iter(failed.values()), "")}
        return cost

    def _sample(self, batch_id: int, asked: Sequence[Question]) -> list[Row]:
        """Ask, and write the batch's file; return the new rows."""
        job, who = self._job, self._respondent
        requests = [requests_for(one, job.config.samples, job.config.seed, together=who.together) for one in asked]
        results = iter(who.engine.generate([one.request for of_one in requests for one in of_one]))
        rows: dict[str, list[Row]] = {}
        for question, of_one in zip(asked, requests, strict=True):
            rows[question.example_id] = answer_rows(question, of_one, [next(results) for _ in of_one])
        answered = [one for one in asked if rows[one.example_id][0].get("error") is None]
        counts = self._add_distractors(answered, rows)
        file = batch_file(job.samples, batch_id)
        kept: list[Row] = []
        if file.exists():  # some were answered by an earlier run
            kept = [row for row in pq.read_table(file).to_pylist() if row["error"] is None]
            before = counts_of(file)
            counts = {key: counts.get(key, 0) + before.get(key, 0) for key in {**before, **counts}}
        for stage in ("labels", "signals"):
            for stale in file.parent.parent.glob(f"{stage}-*/{file.name}"):
                stale.unlink()  # they are of the batch as it was
        new = [row for of_question in rows.values() for row in of_question]
        order = {one.example_id: place for place, one in enumerate(read_questions(batch_file(job.questions, batch_id)))}
        together = sorted([*kept, *new], key=lambda row: order[row["example_id"]])
        write_batch(file, pa.Table.from_pylist(together, SAMPLE_SCHEMA), counts)
        return new

    def _add_distractors(self, answered: Sequence[Question], rows: Mapping[str, list[Row]]) -> dict[str, int]:
        config = self._job.config
        if config.distractors is None:
            return {}
        if config.distractors.questions == "train":
            split = config.split
            answered = [one for one in answered if split_among(one.group_id, split.shares, split.salt) == "train"]
        items = [
            DistractorItem(item_id=one.asked, question=one.question, reference=one.references[0], context=one.context)
            for one in answered
        ]
        found = ask(self._respondent.engine.generate, items, config.distractors, seed=config.seed)
        for question, texts in zip(answered, found.answers, strict=True):
            rows[question.example_id].extend(distractor_rows(question, texts))
        return asdict(found.counts)

"""The actor that takes questions through the ensemble, chunk by chunk, with many of them under way at a time.

Every stage of a chunk has a file, written by rename: `predictions/`, `baselines/` (what each auxiliary says to the bare
question) and `labels-<key>/`. What has a file is not done again, so other labels cost no call of a model.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.batch_files import audit, batch_file, count_attempt, readable, write_batch
from stitch_ray.config.sample_answers import LabelsConfig
from stitch_ray.ensemble.batch.questions import Asked, read_chunk
from stitch_ray.ensemble.batch.respondents import Respondent
from stitch_ray.ensemble.batch.rows import CHUNK_RESULT_SCHEMA, Row, failure_row, prediction_row
from stitch_ray.reliability.answers.labels import Labelled, Labeller
from stitch_ray.reliability.answers.sampler import failures, labelled

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PredictJob:
    """What the actor needs to know beside the models. `baselines`, `labels`: folders, None where none are wanted.

    `auxiliaries`: names of those that answer the bare question. `ask_again`: a server may answer today what it failed
    to answer yesterday; a local model would fail for the same reason.
    """

    questions: Path
    predictions: Path
    attempts: Path
    baselines: Path | None
    labels: Path | None
    labels_config: LabelsConfig
    auxiliaries: tuple[str, ...]
    concurrency: int
    ask_again: bool
    call_log: str | None = None

    def is_done(self, chunk: int) -> bool:
        """Whether nothing is left to do for the chunk."""
        return not self.needs_models(chunk) and (self.labels is None or labelled(batch_file(self.labels, chunk)))

    def needs_models(self, chunk: int) -> bool:
        """Whether a question of the chunk has still to be asked."""
        return bool(self.unanswered(chunk)) or (
            self.baselines is not None and not readable(batch_file(self.baselines, chunk))
        )

    def unanswered(self, chunk: int) -> list[Asked]:
        file = batch_file(self.predictions, chunk)
        if not readable(file):
            return read_chunk(batch_file(self.questions, chunk))
        failed = failures(file) if self.ask_again else {}
        if not failed:
            return []
        return [one for one in read_chunk(batch_file(self.questions, chunk)) if one.question.example_id in failed]


class Runner:
    """A Ray Data actor; its calls run on one event loop. `connect` makes the respondent in this process: the models
    are elsewhere."""

    def __init__(self, job: PredictJob, connect: Callable[[], Respondent] | None) -> None:
        self._job = job
        self._connect = connect
        self._lines = asyncio.Semaphore(job.concurrency)
        self._one_labeller = asyncio.Lock()

    async def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = [await self._report(int(number)) for number in batch["chunk"]]
        return {key: np.array([row[key] for row in done]) for key in done[0]}

    @cached_property
    def _respondent(self) -> Respondent:
        assert self._connect is not None
        return self._connect()

    @cached_property
    def _labeller(self) -> Labeller:
        return Labeller(self._job.labels_config)

    async def _report(self, chunk: int) -> dict[str, Any]:
        """What the chunk cost, or why it failed: Ray Data wraps what a worker raises and loses the reason."""
        started = time.time()
        cost = {
            "chunk": chunk,
            "questions": 0,
            "failed": 0,
            "reason": "",
            "asked": 0,
            "calls": 0,
            "tokens": 0,
            "error": "",
        }
        try:
            cost.update(await self._do(chunk))
        except Exception as error:
            log.exception("chunk %d", chunk)
            while isinstance(error, ExceptionGroup):  # of the questions that were under way, the first that failed
                error = error.exceptions[0]
            cost["error"] = f"chunk {chunk}: {str(error) or type(error).__name__}"
        return {**cost, "started": started, "seconds": time.time() - started}

    async def _do(self, chunk: int) -> dict[str, Any]:
        job = self._job
        count_attempt(job.attempts, chunk, "lower concurrency")
        cost: dict[str, Any] = {}
        asked = job.unanswered(chunk)
        if asked:
            audit(job.call_log, "predictions", chunk, len(asked))
            rows = await self._gather(self._predict(one) for one in asked)
            self._keep(chunk, rows)
            cost = {key: sum(row.get(key) or 0 for row in rows) for key in ("calls", "tokens")} | {"asked": len(asked)}
        everyone = read_chunk(batch_file(job.questions, chunk))
        if job.baselines is not None and not readable(batch_file(job.baselines, chunk)):
            audit(job.call_log, "baselines", chunk, len(everyone))
            await self._ask_auxiliaries(chunk, everyone)
        if job.labels is not None and not labelled(batch_file(job.labels, chunk)):
            audit(job.call_log, "labels", chunk, len(everyone))
            async with self._one_labeller:
                await asyncio.to_thread(self._label, chunk, everyone)
        failed = failures(batch_file(job.predictions, chunk))
        return {**cost, "questions": len(everyone), "failed": len(failed), "reason": next(iter(failed.values()), "")}

    async def _gather(self, work: Any) -> list[Any]:
        """All of `work`, at most `concurrency` at a time over all chunks; the first failure cancels the rest."""

        async def in_line(one: Coroutine[Any, Any, Any]) -> Any:
            async with self._lines:
                return await one

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(in_line(one)) for one in work]
        self._respondent.check()
        return [task.result() for task in tasks]

    async def _predict(self, asked: Asked) -> Row:
        outcome = await self._respondent.predict(asked)
        return failure_row(asked, outcome) if isinstance(outcome, str) else prediction_row(outcome)

    def _keep(self, chunk: int, new: Sequence[Row]) -> None:
        """Write the chunk's predictions, with those that an earlier run already had."""
        job, file = self._job, batch_file(self._job.predictions, chunk)
        rows = {row["example_id"]: row for row in (pq.read_table(file).to_pylist() if file.exists() else [])}
        rows |= {row["example_id"]: row for row in new}
        for stale in file.parent.parent.glob(f"labels-*/{file.name}"):
            stale.unlink()  # they are of the chunk as it was
        order = [one.question.example_id for one in read_chunk(batch_file(job.questions, chunk))]
        write_batch(file, pa.Table.from_pylist([rows[name] for name in order], CHUNK_RESULT_SCHEMA))

    async def _ask_auxiliaries(self, chunk: int, everyone: Sequence[Asked]) -> None:
        assert self._job.baselines is not None
        columns: dict[str, Any] = {}
        for number, name in enumerate(self._job.auxiliaries):
            answers = await self._gather(self._respondent.ask_auxiliary(number, one) for one in everyone)
            columns[f"answer.{name}"] = pa.array([one.text for one in answers], pa.string())
            columns[f"tokens.{name}"] = pa.array([one.tokens for one in answers], pa.int64())
            columns[f"seconds.{name}"] = pa.array([one.seconds for one in answers], pa.float64())
        write_batch(batch_file(self._job.baselines, chunk), pa.table(columns))

    def _label(self, chunk: int, everyone: Sequence[Asked]) -> None:
        """Labels of both stages' answers, of the one given, and of those of the auxiliaries; null where there is none."""
        job = self._job
        assert job.labels is not None
        predictions = pq.read_table(batch_file(job.predictions, chunk))
        answers = {f"{name}_label": predictions[name].to_pylist() for name in ("draft", "refined", "answer")}
        if job.baselines is not None:
            table = pq.read_table(batch_file(job.baselines, chunk))
            answers |= {f"label.{name}": table[f"answer.{name}"].to_pylist() for name in job.auxiliaries}
        # In one call, so that a judge is asked once about an answer that several of them gave.
        items = [
            Labelled(
                question=one.question.question, answer=text, references=one.references, context=one.question.context
            )
            for texts in answers.values()
            for one, text in zip(everyone, texts, strict=True)
            if text is not None
        ]
        found = self._labeller.label(items)
        values = iter(found.label)
        columns = {
            name: np.array([np.nan if text is None else next(values) for text in texts], np.float64)
            for name, texts in answers.items()
        }
        table = pa.table({name: pa.array(row, pa.float32(), mask=np.isnan(row)) for name, row in columns.items()})
        write_batch(batch_file(job.labels, chunk), table, found.counts)

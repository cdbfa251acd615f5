"""The actor that judges batches of answers: P(CORRECT) of each, and what the validator says in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.batch_files import audit, batch_file, count_attempt, readable, write_batch
from stitch_ray.config.exar import ExarJudgeConfig
from stitch_ray.data.quarantine import BadRow
from stitch_ray.engines.base import Engine, EngineError, Request, Sampling
from stitch_ray.exclusion.batch_work import BatchActor
from stitch_ray.exclusion.labels import CORRECT, WRONG
from stitch_ray.exclusion.prompts import validator_prompt
from stitch_ray.records import Example, Turn
from stitch_ray.reliability.answers.questions import Prompter
from stitch_ray.reliability.signals.prompted import probability_of
from stitch_ray.training.objectives import SFT

ASKED_SCHEMA = pa.schema(
    [("answer_id", pa.string()), ("question", pa.string()), ("context", pa.string()), ("answer", pa.string())]
)
VERDICT_SCHEMA = pa.schema(
    [("answer_id", pa.string()), ("probability", pa.float64()), ("reply", pa.string()), ("problem", pa.string())]
)
"""One row an answer. `probability` and `reply` null where the engine refused, for the reason in `problem`."""


@dataclass(frozen=True, slots=True)
class JudgeJob:
    """What an actor needs to know."""

    config: ExarJudgeConfig
    prompter: Prompter
    asked: Path
    results: Path
    tries: Path
    call_log: str | None = None

    def is_done(self, batch_id: int) -> bool:
        return readable(batch_file(self.results, batch_id))


class JudgeWorker(BatchActor):
    """Loads the validator when the first batch needs it."""

    def __init__(self, job: JudgeJob) -> None:
        self._job = job

    @cached_property
    def _engine(self) -> Engine:
        from stitch_ray.engines.registry import load_engine
        from stitch_ray.reliability.answers.templated import TemplatedEngine

        return TemplatedEngine(load_engine(self._job.config.model), self._job.prompter.chat_template())

    def do(self, batch_id: int) -> tuple[int, int]:
        job = self._job
        count_attempt(job.tries, batch_id, "lower model.batch_tokens")
        rows = pq.read_table(batch_file(job.asked, batch_id)).to_pylist()
        audit(job.call_log, "judge", batch_id, len(rows))
        prompts = [prompt_of(row["question"], row["context"], row["answer"]) for row in rows]
        found = probability_of(self._engine, prompts, CORRECT, WRONG)
        sampling = Sampling(max_tokens=job.config.max_tokens)
        requests = [
            Request(request_id=row["answer_id"], prompt=p, sampling=sampling)
            for row, p in zip(rows, prompts, strict=True)
        ]
        replies = self._engine.generate(requests)
        write_batch(
            batch_file(job.results, batch_id),
            pa.Table.from_pylist(
                [_verdict(row["answer_id"], p, reply) for row, p, reply in zip(rows, found, replies, strict=True)],
                VERDICT_SCHEMA,
            ),
        )
        return len(rows), 0


def prompt_of(question: str, context: str | None, answer: str) -> tuple[Turn, ...]:
    """The validator's prompt, as objective `validator` renders it. Raises BadRow for a question that is none."""
    example = Example(
        messages=(Turn("user", question), Turn("assistant", answer)), source="", line=0, raw="", context=context
    )
    turns = SFT().question(example)
    if turns is None:
        raise BadRow("no question")
    return validator_prompt(turns[:-1], answer)


def _verdict(answer_id: str, probability: float | EngineError, reply: Sequence[Any] | EngineError) -> dict[str, Any]:
    problem = next((one.reason for one in (probability, reply) if isinstance(one, EngineError)), None)
    return {
        "answer_id": answer_id,
        "probability": None if isinstance(probability, EngineError) else probability,
        "reply": None if isinstance(reply, EngineError) else reply[0].text,
        "problem": problem,
    }

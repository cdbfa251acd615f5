"""What is asked for one question, and the answers as rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from stitch_ray.config.sample_answers import SamplesConfig
from stitch_ray.engines.base import EngineError, Generation, Request, Sampling
from stitch_ray.records import content_hash
from stitch_ray.reliability.answers.questions import Question

GREEDY, SAMPLE, DISTRACTOR = "greedy", "sample", "distractor"
KINDS = (GREEDY, SAMPLE, DISTRACTOR)

_STATISTICS = pa.list_(pa.float32())
SAMPLE_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("kind", pa.string()),
        ("number", pa.int32()),
        ("answer", pa.string()),
        ("finish_reason", pa.string()),
        ("tokens", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", _STATISTICS),
        ("entropies", _STATISTICS),
        ("margins", _STATISTICS),
        ("error", pa.string()),
    ]
)
"""One row an answer, or one with an `error` for a question that got none. `token_ids` and `tokens`: null where a server
does not tell them."""

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request for answers of one kind; they are numbered from `number`."""

    kind: str
    number: int
    request: Request


def requests_for(question: Question, samples: SamplesConfig, seed: int, *, together: bool) -> list[Asked]:
    """The requests of a question. `together`: all samples in one request, so that a server reads the prompt once.

    A seed comes from the question, the kind and the number alone, so an answer depends neither on what else is asked
    nor on where and when.
    """
    found = [_asked(question, GREEDY, 0, 1, 0.0, samples, seed)] if samples.greedy else []
    each = samples.num if together else 1
    numbers = range(0, samples.num, each or 1)
    return found + [_asked(question, SAMPLE, n, each, samples.temperature, samples, seed) for n in numbers]


def sample_seed(seed: int, asked: str, kind: str, number: int) -> int:
    """A seed below 2**60."""
    return int(content_hash([seed, asked, kind, number])[:15], 16)


def answer_rows(
    question: Question, asked: Sequence[Asked], results: Sequence[list[Generation] | EngineError]
) -> list[Row]:
    """The rows of a question. One request that failed fails the question: half of its answers would mislead."""
    rows: list[Row] = []
    for one, result in zip(asked, results, strict=True):
        if isinstance(result, EngineError):
            return [failure_row(question, result.reason)]
        for place, generation in enumerate(result):
            rows.append(_answer_row(question, one.kind, one.number + place, generation))
    return rows


def distractor_rows(question: Question, texts: Sequence[str]) -> list[Row]:
    """Rows of the answers that were written on demand: as texts, without tokens."""
    return [
        {"example_id": question.example_id, "kind": DISTRACTOR, "number": number, "answer": text}
        for number, text in enumerate(texts)
    ]


def failure_row(question: Question, reason: str) -> Row:
    """The row of a question without answers."""
    return {"example_id": question.example_id, "kind": "", "number": 0, "error": reason}


def _asked(
    question: Question, kind: str, number: int, count: int, temperature: float, samples: SamplesConfig, seed: int
) -> Asked:
    sampling = Sampling(
        max_tokens=samples.max_tokens,
        temperature=temperature,
        top_p=samples.top_p if temperature else 1.0,
        num_samples=count,
        seed=sample_seed(seed, question.asked, kind, number),
        stop=tuple(samples.stop),
        token_stats=True,
    )
    name = f"{question.example_id}/{kind}-{number}"
    return Asked(kind, number, Request(request_id=name, prompt=question.turns, sampling=sampling))


def _answer_row(question: Question, kind: str, number: int, generation: Generation) -> Row:
    ids = generation.token_ids
    known = len(ids) if ids else None if generation.logprobs is None else len(generation.logprobs)
    return {
        "example_id": question.example_id,
        "kind": kind,
        "number": number,
        "answer": generation.text,
        "finish_reason": generation.finish_reason,
        "tokens": known,
        "token_ids": list(ids) if ids else None,
        "logprobs": generation.logprobs,
        "entropies": generation.entropies,
        "margins": generation.margins,
    }

"""Single awaited requests over a synchronous engine: what waits together is answered together."""

from __future__ import annotations

from functools import partial
from typing import Any

from stitch_ray.engines.base import EngineError, InterruptibleEngine, LoadedEngine, Request
from stitch_ray.engines.threaded import Job, JobQueue, Method, ThreadedEngine, closed, crashed

# Most vocabularies have about four bytes to a token; a budget of memory is better met early than late.
_BYTES_PER_TOKEN = 3


class BatchingEngine(ThreadedEngine):
    """An `AsyncEngine` over `engine`, for one that answers a batch as a whole.

    When the thread is free it takes the request that waits longest, and with it those behind it that ask for the same
    method and adapter, up to `max_batch` requests and about `batch_tokens` tokens of prompts and answers (a single
    request may exceed it; None: no bound). It never waits for a batch to fill.

    A cancelled request leaves the queue. One that is being answered ends at its next token where the engine can be
    interrupted; its result is dropped either way. An exception of the engine fails its batch with a retryable
    EngineError, and the next batch is tried.
    """

    def __init__(self, engine: LoadedEngine, *, max_batch: int = 32, batch_tokens: int | None = None) -> None:
        super().__init__(engine, partial(_serve, engine, max_batch, batch_tokens))


def _serve(engine: LoadedEngine, max_batch: int, batch_tokens: int | None, jobs: JobQueue) -> None:
    while batch := _next_batch(jobs, max_batch, batch_tokens):
        if batch[0].work is not None:
            batch[0].call()
        else:
            _answer(engine, batch, jobs)


def _next_batch(jobs: JobQueue, max_batch: int, batch_tokens: int | None) -> list[Job]:
    """The next jobs to run together, a call alone; none when the queue is closing."""
    with jobs.changed:
        jobs.changed.wait_for(lambda: jobs.closing or jobs.waiting)
        if jobs.closing:
            return []
        kind = _kind(jobs.waiting[0])
        alike = [job for job in jobs.waiting if _kind(job) == kind]
        batch, tokens = alike[:1], _tokens(alike[0])
        for job in alike[1:] if alike[0].request is not None else ():
            tokens += _tokens(job)
            if len(batch) == max_batch or (batch_tokens is not None and tokens > batch_tokens):
                break
            batch.append(job)
        for job in batch:
            jobs.waiting.remove(job)
        return batch


def _answer(engine: LoadedEngine, batch: list[Job], jobs: JobQueue) -> None:
    requests = [job.request for job in batch if job.request is not None]
    try:
        if batch[0].method == "generate" and isinstance(engine, InterruptibleEngine):
            results: list[Any] = engine.generate_unless(requests, lambda i: jobs.closing or batch[i].cancelled)
        else:
            results = getattr(engine, batch[0].method)(requests)
    except Exception as error:
        for job in batch:
            job.fail(crashed(job, error))
        return
    for job, result in zip(batch, results, strict=True):
        if isinstance(result, EngineError):
            job.fail(closed(job) if jobs.closing else result)
        else:
            job.settle(result)


def _kind(job: Job) -> tuple[Method, str | None]:
    return job.method, job.request.adapter if job.request is not None else None


def _tokens(job: Job) -> int:
    return 0 if job.request is None else estimated_tokens(job.request, job.method)


def estimated_tokens(request: Request, method: Method = "generate") -> int:
    """Tokens of prompt and answers (or continuation), from the bytes of texts, without a tokenizer."""
    sampling = request.sampling
    prompt = _length(request.prompt)
    if method != "generate":
        return prompt + _length(request.continuation or "")
    num_rows = 1 if sampling.temperature == 0 else sampling.num_samples
    return num_rows * (prompt + sampling.max_tokens)


def _length(text: Any) -> int:
    if isinstance(text, str):
        return 1 + len(text.encode(errors="replace")) // _BYTES_PER_TOKEN
    return sum(1 if isinstance(part, int) else 4 + _length(part.content) for part in text)

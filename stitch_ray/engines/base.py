"""The engine protocols: batched and synchronous inside one process, or one cancellable request at a time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from stitch_ray.records import Turn

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine is. `fingerprint` changes with weights or tokenizer; `methods` is checked before a job starts."""

    model: str
    fingerprint: str
    dtype: str
    max_context: int
    num_parameters: int | None
    methods: frozenset[str]
    adapters: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to sample. `temperature` 0 is greedy; `seed` makes a sample independent of the batch it was drawn in."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    num_samples: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    json_schema: str | None = None
    token_stats: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt. Turns go through the model's chat template; text and ids are used as they are.

    `continuation` is read by `loglikelihood` and `token_statistics` only.
    """

    request_id: str
    prompt: tuple[Turn, ...] | str | Ids
    continuation: str | Ids | None = None
    sampling: Sampling = field(default_factory=Sampling)
    adapter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One sampled answer. The last three have one value a token when asked for; see `TokenStatistics`.

    `completion_tokens`: tokens written, where `token_ids` are not told but their number is.
    """

    text: str
    token_ids: Ids
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int | None = None
    logprobs: tuple[float, ...] | None = None
    entropies: tuple[float, ...] | None = None
    margins: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """What the model says about every token of an answer, before temperature and top_p.

    `logprobs`: of the token itself (nats). `entropies`: of the whole vocabulary (nats); None: the engine does not see
    it. `margins`: probability of the likeliest token less that of the second, whichever was taken.
    """

    logprobs: tuple[float, ...]
    entropies: tuple[float, ...] | None
    margins: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RatingBatch:
    """`bodies` x K rating prompts, as token ids.

    The sequence rated for body b and prompt k is `heads[k] + bodies[b] + tails[k]`; a side with a single entry serves
    every prompt. `prompt_first` has K heads and one tail, `content_first` one (often empty) head and K tails.
    The rating is read from the logits of `rating_ids` behind the last token.
    """

    heads: tuple[Ids, ...]
    bodies: tuple[Ids, ...]
    tails: tuple[Ids, ...]
    rating_ids: Ids

    def __post_init__(self) -> None:
        if len({len(self.heads), len(self.tails)} - {1}) > 1:
            raise ValueError(f"{len(self.heads)} heads and {len(self.tails)} tails: one side must have one entry")

    @property
    def num_prompts(self) -> int:
        return max(len(self.heads), len(self.tails))

    def head(self, prompt: int) -> Ids:
        return self.heads[prompt if len(self.heads) > 1 else 0]

    def tail(self, prompt: int) -> Ids:
        return self.tails[prompt if len(self.tails) > 1 else 0]

    def sequence(self, body: int, prompt: int) -> Ids:
        """The whole token sequence rated for (`body`, `prompt`)."""
        return self.head(prompt) + self.bodies[body] + self.tail(prompt)


class EngineError(Exception):
    """One item failed. `retryable`: the same call may succeed later."""

    def __init__(self, request_id: str, reason: str, *, retryable: bool = False) -> None:
        super().__init__(f"{request_id}: {reason}")
        self.request_id = request_id
        self.reason = reason
        self.retryable = retryable

    def __reduce__(self) -> tuple[Any, ...]:
        """Exceptions pickle as `type(*args)`, which these arguments do not fit; Ray needs them to travel."""
        return partial(EngineError, retryable=self.retryable), (self.request_id, self.reason)


class Engine(Protocol):
    """Synchronous and batched inside one process. Order is kept; a bad item is an `EngineError` in its slot."""

    info: EngineInfo

    def rate(self, batch: RatingBatch) -> NDArray[np.float32]:
        """Rating logits, shape (bodies, prompts, ratings), defined up to a constant per (body, prompt)."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[list[Generation] | EngineError]:
        """`sampling.num_samples` answers for every request."""
        ...

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool] | EngineError]:
        """Sum of the continuation's log-probabilities (nats) and whether it is the greedy continuation."""
        ...

    def token_statistics(self, requests: Sequence[Request]) -> list[TokenStatistics | EngineError]:
        """What `generate` tells with `token_stats`, for a continuation that is already there."""
        ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit-length embeddings, shape (texts, width)."""
        ...


class LoadedEngine(Engine, Protocol):
    """An engine that holds a model of its own."""

    def close(self) -> None:
        """Free the model. May be called twice."""
        ...


@runtime_checkable
class InterruptibleEngine(Protocol):
    """An engine that can leave off an answer it has begun."""

    def generate_unless(
        self, requests: Sequence[Request], cancelled: Callable[[int], bool]
    ) -> list[list[Generation] | EngineError]:
        """`generate`, which asks `cancelled(index)` at every token and ends that request with an EngineError if so."""
        ...


class AsyncEngine(Protocol):
    """One request; cancelling the task aborts it. All that a predictor sees. Every method raises EngineError."""

    @property
    def info(self) -> EngineInfo: ...

    async def generate(self, request: Request) -> list[Generation]: ...

    async def loglikelihood(self, request: Request) -> tuple[float, bool]: ...

    async def token_statistics(self, request: Request) -> TokenStatistics: ...

    def stream(self, request: Request) -> AsyncIterator[str]: ...

    async def close(self) -> None: ...

"""What travels between the parts of an ensemble, and the protocols that the predictor sees. JSON-safe at every border."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from stitch_ray.records import Turn

Action = Literal["answer", "abstain"]
Reason = Literal["confident", "refined", "unsure", "scorer_unavailable", "route_failed", "deadline", "budget"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is asked. `history`: the turns before it, oldest first; context and history are shown to models and scorer."""

    example_id: str
    question: str
    context: str | None = None
    task: str | None = None
    history: tuple[Turn, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Question:
        return cls(**{**values, "history": tuple(Turn(**turn) for turn in values.get("history") or ())})


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A text with the signals that the scorer is given about it (NaN: could not be had; None in JSON).

    `calls` and `tokens` are what it cost: calls of models, tokens read and written. `samples`: texts sampled beside it,
    kept so that a refined answer is compared with the same ones.
    """

    text: str
    signals: Mapping[str, float | None] = field(default_factory=dict)
    calls: int = 1
    tokens: int = 0
    samples: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Answer:
        return cls(**{**values, "samples": tuple(values.get("samples") or ())})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one answer may cost; see `LimitsConfig`."""

    deadline_s: float = 30.0
    max_calls: int = 32
    max_tokens: int = 16384


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened on the way to an answer; JSON values.

    stage: {stage: "draft" | "score" | "refine" | "rescore", ...}; turn: one of a dialogue; final: the prediction.
    A draft or a turn that nobody has checked has `unchecked: true` and its text under `text`: whoever passes events
    on takes `text` out unless it was asked for.
    """

    kind: Literal["stage", "turn", "final"]
    data: Mapping[str, Any]


Emit = Callable[[Event], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What became of a question.

    `answer` is None where the ensemble abstains. `draft` and `refined` are the answers of both stages whatever became of
    them (refined None: not refined). `confidence` is that of the answer on which the decision was taken, None: unscored.
    `decision` and `policy_version` are None only for calibration without a policy. `route`: "none" if the draft was
    not refined, else the name of the route. `changed`: refined differs from the draft after normalisation.
    """

    example_id: str
    question: str
    draft: str | None
    draft_confidence: float | None
    answer: str | None
    confidence: float | None
    decision: Action | None
    reason: Reason | None
    route: str
    refined: str | None = None
    final_confidence: float | None = None
    context: str | None = None
    task: str | None = None
    target_risk: float | None = None
    calls: int = 0
    tokens: int = 0
    policy_version: str | None = None
    model_version: str = ""
    trace: tuple[Mapping[str, Any], ...] = ()
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Prediction:
        return cls(**{**values, "trace": tuple(values.get("trace") or ())})


class Primary(Protocol):
    """The model whose answers may be given. `fingerprint` is what a scorer and a policy are tied to."""

    fingerprint: str

    async def answer(self, question: Question) -> Answer:
        """The greedy answer with its signals. Raises EngineError."""
        ...

    async def signals(self, question: Question, text: str, samples: Sequence[str]) -> Answer:
        """The same signals of an answer that somebody else gave; `samples` are those of the draft. Raises EngineError."""
        ...


class Scorer(Protocol):
    """`signals`: names that it must be given."""

    fingerprint: str
    signals: frozenset[str]

    async def score(self, question: Question, text: str, signals: Mapping[str, float | None]) -> float | None:
        """Confidence in [0, 1]; None: this answer cannot be scored. Raises ScorerUnavailable if the scorer is not there."""
        ...


class ScorerUnavailable(Exception):
    """The scorer cannot be reached; nothing can be said about any answer."""


class RouteFailed(Exception):
    """The refinement came to no usable answer. The message says why, without texts of models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refined:
    """The last thing a route yields: the answer, and whose turn changed it last (None: nobody's)."""

    text: str
    calls: int
    tokens: int
    changed_by: str | None


class Route(Protocol):
    """A second stage. `fingerprint` is `name:hash` of everything that changes what it answers, models apart."""

    name: str
    fingerprint: str
    auxiliaries: tuple[str, ...]
    """Fingerprints of the models that take part, in their order."""

    def refine(self, question: Question, draft: Answer, budget: Any) -> AsyncIterator[Event | Refined]:
        """Events as they happen; the last item is `Refined`. Raises RouteFailed, EngineError, or what `budget` raises."""
        ...

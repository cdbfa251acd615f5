"""What clients may send. Unknown keys, numbers that are none, and empty questions are refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from serve_apps.web.errors import ApiError
from stitch_ray.ensemble.types import Question
from stitch_ray.records import Turn

MOST_TURNS = 256

Spoken = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]
Task = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TurnBody(Body):
    """A turn before the question."""

    role: Literal["system", "user", "assistant"]
    content: str


class PredictBody(Body):
    """A question, and what may be spent on it: beyond the server's own limits nothing is."""

    question: Spoken
    context: str | None = None
    task: Task | None = None
    history: list[TurnBody] = Field([], max_length=MOST_TURNS)
    target_risk: float | None = Field(None, gt=0, lt=1, description="one of those of GET /v1/policy")
    stream: bool = False
    include_trace: bool = Field(
        False, description="texts of drafts and turns too; those that nobody checked are marked"
    )
    deadline_s: float | None = Field(None, gt=0)
    max_calls: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)

    def as_question(self, request_id: str) -> Question:
        return Question(
            example_id=request_id,
            question=self.question,
            context=self.context,
            task=self.task,
            history=tuple(Turn(turn.role, turn.content) for turn in self.history),
        )


class ScoreBody(Body):
    """An answer that somebody gave."""

    question: Spoken
    answer: str
    context: str | None = None
    task: Task | None = None


class FeedbackBody(Body):
    """Whether the answer with this id was right."""

    id: str = Field(min_length=1, max_length=256)
    correct: bool


def check_texts(longest: int, **texts: Any) -> None:
    """Raises ApiError 413 for a text, or a list of turns together, longer than `longest` characters."""
    for name, value in texts.items():
        length = sum(len(turn.content) for turn in value) if isinstance(value, list) else len(value or "")
        if length > longest:
            raise ApiError(413, "too_large", f"{name} has {length} characters; at most {longest} are taken")

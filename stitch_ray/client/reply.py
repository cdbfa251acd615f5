"""The reply to a question."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The fields of `POST /v1/predict`; `answer` is None where the ensemble abstains, `confidence` where nothing was scored.

    `raw` is the reply as it came, with fields of a newer server.
    """

    id: str
    answer: str | None
    confidence: float | None
    decision: Literal["answer", "abstain"]
    reason: str | None
    route: str
    calls: int
    tokens: int
    target_risk: float | None
    policy_version: str | None
    model_version: str
    seconds: float
    trace: tuple[Mapping[str, Any], ...]
    raw: Mapping[str, Any]

    @property
    def answered(self) -> bool:
        return self.decision == "answer"

    @classmethod
    def of(cls, values: Any) -> Reply:
        """Raises ValueError for what is no reply; an answer without a text or a confidence is none."""
        if not isinstance(values, dict):
            raise ValueError(f"a reply is an object, not {type(values).__name__}")
        names = [field.name for field in fields(cls) if field.name != "raw"]
        missing = [name for name in names if name not in values]
        if missing:
            raise ValueError(f"the reply has no {', '.join(missing)}")
        reply = cls(**{**{name: values[name] for name in names}, "trace": tuple(values["trace"] or ()), "raw": values})
        given = reply.answer is not None
        if reply.decision != ("answer" if given else "abstain") or (given and reply.confidence is None):
            raise ValueError(f"the reply says {reply.decision!r} and does not fit that")
        return reply

"""Typed records and their Arrow schemas: the only definition of a field name."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation. `role` is `system`, `user`, `assistant` or `tool`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One instruction example, whatever file format it came from.

    `raw` is the input record as JSON text, kept so that a selected record is written out unchanged.
    `line` counts from 1: the line in a JSONL file, the position of the record in JSON, Parquet and datasets.
    `excluded`: answers known to be wrong; `verdict`: whether the last answer is CORRECT or WRONG, where that is told;
    `weight`: of the verdict's loss in training.
    """

    messages: tuple[Turn, ...]
    source: str
    line: int
    raw: str
    context: str | None = None
    references: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    verdict: str | None = None
    weight: float = 1.0
    task: str | None = None
    own_id: str | None = None

    @property
    def content_id(self) -> str:
        """First 16 hex digits of the SHA-256 of what a model gets to see: messages, context, references and the like."""
        content: dict[str, Any] = {
            "messages": [[turn.role, turn.content] for turn in self.messages],
            "context": self.context,
            "references": list(self.references),
        }
        if self.excluded:
            content["excluded"] = list(self.excluded)
        if self.verdict:
            content["verdict"] = [self.verdict, self.weight]
        return content_hash(content)

    @property
    def group_id(self) -> str:
        """Hash of the normalised question and context: equal for examples that must stay on one side of a split."""
        question = next((turn.content for turn in self.messages if turn.role == "user"), "")
        return question_group(question, self.context)


MESSAGES_TYPE = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

CORPUS_SCHEMA = pa.schema(
    [
        ("content_id", pa.string()),
        ("own_id", pa.string()),
        ("group_id", pa.string()),
        ("task", pa.string()),
        ("messages", MESSAGES_TYPE),
        ("context", pa.string()),
        ("references", pa.list_(pa.string())),
        ("excluded", pa.list_(pa.string())),
        ("verdict", pa.string()),
        ("weight", pa.float64()),
        ("source", pa.string()),
        ("line", pa.int64()),
        ("raw", pa.string()),
    ]
)

PLAN_SCHEMA = pa.schema(
    [("batch_id", pa.int32()), ("content_id", pa.string()), ("turn", pa.int32()), ("tokens", pa.int32())]
)

RATING_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("content_id", pa.string()),
        ("turn", pa.int32()),
        ("model", pa.string()),
        ("prompt", pa.int32()),
        ("prompt_hash", pa.string()),
        ("logits", pa.list_(pa.float32())),
        ("tokens", pa.int32()),
        ("truncated", pa.bool_()),
    ]
)


ANSWER_SCHEMA = pa.schema(
    [
        ("answer_id", pa.string()),
        ("example_id", pa.string()),
        ("group_id", pa.string()),
        ("split", pa.string()),
        ("task", pa.string()),
        ("question", pa.string()),
        ("context", pa.string()),
        ("kind", pa.string()),
        ("answer", pa.string()),
        ("label", pa.float32()),
        ("correct", pa.bool_()),
        ("finish_reason", pa.string()),
        ("tokens", pa.int32()),
        ("logprobs", pa.list_(pa.float32())),
        ("entropies", pa.list_(pa.float32())),
        ("margins", pa.list_(pa.float32())),
    ]
)
"""One row an answer. `kind`: greedy, sample, distractor, or what a file of answers says (default: answer). `label`: how
right it is, in [0, 1], and `correct`; null: not labelled. The last three have a value a token, or are null."""


def question_group(question: str, context: str | None) -> str:
    """Hash of the normalised question and context: the unit that splits keep together."""
    return content_hash([_normalise(question), _normalise(context or "")])


def content_hash(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _normalise(text: str) -> str:
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().casefold()

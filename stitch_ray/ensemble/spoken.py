"""What a speaker of a dialogue said, read from its reply: mended where only JSON's form is broken, never guessed."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import json_repair

from stitch_ray.reliability.answers.replies import ReplyError

__all__ = ["ReplyError", "SpokenTurn", "read_turn", "turn_schema"]

KEYS = ("comment", "answer")
_THOUGHTS = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_OBJECT = re.compile(r"\{(?=\s*(?:[\"'“}]|comment\b|answer\b))")
_FORM_TOKENS = 32  # of a bounded reply, for keys and punctuation


@dataclass(frozen=True, slots=True)
class SpokenTurn:
    """`answer` is not blank; `comment` may be."""

    comment: str
    answer: str


def turn_schema(longest: int | None = None) -> str:
    """JSON schema of a reply. `longest`: tokens in which every reply shall end, even at one token a character."""
    bounds: dict[str, dict[str, int]] = {key: {} for key in KEYS}
    if longest is not None:
        room = max(2, longest - _FORM_TOKENS)
        bounds = {"comment": {"maxLength": room // 3 or 1}, "answer": {"maxLength": room - room // 3}}
    return json.dumps(
        {
            "type": "object",
            "properties": {key: {"type": "string", **bounds[key]} for key in KEYS},
            "required": list(KEYS),
            "additionalProperties": False,
        }
    )


def read_turn(text: str, *, cut: bool = False) -> SpokenTurn:
    """The turn in a reply: a JSON object with `comment` and `answer`, alone, fenced or between other text.

    An object in broken JSON is mended, unless the reply was `cut` off at its longest length: its answer may lack its
    end. Raises ReplyError, whose message holds nothing of the reply, if there is none, if there are two that differ,
    if a key is missing, given twice or no text, and for a blank answer.
    """
    body = _THOUGHTS.sub("", text, count=1).strip()
    if not body:
        raise ReplyError("the reply is empty")
    whole, broken = _objects(body)
    turns = {turn for value in whole if (turn := _turn(value)) is not None}
    if len(turns) > 1:
        raise ReplyError("the reply holds two turns")
    if turns and broken is None:
        return _checked(turns.pop())
    if broken is None:
        raise ReplyError("keys comment and answer are missing" if whole else "no JSON object in the reply")
    if turns:
        raise ReplyError("the reply holds a turn and a broken object")
    if cut:
        raise ReplyError("the reply was cut off at its longest length")
    return _checked(_mended(broken))


def _objects(body: str) -> tuple[list[dict[str, Any]], str | None]:
    """Objects that are not part of another value, and the text from the first broken one on."""
    decoder = json.JSONDecoder(object_pairs_hook=_no_repeats)
    found: list[dict[str, Any]] = []
    at = 0
    while start := _OBJECT.search(body, at):
        try:
            value, at = decoder.raw_decode(body, start.start())
        except (json.JSONDecodeError, RecursionError):
            return found, body[start.start() :]
        found.append(value)
    return found, None


def _mended(broken: str) -> SpokenTurn:
    """Mending may turn half of a text into a key: more keys than asked for are a sign of that."""
    try:
        value = json_repair.loads(broken)
    except (ValueError, RecursionError) as error:
        raise ReplyError("JSON that cannot be mended") from error
    if not isinstance(value, dict) or set(value) != set(KEYS):
        raise ReplyError("JSON that cannot be mended")
    turn = _turn(value)
    assert turn is not None
    return turn


def _turn(value: dict[str, Any]) -> SpokenTurn | None:
    if not set(KEYS) <= set(value):
        return None
    for key in KEYS:
        if not isinstance(value[key], str):
            raise ReplyError(f"{key} is no text")
    return SpokenTurn(value["comment"].strip(), value["answer"].strip())


def _checked(turn: SpokenTurn) -> SpokenTurn:
    if not turn.answer:
        raise ReplyError("answer is blank")
    try:
        (turn.comment + turn.answer).encode()
    except UnicodeEncodeError as error:
        raise ReplyError("half of a surrogate pair") from error
    return turn


def _no_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ReplyError("a key is given twice")
    return value

"""JSON out of a model's reply: fenced, wrapped in prose, or broken and repaired; never guessed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import json_repair


class ReplyError(ValueError):
    """A reply that does not hold what was asked for; the message says why."""


@dataclass(frozen=True, slots=True)
class Reply:
    """`repaired`: the JSON was broken and had to be mended to be read."""

    answers: tuple[str, ...]
    repaired: bool


def parse_answers(text: str, count: int, *, cut: bool = False) -> Reply:
    """`count` answers from a JSON list of texts, or an object {"answer1": …, "answer2": …}; more are left out.

    Either may also be the only value of an object. Numbers count as the text they are written with. `cut`: the reply
    ended at its longest length, so that the last thing in broken JSON is not taken.

    Raises ReplyError for an empty reply, one without JSON (a refusal, say), too few answers, and an answer that is
    blank or no text.
    """
    body = _body(text)
    whole, broken = _values(body)
    problem: ReplyError | None = None
    for value in whole:
        try:
            return Reply(_answers(value, count), False)
        except ReplyError as error:
            problem = problem or error
    if broken is not None:
        try:
            return Reply(_answers(_repaired(broken), count + cut)[:count], True)
        except ReplyError as error:
            problem = problem or (ReplyError("the reply was cut off at its longest length") if cut else error)
    assert problem is not None
    raise problem


def parse_verdict(text: str) -> tuple[bool, bool]:
    """(verdict, repaired) of a reply {"correct": true} or {"correct": false}. Raises ReplyError for any other."""
    body = _body(text)
    values, broken = _values(body)
    whole = [value for value in values if isinstance(value, dict)]
    if not whole and broken is None:
        raise ReplyError(f"no verdict in the reply: {_excerpt(body)}")
    verdicts = {_verdict(value) for value in whole or [_repaired(str(broken))]}
    if len(verdicts) != 1:
        raise ReplyError(f"the reply has both verdicts: {_excerpt(body)}")
    return verdicts.pop(), not whole


def _body(text: str) -> str:
    """The reply without a reasoning model's thoughts, which may hold JSON of their own."""
    body = re.sub(r"^\s*<think>.*?</think>", "", text, flags=re.DOTALL).strip()
    if not body:
        raise ReplyError("the reply is empty")
    if not re.search(r"[\[{]", body):
        raise ReplyError(f"no JSON in the reply (a refusal?): {_excerpt(body)}")
    return body


def _values(body: str) -> tuple[list[Any], str | None]:
    """Every JSON list and object in `body` that is not part of another, and the text from the first broken one on."""
    decoder = json.JSONDecoder(parse_int=str, parse_float=str)
    whole: list[Any] = []
    broken, start = None, 0
    while found := re.compile(r"[\[{]").search(body, start):
        try:
            value, start = decoder.raw_decode(body, found.start())
            whole.append(value)
        except (json.JSONDecodeError, RecursionError) as error:
            start = len(body) if isinstance(error, RecursionError) else found.start() + 1
            broken = body[found.start() :] if broken is None else broken
    return whole, broken


def _repaired(broken: str) -> Any:
    try:  # by way of text, so that numbers stay as they are written
        return json.loads(json_repair.repair_json(broken), parse_int=str, parse_float=str)
    except (ValueError, RecursionError) as error:
        raise ReplyError(f"JSON that cannot be repaired: {_excerpt(broken)}") from error


def _answers(value: Any, count: int) -> tuple[str, ...]:
    if isinstance(value, dict):
        numbered = {int(key[1]): one for name, one in value.items() if (key := _NUMBERED.fullmatch(name.strip()))}
        if not numbered:
            if len(value) == 1 and isinstance(only := next(iter(value.values())), list | dict):
                return _answers(only, count)
            raise ReplyError(f"an object without answers: {', '.join(map(repr, list(value)[:5]))}")
        value = [numbered[number] for number in sorted(numbered)]
    if not isinstance(value, list):
        raise ReplyError(f"no list of answers but {_excerpt(str(value))}")
    if len(value) < count:
        raise ReplyError(f"{len(value)} of {count} answers")
    for number, answer in enumerate(value[:count], 1):
        if not isinstance(answer, str):
            raise ReplyError(f"answer {number} is no text: {_excerpt(json.dumps(answer, ensure_ascii=False))}")
        if not answer.strip():
            raise ReplyError(f"answer {number} is blank")
    return tuple(answer.strip() for answer in value[:count])


_NUMBERED = re.compile(r"answer[ _-]?(\d+)", re.IGNORECASE)


def _verdict(value: Any) -> bool:
    verdict = value.get("correct") if isinstance(value, dict) else None
    if not isinstance(verdict, bool):
        raise ReplyError(f"no verdict in the reply: {_excerpt(json.dumps(value, ensure_ascii=False))}")
    return verdict


def _excerpt(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "…"

"""Input records to `Example`: the eight shapes of instruction data, and what is wrong with a record that fits none.

Text is kept exactly as it stands; "empty" means nothing but white space.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stitch_ray.data.quarantine import BadRow
from stitch_ray.data.readers import SourceRow
from stitch_ray.errors import UserError
from stitch_ray.records import Example, Turn

MAX_CHARACTERS = 1_000_000
BARE = "question"
"""Format of questions that nobody has answered yet. Not in `FORMATS`: only who asks can use it, nobody can learn from it."""

Record = Mapping[str, Any]

# "function_call" is text that the model wrote, what comes back is the tool's.
_ROLES = {
    "system": "system",
    "developer": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bard", "bing", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "function_response", "tool_response"), "tool"),
}
_TYPE_NAMES = {dict: "object", list: "list", bool: "boolean", int: "number", float: "number", type(None): "null"}
_UNUSABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
_CHATML_BLOCK = re.compile(r"<\|im_start\|>(.*?)<\|im_end\|>", re.DOTALL)


# Which fields tell a format, the most telling first: a record may well have those of two.
_SIGNATURES: tuple[tuple[str, frozenset[str]], ...] = (
    ("messages", frozenset({"messages"})),
    ("sharegpt", frozenset({"conversations"})),
    ("alpaca", frozenset({"instruction", "output"})),
    ("dolly", frozenset({"instruction", "response"})),
    ("prompt_completion", frozenset({"prompt", "completion"})),
    ("prompt_completion", frozenset({"prompt", "response"})),
    ("judged_answer", frozenset({"question", "answer", "verdict"})),
    ("question_answer", frozenset({"question", "answer"})),
    ("chatml", frozenset({"chatml"})),
    ("chatml", frozenset({"text"})),
)


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a format makes of a record; see `Example`. `references[0]`, where there are any, is the response."""

    messages: tuple[Turn, ...]
    context: str | None = None
    references: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()
    verdict: str | None = None
    weight: float = 1.0


def convert(
    row: SourceRow, format: str = "auto", max_characters: int = MAX_CHARACTERS, fields: Mapping[str, str] = {}
) -> Example:
    """The example that `row` holds; "auto" tells the format by the fields of each record.

    `fields`: field of a format -> the column that holds it in these records, where it has another name there.
    `max_characters` bounds messages, context and the references after the first together.
    Raises `BadRow` with the reason when the row cannot be used, `UserError` when there is no such format.
    """
    if format not in ("auto", BARE) and format not in FORMATS:
        raise UserError(f"unknown format '{format}'; write one of: auto, {', '.join(FORMATS)}")
    if row.record is None:
        raise BadRow(row.error or "row could not be read")
    record = _renamed(row.record, fields) if fields else row.record
    parse = _question if format == BARE else FORMATS[_guess(record) if format == "auto" else format]
    parsed = parse(record)
    texts = [turn.content for turn in parsed.messages] + [parsed.context or "", *parsed.references[1:]]
    if (length := sum(map(len, texts))) > max_characters:
        raise BadRow(f"example is {length:,} characters long, more than the {max_characters:,} allowed")
    return Example(
        messages=parsed.messages,
        context=parsed.context,
        references=parsed.references,
        excluded=parsed.excluded,
        verdict=parsed.verdict,
        weight=parsed.weight,
        task=_label(record, ("task", "category", "dataset"), (str,)),
        own_id=_label(record, ("id", "example_id", "uid"), (str, int)),
        source=row.source,
        line=row.line,
        raw=row.raw,
    )


def check_format(key: str, name: str) -> None:
    """Raises UserError, beginning with `key`, for a format that does not exist."""
    if name != "auto" and name not in FORMATS:
        raise UserError(f"{key}: {name!r} is not one of auto, {', '.join(sorted(FORMATS))}")


def detect(records: Sequence[Record]) -> str:
    """The format of a sample, or "auto" when its records are of several formats.

    Records that fit none are passed over. Raises `UserError` with the fields seen when none fits.
    """
    names = {name for record in records if (name := _fit(record)) is not None}
    if not names:
        seen = ", ".join(sorted({key for record in records for key in record})) or "(none)"
        known = "; ".join(f"{name}: {' + '.join(sorted(fields))}" for name, fields in _SIGNATURES)
        raise UserError(f"the fields of the data fit no known format. Seen: {seen}. Known: {known}")
    return names.pop() if len(names) == 1 else "auto"


def _fit(record: Record) -> str | None:
    is_chatml = "<|im_start|>" in str(record.get("text"))
    # Parquet gives every record every column, so a null counts as a field only if nothing else fits.
    present = {field for field, value in record.items() if value is not None}
    for fields in (present, record.keys()):
        for name, needed in _SIGNATURES:
            if needed <= fields and (is_chatml or needed != {"text"}):
                return name
    return None


def _guess(record: Record) -> str:
    if (name := _fit(record)) is not None:
        return name
    for field, name in (("instruction", "alpaca"), ("prompt", "prompt_completion"), ("question", "question_answer")):
        if field in record:
            return name
    raise BadRow(f"fields fit no known format: {', '.join(sorted(record)) or '(none)'}")


def _prompt_completion(record: Record) -> Parsed:
    for response in ("completion", "response"):
        if record.get(response) is not None:
            return Parsed(_pair(record, "prompt", response))
    raise BadRow("missing field 'completion' or 'response'")


def _question_answer(record: Record) -> Parsed:
    answer = record.get("answer")
    excluded = _texts(record, "excluded")
    if not isinstance(answer, list):
        messages = _pair(record, "question", "answer")
        return Parsed(messages, _optional(record, "context"), (messages[1].content,), excluded)
    if not answer:
        raise BadRow("empty response: field 'answer' is an empty list")
    numbered = {f"answer {number}": text for number, text in enumerate(answer, start=1)}
    answers = tuple(_filled(numbered, name, "response") for name in numbered)
    question = Turn("user", _filled(record, "question", "instruction"))
    return Parsed((question, Turn("assistant", answers[0])), _optional(record, "context"), answers, excluded)


def _judged_answer(record: Record) -> Parsed:
    """An answer, right or not, what somebody says of it, CORRECT or WRONG, and its weight in training (default 1)."""
    verdict = record.get("verdict")
    if verdict not in ("CORRECT", "WRONG"):
        raise BadRow(f"field 'verdict' is {verdict!r}, expected CORRECT or WRONG")
    weight = record.get("weight")
    if weight is None:
        weight = 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise BadRow(f"field 'weight' is {weight!r}, expected a number above 0")
    return Parsed(_pair(record, "question", "answer"), _optional(record, "context"), verdict=verdict, weight=weight)


def _question(record: Record) -> Parsed:
    """In the form that a served ensemble takes: question, context, history. The answer is left empty."""
    items = _items(record, "history") if record.get("history") else ()
    history = [Turn(_role(item, "role", where), _content(item, where)) for where, item in items]
    question = Turn("user", _filled(record, "question", "instruction"))
    return Parsed((*history, question, Turn("assistant", "")), _optional(record, "context"))


def _messages(record: Record) -> Parsed:
    turns = []
    for where, item in _items(record, "messages"):
        if item.get("tool_calls"):
            raise BadRow(f"{where} calls tools, which a turn of text cannot hold")
        turns.append(Turn(_role(item, "role", where), _content(item, where)))
    return Parsed(_conversation(turns))


def _content(item: Record, where: str) -> str:
    parts = item.get("content")
    if not isinstance(parts, list):
        return _field(item, "content", where)
    texts = []
    for number, part in enumerate(parts, start=1):
        place = f"{where} part {number}"
        if not isinstance(part, dict) or part.get("type") != "text":
            raise BadRow(f"{place} is not an object of type 'text'")
        texts.append(_field(part, "text", place))
    return "".join(texts)


def _sharegpt(record: Record) -> Parsed:
    items = list(_items(record, "conversations"))
    # SelectIT's files name no speakers: instruction and response take turns.
    if all(item.get("from") is None for _, item in items):
        roles = ["assistant" if index % 2 else "user" for index in range(len(items))]
    else:
        roles = [_role(item, "from", where) for where, item in items]
    turns = [Turn(role, _field(item, "value", where)) for role, (where, item) in zip(roles, items, strict=True)]
    return Parsed(_conversation(turns))


def _chatml(record: Record) -> Parsed:
    text = _field(record, "text" if record.get("chatml") is None else "chatml")
    if outside := _CHATML_BLOCK.sub("", text).strip():
        raise BadRow(f"wrong nesting: text outside of <|im_start|> and <|im_end|>: {outside[:40]!r}")
    turns = []
    for number, block in enumerate(_CHATML_BLOCK.findall(text), start=1):
        role, line_break, content = block.partition("\n")
        if not line_break or "<|im_start|>" in block:
            raise BadRow(f"wrong nesting: block {number} is not <|im_start|>role, line break, text, <|im_end|>")
        turns.append(Turn(_role({"role": role}, "role", f"block {number}"), content))
    return Parsed(_conversation(turns))


FORMATS: Mapping[str, Callable[[Record], Parsed]] = {
    "alpaca": lambda record: Parsed(_pair(record, "instruction", "output"), _optional(record, "input")),
    "sharegpt": _sharegpt,
    "messages": _messages,
    "chatml": _chatml,
    "dolly": lambda record: Parsed(_pair(record, "instruction", "response"), _optional(record, "context")),
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "judged_answer": _judged_answer,
}


def _renamed(record: Record, fields: Mapping[str, str]) -> Record:
    """The record under the names of a format."""
    missing = next((column for column in fields.values() if column not in record), None)
    if missing is not None:
        raise BadRow(f"missing column {missing!r}; there are {', '.join(sorted(record)) or '(none)'}")
    others = {name: value for name, value in record.items() if name not in fields.values()}
    return {**others, **{field: record[column] for field, column in fields.items()}}


def _pair(record: Record, instruction: str, response: str) -> tuple[Turn, Turn]:
    user = Turn("user", _filled(record, instruction, "instruction"))
    return user, Turn("assistant", _filled(record, response, "response"))


def _texts(record: Record, field: str) -> tuple[str, ...]:
    """A list of texts; none if the field is not there."""
    values = record.get(field)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise BadRow(f"field '{field}' is {_type_name(values)}, expected list")
    return tuple(_text(value, f"field '{field}' item {number}") for number, value in enumerate(values, start=1))


def _conversation(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise BadRow("conversation has no assistant turn")
    first = roles.index("assistant")
    if "user" not in roles[:first]:
        raise BadRow(f"turn {first + 1} is an assistant turn before any user turn")
    for number, turn in enumerate(turns, start=1):
        if turn.role in ("user", "assistant") and not turn.content.strip():
            raise BadRow(f"empty {'response' if turn.role == 'assistant' else 'instruction'} in turn {number}")
    return tuple(turns)


def _items(record: Record, field: str) -> Iterator[tuple[str, Record]]:
    if field not in record:
        raise BadRow(f"missing field '{field}'")
    if not isinstance(record[field], list):
        raise BadRow(f"field '{field}' is {_type_name(record[field])}, expected list")
    for number, item in enumerate(record[field], start=1):
        if not isinstance(item, dict):
            raise BadRow(f"wrong nesting: turn {number} is {_type_name(item)}, expected object")
        yield f"turn {number}", item


def _role(item: Record, field: str, where: str) -> str:
    role = _field(item, field, where)
    if role not in _ROLES:
        raise BadRow(f"{where}: unknown role {role[:40]!r}")
    return _ROLES[role]


def _filled(record: Record, field: str, part: str) -> str:
    text = _field(record, field)
    if not text.strip():
        raise BadRow(f"empty {part}: field '{field}'")
    return text


def _optional(record: Record, field: str) -> str | None:
    """The text of a field, None also when it is empty: an Alpaca `input` of "" says that there is none."""
    if record.get(field) is None:
        return None
    text = _field(record, field)
    return text if text.strip() else None


def _field(record: Record, field: str, where: str = "") -> str:
    place = f"{where}: " if where else ""
    if field not in record:
        raise BadRow(f"{place}missing field '{field}'")
    return _text(record[field], f"{place}field '{field}'")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where} is {_type_name(value)}, expected text")
    if (match := _UNUSABLE.search(value)) is not None:
        kind = "lone surrogate" if match[0] >= "\ud800" else "control character"
        raise BadRow(f"{where} has the {kind} U+{ord(match[0]):04X} at character {match.start() + 1}")
    return value


def _label(record: Record, fields: Sequence[str], types: tuple[type, ...]) -> str | None:
    for field in fields:
        if type(record.get(field)) in types and record[field] != "":
            return _text(str(record[field]), f"field '{field}'")
    return None


def _type_name(value: object) -> str:
    return _TYPE_NAMES.get(type(value), type(value).__name__)

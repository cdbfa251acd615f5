"""From rendered text to token ids and a loss weight for every token.

A text is tokenised once, in one piece, and its tokens are mapped to the text that carries loss by their offsets: a part
of a text need not have the same tokens alone. What is learned of an answer is all that inference has to generate: what
follows the generation prompt, up to and with the mark that ends the turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from stitch_ray.data.quarantine import BadRow
from stitch_ray.errors import UserError
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.records import Turn
from stitch_ray.training.objectives.base import Rendered, Span

_ANSWER = "\ue000"  # a private character in the place of an answer shows what the template puts around it


class Overlong(Exception):
    """A record with too many tokens, that is dropped. The message is the reason."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """`ids`: (length,) int32. `weights`: (length,) float32, of predicting that token; the first is always 0."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    truncated: bool


@dataclass(frozen=True, slots=True)
class _Range:
    """Characters [start, stop) of a text with a loss weight."""

    start: int
    stop: int
    weight: float


def check_tokenizer(tokenizer: Any) -> None:
    """Raises UserError if the tokenizer does not tell which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"model.path: {type(tokenizer).__name__} gives no offsets, which loss weights need; put the tokenizer's "
            "fast form (tokenizer.json) in the model's folder, for example by saving it from AutoTokenizer"
        )


def check_template(template: ChatTemplate) -> None:
    """Raises UserError if the template does not suit training: tried on one question and its answer."""
    turns = (Span("Name a river.", role="user"), Span("The Rhine.", 1.0, role="assistant"))
    try:
        _turn_ranges(turns, template)
    except BadRow as error:
        raise UserError(str(error)) from error


def encode(
    rendered: Rendered,
    tokenizer: Any,
    template: ChatTemplate,
    max_length: int,
    overlong: Literal["truncate", "drop"],
) -> Encoded:
    """Token ids and loss weights of one record, at most `max_length` tokens.

    A token carries the weight of the last weighted text that it has a character of, so one that reaches over the start
    or end of an answer is learned. What stands behind the last token with weight is left out: nothing is learned from
    it. Raw text (spans without a role) gets the tokenizer's own first tokens, and an end-of-sequence token with the
    weight of the last weighted span behind it.

    Raises BadRow if no token carries loss or the template does not fit the conversation, Overlong if the record is
    longer than `max_length` and `overlong` says drop, or if nothing with weight is left of it, UserError for a
    tokenizer without offsets or, with raw text, without an end-of-sequence token.
    """
    check_tokenizer(tokenizer)
    last = max((position for position, span in enumerate(rendered.spans) if span.weight > 0), default=None)
    if last is None:
        raise BadRow("nothing in the example carries loss")
    spans = rendered.spans[: last + 1]
    if spans[0].role is None:
        ids, weights = _raw_tokens(spans, tokenizer)
    else:
        text, ranges = _turn_ranges(spans, template)
        ids, weights = _tokens(tokenizer, text, ranges, special=False)
    weights[:1] = 0
    learned = np.flatnonzero(weights)
    if not len(learned):
        raise BadRow("no token of the example carries loss")
    length = int(learned[-1]) + 1
    if length <= max_length:
        return Encoded(ids[:length], weights[:length], truncated=False)
    if overlong == "drop":
        raise Overlong(f"{length} tokens, more than max_length {max_length}")
    if learned[0] >= max_length:
        raise Overlong(f"the first token to learn is number {learned[0] + 1}, behind max_length {max_length}")
    return Encoded(ids[:max_length], weights[:max_length], truncated=True)


def _raw_tokens(spans: Sequence[Span], tokenizer: Any) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    if tokenizer.eos_token_id is None:
        raise UserError("model.path: the tokenizer has no end-of-sequence token (eos_token); set one and save it")
    ranges, position = [], 0
    for span in spans:
        assert span.role is None, "turns and raw text in one record"
        ranges.append(_Range(position, position + len(span.text), span.weight))
        position += len(span.text)
    ids, weights = _tokens(tokenizer, "".join(span.text for span in spans), ranges, special=True)
    return np.append(ids, np.int32(tokenizer.eos_token_id)), np.append(weights, np.float32(spans[-1].weight))


def _turn_ranges(spans: Sequence[Span], template: ChatTemplate) -> tuple[str, list[_Range]]:
    """The text of a conversation, and where in it the answers with weight stand."""
    turns = []
    for span in spans:
        assert span.role is not None, "turns and raw text in one record"
        turns.append(Turn(span.role, span.text))
    text = template.render(turns)
    _check_complete(turns, text, template)
    ranges = []
    for number, span in enumerate(spans):
        if span.weight <= 0:
            continue
        before, turn = turns[:number], turns[number]
        start = template.render(before, add_generation_prompt=True)
        upto = text if number == len(turns) - 1 else template.render([*before, turn])
        if not upto.startswith(start):
            raise BadRow(
                f"template {template.source}: turn {number + 1} does not begin where its generation prompt ends; "
                "training and inference would see different texts"
            )
        around = template.render([*before, Turn(turn.role, _ANSWER)])
        tail = around.rpartition(_ANSWER)[2]
        if not upto.endswith(tail) or len(start) + len(tail) > len(upto):
            raise BadRow(f"template {template.source}: the end of turn {number + 1} depends on its text")
        stop = len(upto) - len(tail) + _end_mark(tail, template)
        if not text.startswith(upto[:stop]):
            raise BadRow(f"template {template.source} writes turn {number + 1} in another way when more turns follow")
        ranges.append(_Range(len(start), stop, span.weight))
    return text, ranges


def _check_complete(turns: Sequence[Turn], text: str, template: ChatTemplate) -> None:
    squeezed = "".join(text.split())
    for number, turn in enumerate(turns, start=1):
        if "".join(turn.content.split()) not in squeezed:
            raise BadRow(f"template {template.source} leaves out or changes the {turn.role} turn {number}")


def _end_mark(tail: str, template: ChatTemplate) -> int:
    """Where the mark that ends a turn stops in `tail`, the text behind an answer.

    It is the end-of-sequence token if the template writes one, else the first special token, else all but white space.
    """
    eos = template.tokenizer.eos_token
    if eos and eos in tail:
        return tail.index(eos) + len(eos)
    ends = [(tail.index(mark), -len(mark)) for mark in template.special_tokens if mark and mark in tail]
    if ends:
        start, length = min(ends)
        return start - length
    if not tail.strip():
        raise BadRow(
            f"template {template.source} writes no mark behind an answer, so the model would never learn to stop; "
            "write {{ eos_token }} there"
        )
    return len(tail.rstrip())


def _tokens(
    tokenizer: Any, text: str, ranges: Sequence[_Range], *, special: bool
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Ids and weights of a text; special tokens that the tokenizer puts at the end are left out."""
    found = tokenizer(
        text,
        add_special_tokens=special,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,
    )
    length = len(found["input_ids"])
    while special and length and found["special_tokens_mask"][length - 1]:
        length -= 1
    ids = np.asarray(found["input_ids"][:length], dtype=np.int32)
    offsets = np.asarray(found["offset_mapping"][:length], dtype=np.int64).reshape(-1, 2)
    # Some tokenizers cut white space off their offsets: a token then begins where the one before it ended.
    stops = np.maximum.accumulate(offsets[:, 1])
    starts = np.minimum(offsets[:, 0], np.concatenate(([0], stops))[:length])
    weights = np.zeros(length, dtype=np.float32)
    for part in ranges:
        if part.weight > 0:
            weights[(starts < part.stop) & (stops > part.start)] = part.weight
    return ids, weights

"""What a scorer reads: question and context as one text, the answer as the other, laid out as the tokenizer's pairs are.

Training and scoring both take their ids from here. Only the context is ever cut; a question or an answer that was cut
would be another question or answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from stitch_ray.engines.base import Ids
from stitch_ray.errors import UserError

_BLANK_LINE = "\n\n"
_PROBES = "a", "b"


@dataclass(frozen=True, slots=True)
class ScoreInput:
    """One answer to be scored. Either text may be empty."""

    question: str
    answer: str
    context: str | None = None

    @property
    def first(self) -> str:
        """The text before the answer: the question, and the context behind a blank line."""
        return f"{self.question}{_BLANK_LINE}{self.context}" if self.context else self.question


@dataclass(frozen=True, slots=True)
class PairIds:
    """Token ids of a pair with its special tokens. `second`: position from which they belong to the answer.

    `truncated`: the context lost its end, or all of itself.
    """

    ids: Ids
    second: int
    truncated: bool = False


class InputTooLong(ValueError):
    """Question and answer alone exceed `max_length`: the answer stays unscored."""


def encode_pair(tokenizer: Any, shown: ScoreInput, max_length: int) -> PairIds:
    """At most `max_length` ids. Raises InputTooLong, and UserError for a tokenizer that cannot separate two texts."""
    (pair,) = encode_pairs(tokenizer, [shown], max_length)
    if isinstance(pair, InputTooLong):
        raise pair
    return pair


def encode_pairs(tokenizer: Any, shown: Sequence[ScoreInput], max_length: int) -> list[PairIds | InputTooLong]:
    """As `encode_pair`, for many at once and in order; an input that is too long has the error in its place."""
    if not shown:
        return []
    layout = _pair_layout(tokenizer)
    firsts = _encode(tokenizer, [one.first for one in shown])
    answers = _encode(tokenizer, [one.answer for one in shown])
    pairs: list[PairIds | InputTooLong] = []
    for one, first, answer in zip(shown, firsts, answers, strict=True):
        room = max_length - layout.num_special - len(answer)
        if len(first) <= room:
            pairs.append(layout.join(first, answer))
            continue
        (question,) = _encode(tokenizer, [one.question])
        if len(question) <= room:
            pairs.append(layout.join(_cut(tokenizer, one, first, question, room), answer, truncated=True))
        else:
            taken = max_length - room + len(question)
            pairs.append(InputTooLong(f"question and answer take {taken} tokens of {max_length}, and are never cut"))
    return pairs


@dataclass(frozen=True, slots=True)
class _PairLayout:
    """Special tokens around the two texts."""

    before: Ids
    between: Ids
    behind: Ids

    @property
    def num_special(self) -> int:
        return len(self.before) + len(self.between) + len(self.behind)

    def join(self, first: Ids, answer: Ids, truncated: bool = False) -> PairIds:
        head = (*self.before, *first, *self.between)
        return PairIds((*head, *answer, *self.behind), len(head), truncated)


@lru_cache(maxsize=8)
def _pair_layout(tokenizer: Any) -> _PairLayout:
    """Where the tokenizer puts special tokens in a pair, seen on one.

    Decoders' tokenizers often put none between the two texts; there the separator token stands, else the end-of-sequence
    token. With an empty second text many tokenizers drop what is around it; the layout does not.
    """
    a, b = _encode(tokenizer, _PROBES)
    pair: Ids = tuple(tokenizer(*_PROBES)["input_ids"])
    starts = [i for i in range(len(pair)) if pair[i : i + len(a)] == a]
    stops = [i for i in range(len(pair)) if pair[i : i + len(b)] == b]
    if not a or not b or not starts or not stops or starts[0] + len(a) > stops[-1]:
        raise UserError(
            f"encoder: its tokenizer ({type(tokenizer).__name__}) does not keep two texts apart; name another encoder"
        )
    between = pair[starts[0] + len(a) : stops[-1]]
    if not between:
        known = (tokenizer.sep_token_id, tokenizer.eos_token_id)
        between = tuple(one for one in known if one is not None)[:1]
    if not between:
        raise UserError(
            f"encoder: its tokenizer ({type(tokenizer).__name__}) has neither a separator nor an end-of-sequence token "
            "to put between question and answer; set eos_token in its tokenizer_config.json"
        )
    return _PairLayout(pair[: starts[0]], between, pair[stops[-1] + len(b) :])


def _cut(tokenizer: Any, shown: ScoreInput, first: Ids, question: Ids, room: int) -> Ids:
    """The first `room` ids, or those of the question alone where that is all there is room for."""
    if room and getattr(tokenizer, "is_fast", False):
        # The ids of the whole need not begin with those of the question: a token may reach across the blank line.
        spans = tokenizer(shown.first, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        whole = max(end for _, end in spans["offset_mapping"][:room]) >= len(shown.question.rstrip())
        return first[:room] if whole else question
    return first[:room] if first[: len(question)] == question else question


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[Ids]:
    found = tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        truncation=False,
        verbose=False,
    )
    return [tuple(ids) for ids in found["input_ids"]]

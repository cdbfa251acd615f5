"""From contents to the token ids that a `RatingBatch` is made of.

Ids always equal those of the whole text. The text of the first prompt is tokenised in one piece and cut where a token
boundary falls on the text boundary; the other prompts share that body, because the text around it is the same up to
the boundary. This is verified for the tokenizer on probes and on its vocabulary, and for every row on its own cut; a
row or a tokenizer for which it does not hold is rated as whole sequences, one a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stitch_ray.engines.base import Ids, RatingBatch
from stitch_ray.errors import UserError
from stitch_ray.selection.layout import Content, Layout

_PROBES = tuple(
    Content(instruction, response)
    for instruction, response in (
        ("Say hi.", "Hi."),
        ("a", 'b"'),
        ("1", "2)"),
        ("code", "```\nx = 1\n```"),
        ("é", "你好。"),
    )
)
_SMALLEST_ROOM = 16


@dataclass(frozen=True, slots=True)
class EncodedBody:
    """Token ids of one content, or a `whole` sequence for every prompt where the ids cannot be shared."""

    ids: Ids
    truncated: bool = False
    whole: tuple[Ids, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens of the content; of the longest sequence where nothing is shared."""
        return max(map(len, self.whole)) if self.whole else len(self.ids)


@dataclass(frozen=True, slots=True)
class _Text:
    """Ids of a text with the character span of every token; special tokens at the end are left out."""

    ids: Ids
    spans: tuple[tuple[int, int], ...]


class RatingEncoder:
    """Tokenises contents for one tokenizer, layout and longest sequence (`max_tokens`).

    Raises UserError if the tokenizer does not write every rating 1..R as one token behind the cue, or if the prompts
    leave no room for a content.
    """

    def __init__(self, tokenizer: Any, layout: Layout, *, num_ratings: int, max_tokens: int, name: str) -> None:
        self._tokenizer = tokenizer
        self._layout = layout
        self._max_tokens = max_tokens
        self.num_prompts = len(layout.prompts)
        self.rating_ids = self._find_rating_ids(num_ratings, name)
        self._heads: tuple[Ids, ...] = ()
        self._tails: tuple[Ids, ...] = ()
        self.shares_bodies = bool(getattr(tokenizer, "is_fast", False)) and self._find_sides()
        if not self.shares_bodies:
            self._heads = self._tails = ((),)
        self._longest_sides = max(map(len, self._heads)) + max(map(len, self._tails))  # one of the two has one entry
        around = [layout.whole(Content("", "").text, k) for k in range(self.num_prompts)]
        longest = max(len(self._encode_text(text).ids) for text in around)
        self._room = max_tokens - longest
        if self._room < _SMALLEST_ROOM:
            raise UserError(
                f"models: {name}: the longest rating prompt takes {longest} of max_tokens {max_tokens}; "
                f"at least {_SMALLEST_ROOM} tokens must be left for the content"
            )

    def batch(self, bodies: Sequence[EncodedBody]) -> RatingBatch:
        """Bodies that share their sides, as one batch for the engine."""
        ids = tuple(body.ids for body in bodies)
        return RatingBatch(heads=self._heads, bodies=ids, tails=self._tails, rating_ids=self.rating_ids)

    def whole_batch(self, body: EncodedBody) -> RatingBatch:
        """A content rated as whole sequences: the K sequences are the bodies of a batch with one empty prompt."""
        return RatingBatch(heads=((),), bodies=body.whole, tails=((),), rating_ids=self.rating_ids)

    def encode(self, contents: Sequence[Content]) -> list[EncodedBody]:
        """Ids of every content, in order, shortened inside the content where a sequence would exceed `max_tokens`."""
        if not self.shares_bodies:
            return [self._encode_apart(content) for content in contents]
        texts = [self._layout.whole(content.text, 0) for content in contents]
        found = (
            self._tokenizer(texts, return_offsets_mapping=True) if texts else {"input_ids": [], "offset_mapping": []}
        )
        bodies = []
        for content, ids, spans in zip(contents, found["input_ids"], found["offset_mapping"], strict=True):
            body = self._cut(_without_trailing_specials(ids, spans), content, 0)
            if body is None:
                bodies.append(self._encode_apart(content))
            elif len(body) + self._longest_sides > self._max_tokens:
                bodies.append(self._shorten(content))
            else:
                bodies.append(EncodedBody(body))
        return bodies

    def _encode_apart(self, content: Content) -> EncodedBody:
        whole = tuple(self._encode_text(self._layout.whole(content.text, k)).ids for k in range(self.num_prompts))
        if max(map(len, whole)) > self._max_tokens:
            return self._shorten(content)
        return EncodedBody((), whole=whole)

    def _shorten(self, content: Content) -> EncodedBody:
        """Cut the response at its end; cut the instruction only where it alone would take more than half the room."""
        instruction, response = self._encode_text(content.instruction), self._encode_text(content.response)
        room = self._room
        while room > 0:
            for_response = min(len(response.ids), max(room - len(instruction.ids), room // 2))
            cut = Content(
                _first(content.instruction, instruction, room - for_response),
                _first(content.response, response, for_response),
            )
            sequences = [self._encode_text(self._layout.whole(cut.text, k)) for k in range(self.num_prompts)]
            excess = max(len(text.ids) for text in sequences) - self._max_tokens
            if excess <= 0:
                body = self._cut(sequences[0], cut, 0) if self.shares_bodies else None
                if body is not None:
                    return EncodedBody(body, truncated=True)
                return EncodedBody((), truncated=True, whole=tuple(text.ids for text in sequences))
            room -= excess
        raise AssertionError("no content fits beside the prompts")  # the constructor has left room for one

    def _find_sides(self) -> bool:
        """Set heads and tails; False if bodies cannot be shared between the prompts with this tokenizer."""
        heads, tails = [], []
        for k in range(self.num_prompts):
            text = self._encode_text(self._layout.whole(_PROBES[0].text, k))
            start, stop = self._boundaries(_PROBES[0], k)
            first = sum(end <= start for _, end in text.spans)
            last = sum(begin < stop for begin, _ in text.spans)
            heads.append(text.ids[:first])
            tails.append(text.ids[last:])
        self._heads = tuple(heads) if len(set(heads)) > 1 else (heads[0],)
        self._tails = tuple(tails) if len(set(tails)) > 1 else (tails[0],)
        if len(self._heads) > 1 and len(self._tails) > 1:
            return False
        for probe in _PROBES:
            cuts = {
                self._cut(self._encode_text(self._layout.whole(probe.text, k)), probe, k)
                for k in range(self.num_prompts)
            }
            if len(cuts) > 1 or None in cuts:
                return False
        return not self._can_join()

    def _can_join(self) -> bool:
        """Whether some token reaches over the boundary to the side that differs, so that rows may differ in where it is.

        Text before either boundary ends in a newline ("Ċ" in byte-level vocabularies).
        """
        if len(self._heads) > 1:
            behind = {Content("", "").text[0]}
        else:
            behind = {self._layout.tail(k)[0] for k in range(self.num_prompts)}
        behind |= {
            chr(character.encode()[0]) for character in behind
        }  # its first byte, as byte-level vocabularies write it
        joined = re.compile(f"[\nĊ][{re.escape(''.join(sorted(behind)))}]", re.IGNORECASE)
        return any(joined.search(token) for token in self._tokenizer.get_vocab())

    def _cut(self, text: _Text, content: Content, prompt: int) -> Ids | None:
        """The body's ids, or None if head, body and tail do not meet at token boundaries."""
        head = self._heads[prompt if len(self._heads) > 1 else 0]
        tail = self._tails[prompt if len(self._tails) > 1 else 0]
        start, stop = self._boundaries(content, prompt)
        first, last = len(head), len(text.ids) - len(tail)
        if first >= last or text.ids[:first] != head or text.ids[last:] != tail:
            return None
        meets_head = text.spans[first][0] >= start and (first == 0 or text.spans[first - 1][1] <= start)
        meets_tail = text.spans[last][0] >= stop and text.spans[last - 1][1] <= stop
        return text.ids[first:last] if meets_head and meets_tail else None

    def _boundaries(self, content: Content, prompt: int) -> tuple[int, int]:
        start = len(self._layout.head(prompt))
        return start, start + len(content.text) + len(self._layout.gap)

    def _encode_text(self, text: str) -> _Text:
        if getattr(self._tokenizer, "is_fast", False):
            found = self._tokenizer(text, return_offsets_mapping=True)
            return _without_trailing_specials(found["input_ids"], found["offset_mapping"])
        ids = list(self._tokenizer(text)["input_ids"])
        while ids and ids[-1] == self._tokenizer.eos_token_id:
            ids.pop()
        return _Text(tuple(ids), ())

    def _find_rating_ids(self, num_ratings: int, name: str) -> Ids:
        found: list[int] = []
        for rating in range(1, num_ratings + 1):
            for prompt in range(self.num_prompts):
                text = self._layout.whole(_PROBES[0].text, prompt)
                before, after = self._encode_text(text).ids, self._encode_text(f"{text}{rating}").ids
                if after[:-1] != before or (prompt and after[-1] != found[-1]):
                    pieces = self._tokenizer.convert_ids_to_tokens(list(after[-3:]))
                    raise UserError(
                        f"models: {name}: the tokenizer does not write rating {rating} as one token behind the cue "
                        f"(last tokens: {pieces}); ratings are read from single tokens, so this model cannot rate"
                    )
                if not prompt:
                    found.append(after[-1])
        if len(set(found)) != num_ratings or self._tokenizer.unk_token_id in found:
            raise UserError(f"models: {name}: the tokenizer has no token of its own for every rating 1..{num_ratings}")
        return tuple(found)


def _without_trailing_specials(ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> _Text:
    stop = len(ids)
    while stop > 1 and tuple(spans[stop - 1]) == (0, 0):
        stop -= 1
    return _Text(tuple(ids[:stop]), tuple((int(a), int(b)) for a, b in spans[:stop]))


def _first(text: str, encoded: _Text, tokens: int) -> str:
    """The first `tokens` tokens of `text`, as text."""
    if tokens >= len(encoded.ids):
        return text
    if not encoded.spans:
        return text[: int(len(text) * tokens / len(encoded.ids))].rstrip()
    return text[: max((end for _, end in encoded.spans[:tokens]), default=0)].rstrip()

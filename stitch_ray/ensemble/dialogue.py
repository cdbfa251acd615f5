"""Two speakers who discuss a draft in turns, as a state without any I/O.

Turns 1, 3, 5, … are the first speaker's, 2, 4, 6, … the second's. Each sees the question, its context, the draft and all
that was said. The dialogue ends when its turns are used up, or when both agree: a speaker keeps the answer that the
other one gave just before. The draft is nobody's turn, so keeping it is no agreement yet. Follows the dialogue of
Stitch (Sec. 3), whose order was left to the scheduler and which had no such end.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from string import Template

from stitch_ray.ensemble.spoken import SpokenTurn
from stitch_ray.records import Turn, content_hash

_PROMPTS = ("dialogue_system.txt", "dialogue_turn.txt")
_MARKER = re.compile(r"<(?=[|/\w｜])|\[(?=/?[A-Z_]+\])")  # how the special tokens of chat templates begin


@dataclass(frozen=True, slots=True)
class Said:
    """A turn and whose it was."""

    speaker: str
    comment: str
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """One state of a dialogue; `add` makes the next. `context`: all that belongs to the question, as the scorer has it."""

    question: str
    context: str | None
    draft: str
    speakers: tuple[str, str]
    max_turns: int
    stop_on_agreement: bool = True
    turns: tuple[Said, ...] = ()

    @property
    def speaker(self) -> str:
        """Whose turn it is."""
        return self.speakers[len(self.turns) % 2]

    @property
    def agreed(self) -> bool:
        return len(self.turns) > 1 and same_answer(self.turns[-1].answer, self.turns[-2].answer)

    @property
    def finished(self) -> bool:
        return len(self.turns) == self.max_turns or (self.stop_on_agreement and self.agreed)

    @property
    def answer(self) -> str:
        """What the last speaker says, or the draft."""
        return self.turns[-1].answer if self.turns else self.draft

    @property
    def changed_by(self) -> str | None:
        """Who changed the answer last; None: nobody did."""
        return next((self.turns[n].speaker for n in reversed(range(len(self.turns))) if self.changed(n)), None)

    def changed(self, number: int) -> bool:
        """Whether turn `number`, from 0, changed the answer of the turn before, the first one that of the draft."""
        before = self.turns[number - 1].answer if number else self.draft
        return not same_answer(self.turns[number].answer, before)

    def add(self, turn: SpokenTurn) -> Dialogue:
        """The dialogue after the speaker's turn. Raises ValueError if it was finished."""
        if self.finished:
            raise ValueError("the dialogue is finished")
        return replace(self, turns=(*self.turns, Said(self.speaker, turn.comment, turn.answer)))

    def prompt(self) -> tuple[Turn, ...]:
        """What the speaker is asked."""
        other = self.speakers[(len(self.turns) + 1) % 2]
        data: dict[str, object] = {"question": self.question}
        if self.context:
            data["context"] = self.context
        data["draft"] = self.draft
        data["said"] = [{"by": one.speaker, "comment": one.comment, "answer": one.answer} for one in self.turns]
        system, turn = (_template(name) for name in _PROMPTS)
        return (
            Turn("system", system.substitute(speaker=self.speaker, other=other)),
            Turn("user", turn.substitute(speaker=self.speaker, data=quoted(data))),
        )


def same_answer(one: str, other: str) -> bool:
    """Equal but for case, white space, width of characters, and punctuation at the end.

    Stricter than the normalisation of exact match, to which 1.5 is 15 and C++ is C.
    """
    return _key(one) == _key(other)


def quoted(data: object) -> str:
    """JSON from which a text in it cannot break out: neither by quotes nor by a token with which a template ends a turn."""
    text = json.dumps(data, ensure_ascii=False, indent=0)
    return _MARKER.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def prompts_hash() -> str:
    """Of the texts that ask for a turn."""
    return content_hash([_template(name).template for name in _PROMPTS])


def _key(text: str) -> str:
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return plain.rstrip(" .!?,;:") or plain


@cache
def _template(name: str) -> Template:
    return Template(resources.files("stitch_ray.prompts").joinpath(name).read_text("utf-8").strip())

"""Where the rating prompt, the content and the cue for the rating stand in the text that a model reads.

Both layouts meet the content at "newline, then a letter": a place where tokenizers in use split, so that head, body and
tail tokenise the same alone and together. `encode.py` checks that for every row instead of believing it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from stitch_ray.records import Turn

LayoutName = Literal["prompt_first", "content_first"]

CUE = "The rating is:\n"


@dataclass(frozen=True, slots=True)
class Content:
    """One assistant turn to be rated. The instruction holds the conversation so far."""

    instruction: str
    response: str

    @property
    def text(self) -> str:
        return f"{self.before_response}{self.response}"

    @property
    def before_response(self) -> str:
        return f"Instruction: {self.instruction}\nResponse: "


@dataclass(frozen=True, slots=True)
class Layout:
    """`head(k) + content + gap + tail(k)` is the text rated for prompt k."""

    name: LayoutName
    prompts: tuple[str, ...]

    @property
    def gap(self) -> str:
        """Stands between the content and the tail; belongs to the body."""
        return "\n" if self.name == "prompt_first" else "\n\n"

    def head(self, prompt: int) -> str:
        return f"{self.prompts[prompt]}\n\n" if self.name == "prompt_first" else ""

    def tail(self, prompt: int) -> str:
        return CUE if self.name == "prompt_first" else f"{self.prompts[prompt]}\n{CUE}"

    def whole(self, content: str, prompt: int) -> str:
        return f"{self.head(prompt)}{content}{self.gap}{self.tail(prompt)}"


def contents(messages: Sequence[Turn], context: str | None) -> list[Content]:
    """One content for every assistant turn: its instruction is all that was said before it.

    A single-turn example is its instruction, with the context on a line of its own, and its response. In a longer
    conversation earlier turns are marked with their roles. Surrounding white space is left out.
    """
    found: list[Content] = []
    said: list[str] = []
    exchanges = sum(turn.role == "assistant" for turn in messages)
    question = next((place for place, turn in enumerate(messages) if turn.role == "user"), None)
    for place, turn in enumerate(messages):
        text = turn.content.strip()
        if turn.role == "assistant":
            found.append(Content("\n".join(said), text))
        if context and place == question:
            text = f"{text}\n{context.strip()}"
        plain = exchanges == 1 and turn.role == "user"
        said.append(text if plain else f"{turn.role.capitalize()}: {text}")
    return found

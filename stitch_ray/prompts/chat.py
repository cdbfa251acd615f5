"""Conversations to text by a Jinja chat template: the same text in training and, with the template saved, after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError, TemplateSyntaxError

from stitch_ray.data.quarantine import BadRow
from stitch_ray.errors import UserError
from stitch_ray.records import Turn

_PROBE = (Turn("user", "question"), Turn("assistant", "answer"))


@dataclass(frozen=True)
class ChatTemplate:
    """A template with the tokenizer that renders it.

    `text` is the Jinja source: with it as the tokenizer's `chat_template`, inference sees what training saw. `source`
    is what the user wrote (`chat`, `raw` or a path) and names the template in messages.
    """

    tokenizer: Any
    text: str
    source: str

    @classmethod
    def resolve(cls, template: str, tokenizer: Any) -> ChatTemplate:
        """The template that `tasks[].template` names. Raises UserError if there is none or it is no valid Jinja."""
        found = cls(tokenizer, _template_text(template, tokenizer), template)
        try:
            found._apply(_PROBE, add_generation_prompt=False)
        except TemplateSyntaxError as error:
            raise UserError(f"tasks[].template: {template}, line {error.lineno}: {error.message}") from error
        except (TemplateError, ValueError):
            pass  # may be what the template thinks of this conversation; a row is told by `render`
        return found

    def render(self, messages: Sequence[Turn], add_generation_prompt: bool = False) -> str:
        """The text of a conversation, with the header of the next answer if asked for.

        Raises BadRow if the template does not take the conversation, for example for want of a system role.
        """
        try:
            return self._apply(messages, add_generation_prompt)
        except (TemplateError, ValueError) as error:
            raise BadRow(f"template {self.source} refuses the conversation: {error}") from error

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """Texts that the tokenizer keeps as one token with a function: what can end a turn."""
        added = (token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return frozenset((*self.tokenizer.all_special_tokens, *added))

    def _apply(self, messages: Sequence[Turn], add_generation_prompt: bool) -> str:
        turns = [{"role": turn.role, "content": turn.content} for turn in messages]
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.text, tokenize=False, add_generation_prompt=add_generation_prompt
        )
        assert isinstance(text, str)
        return text


def _template_text(template: str, tokenizer: Any) -> str:
    if template == "chat":
        try:
            return str(tokenizer.get_chat_template())
        except ValueError as error:
            raise UserError(
                "tasks[].template: chat needs a tokenizer with a chat template, and the model's has none (or several "
                "and no default); write template: raw, or the path of a Jinja file"
            ) from error
    if template == "raw":
        text = resources.files(__package__).joinpath("templates/raw.jinja").read_text("utf-8")
        return "{{- bos_token -}}\n" + text if _begins_with_bos(tokenizer) else text
    try:
        return Path(template).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"tasks[].template: cannot read {template}: {error}; write chat, raw or the path of a Jinja file"
        ) from error


def _begins_with_bos(tokenizer: Any) -> bool:
    """Whether the model knows texts with a first token in front: text from a template does not get one by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id

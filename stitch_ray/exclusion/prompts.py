"""What a model is asked in EXAR. Training and inference render the same turns, so that they cannot differ."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from string import Template

from stitch_ray.records import Turn, content_hash

Turns = tuple[Turn, ...]


def exclusion_prompt(turns: Turns, excluded: Sequence[str]) -> Turns:
    """The conversation, whose last turn asks for an answer other than `excluded`; as it is if nothing is excluded.

    Answers are listed in the order given, one a line, line breaks in them as spaces.
    """
    if not excluded:
        return turns
    answers = "\n".join(f"- {' '.join(answer.split())}" for answer in excluded)
    text = _template("exclude.txt").substitute(question=turns[-1].content, answers=answers)
    return (*turns[:-1], Turn("user", text))


def validator_prompt(turns: Turns, answer: str) -> Turns:
    """The conversation, whose last turn asks whether `answer` to its question is right."""
    text = _template("validate.txt").substitute(question=turns[-1].content, answer=answer.strip())
    return (*turns[:-1], Turn("user", text))


def prompts_hash() -> str:
    """Changes when one of the texts does."""
    return content_hash([_template(name).template for name in ("exclude.txt", "validate.txt")])


@cache
def _template(name: str) -> Template:
    return Template(resources.files("stitch_ray.prompts").joinpath(name).read_text("utf-8").strip())

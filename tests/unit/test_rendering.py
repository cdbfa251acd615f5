"""Conversations of a member go through its template, and that of the adapter that answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from stitch_ray.engines.base import EngineError, Request
from stitch_ray.engines.pretrained import load_tokenizer
from stitch_ray.ensemble.rendering import RenderedEngine
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.records import Turn
from tests.scripted import ScriptedEngine

PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TURNS = (Turn("system", "Be brief."), Turn("user", "Who?"))


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(str(tiny_model))


def shown(tokenizer: Any, template: str, adapter: str | None = None, **options: Any) -> str:
    inner = ScriptedEngine("yes")
    engine = RenderedEngine(inner, ChatTemplate(tokenizer, template, "test"), inner.info, **options)
    asyncio.run(engine.generate(Request(request_id="q", prompt=TURNS, adapter=adapter)))
    return str(tokenizer.decode(inner.requests[0].prompt))


def test_turns_become_the_ids_of_the_rendered_text(tokenizer: Any) -> None:
    assert shown(tokenizer, PLAIN) == "<system>Be brief.<user>Who?"


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_instructions_reach_a_model_whose_template_has_no_system_role(tokenizer: Any, template: str) -> None:
    assert shown(tokenizer, template, fold_system=True) == "<user>Be brief.\n\nWho?"
    assert shown(tokenizer, PLAIN, fold_system=True) == "<system>Be brief.<user>Who?"


def test_what_a_template_refuses_is_an_error_as_in_sample_answers(tokenizer: Any) -> None:
    with pytest.raises(EngineError, match="no system role"):
        shown(tokenizer, NO_SYSTEM)


def test_an_adapter_is_asked_in_its_own_template(tokenizer: Any) -> None:
    adapters = {"task": ChatTemplate(tokenizer, "{{ messages[-1].content }}", "test")}
    assert shown(tokenizer, PLAIN, "task", adapters=adapters) == "Who?"
    assert shown(tokenizer, PLAIN, adapters=adapters) == "<system>Be brief.<user>Who?"

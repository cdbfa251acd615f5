"""What objectives render, and how one is found."""

import ast
from importlib import resources
from random import Random

import pytest

from stitch_ray.errors import UserError
from stitch_ray.records import Example, Turn
from stitch_ray.training.objectives import OBJECTIVES, Rendered, Span, objective


def example(*turns: tuple[str, str], context: str | None = None) -> Example:
    return Example(messages=tuple(Turn(*turn) for turn in turns), context=context, source="", line=1, raw="{}")


def render(one: Example) -> Rendered:
    (rendered,) = objective("sft").render(one, Random(0))
    return rendered


def test_instruction_and_input_are_both_rendered() -> None:
    found = render(example(("user", "Translate."), ("assistant", "Hund"), context="dog"))
    assert found.spans == (Span("Translate.\n\ndog", 0.0, "user"), Span("Hund", 1.0, "assistant"))
    assert found.label is None


def test_every_answer_of_a_conversation_carries_loss_and_the_context_stands_once() -> None:
    turns = (("system", "Be brief."), ("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"))
    spans = render(example(*turns, context="C")).spans
    assert [(span.role, span.weight) for span in spans] == [
        ("system", 0), ("user", 0), ("assistant", 1), ("user", 0), ("assistant", 1)
    ]  # fmt: skip
    assert [span.text for span in spans] == ["Be brief.", "Q1\n\nC", "A1", "Q2", "A2"]


def test_the_question_of_an_example_ends_with_its_last_answer() -> None:
    sft = objective("sft")
    turns = (("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"), ("user", "Thanks"))
    assert sft.question(example(*turns, context="C")) == (
        Turn("user", "Q1\n\nC"), Turn("assistant", "A1"), Turn("user", "Q2"), Turn("assistant", "A2")
    )  # fmt: skip
    assert sft.question(example(("user", "Q1"))) is None


def test_an_unknown_objective_is_told_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"objective: unknown objective 'stf'.*sft"):
        objective("stf")
    assert all(name == known.name for name, known in OBJECTIVES.items())


def test_objectives_are_pure_text() -> None:
    """No objective may need a tokenizer or a model: the file of one imports neither."""
    for file in resources.files("stitch_ray.training.objectives").iterdir():
        if file.name.endswith(".py"):
            nodes = ast.walk(ast.parse(file.read_text()))
            imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
            assert not {name for name in imported if name and name.split(".")[0] in ("torch", "transformers", "ray")}

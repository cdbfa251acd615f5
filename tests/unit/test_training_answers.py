"""Answers to validation questions: which are asked, how they are asked, what counts as right."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
from transformers import AutoTokenizer

from stitch_ray.engines.base import Generation, Request, Sampling
from stitch_ray.engines.hf import HfEngine
from stitch_ray.errors import UserError
from stitch_ray.records import Turn
from stitch_ray.training import answers
from stitch_ray.training.answers import Question, evaluate_answers, first_questions, normalise, question

pytestmark = pytest.mark.numeric


def asked(text: str, reference: str = "yes", task: str = "a") -> Question:
    return {"task": task, "messages": [{"role": "user", "content": text}], "reference": reference}


def test_first_questions_do_not_depend_on_the_order_and_count_repeats_once() -> None:
    rows = [("3", asked("c")), ("1", asked("a")), ("1", asked("a")), ("2", asked("b")), ("9", asked("z", task="b"))]
    chosen = first_questions(rows, 2)
    assert [one["messages"][0]["content"] for one in chosen] == ["a", "b", "z"]
    assert first_questions(rows[::-1], 2) == chosen
    assert first_questions([*rows, ("5", asked("new"))], 2) == chosen


def test_question_is_all_but_the_last_answer() -> None:
    turns = [Turn("system", "s"), Turn("user", "u"), Turn("assistant", "x"), Turn("user", "v"), Turn("assistant", "y")]
    found = question("t", turns)
    assert [message["content"] for message in found["messages"]] == ["s", "u", "x", "v"]
    assert found["reference"] == "y"
    for bad in (turns[:2], turns[2:3]):
        with pytest.raises(ValueError, match="end with the assistant"):
            question("t", bad)


@pytest.mark.parametrize(("text", "same"), [(" a  b\n", True), ("a\tb", True), ("ab", False), ("A b", False)])
def test_only_white_space_is_forgiven(text: str, same: bool) -> None:
    assert (normalise(text) == normalise("a b")) is same


def test_answers_are_those_of_the_engine(tiny_model: Path) -> None:
    texts = ["What is two plus two?", "Name a colour.", "Say hello."]
    prompts = [(Turn("user", text),) for text in texts]
    engine = HfEngine(str(tiny_model), num_threads=1)
    requests = [
        Request(request_id=t, prompt=p, sampling=Sampling(max_tokens=6)) for t, p in zip(texts, prompts, strict=True)
    ]
    expected = [found[0].text for found in engine.generate(requests) if not isinstance(found, Exception)]
    questions = [asked(texts[0], f" {expected[0]}\n"), asked(texts[1], "never this"), asked(texts[2], expected[2], "b")]
    found = evaluate_answers(tiny_model, questions, max_tokens=6, samples=1, num_threads=1)
    assert found["tasks"] == {"a": {"exact_match": 0.5, "examples": 2}, "b": {"exact_match": 1.0, "examples": 1}}
    assert [(one["task"], one["question"], one["answer"], one["correct"]) for one in found["samples"]] == [
        ("a", texts[0], expected[0], True),
        ("b", texts[2], expected[2], True),
    ]


class Recorder:
    """Stands for the engine: keeps the requests, answers `yes`."""

    requests: ClassVar[list[Request]] = []

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def generate(self, requests: list[Request]) -> list[list[Generation]]:
        Recorder.requests = list(requests)
        return [[Generation(text="yes", token_ids=(1,), finish_reason="length", prompt_tokens=1)] for _ in requests]

    def close(self) -> None: ...


def test_a_task_is_asked_with_its_own_template(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "HfEngine", Recorder)
    own = "{% for m in messages %}Q: {{ m.content }}{% endfor %}{% if add_generation_prompt %} A:{% endif %}"
    found = evaluate_answers(
        tiny_model, [asked("hi", task="a"), asked("hi", task="b")], max_tokens=4, templates={"b": own}
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    texts = [tokenizer.decode(request.prompt) for request in Recorder.requests]
    assert texts == [chat, "Q: hi A:"]
    assert all(request.sampling.temperature == 0 for request in Recorder.requests)
    assert found["samples"][0]["cut"] is True


def test_a_question_that_cannot_be_asked_is_a_wrong_answer(tiny_model: Path) -> None:
    long = asked("word " * 5000)
    refused = asked("no")
    template = "{{ raise_exception('not this') if messages[0].content == 'no' else messages[0].content }}"
    found = evaluate_answers(tiny_model, [long, refused], max_tokens=4, templates={"a": template})
    assert found["tasks"]["a"] == {"exact_match": 0.0, "examples": 2}
    assert "prompt tokens" in found["samples"][0]["error"]
    assert "not this" in found["samples"][1]["error"]


def test_a_model_without_template_is_refused_with_the_fix(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bare:
        chat_template = None

    monkeypatch.setattr(answers, "load_tokenizer", lambda *_, **__: Bare())
    with pytest.raises(UserError, match="template: raw"):
        evaluate_answers(tiny_model, [asked("hi")], max_tokens=4)

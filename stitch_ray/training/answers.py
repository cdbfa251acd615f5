"""Answers of a trained model to validation questions: the share that equals the reference, and some to read.

Runs in the calling process and knows nothing of Ray or of the training: a checkpoint is exported first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from jinja2 import TemplateError

from stitch_ray.engines.base import EngineError, Ids, Request, Sampling
from stitch_ray.engines.hf import HfEngine
from stitch_ray.engines.pretrained import load_tokenizer
from stitch_ray.errors import UserError
from stitch_ray.records import Turn


class Question(TypedDict):
    """What is asked: the messages {role, content} before the answer, as the objective renders them."""

    task: str
    messages: list[dict[str, str]]
    reference: str


def question(task: str, turns: Sequence[Turn]) -> Question:
    """The question that the last turn answers. Raises ValueError if that is not the assistant's, or all there is."""
    if len(turns) < 2 or turns[-1].role != "assistant":
        raise ValueError("a question needs turns that end with the assistant's answer")
    messages = [{"role": turn.role, "content": turn.content} for turn in turns[:-1]]
    return {"task": task, "messages": messages, "reference": turns[-1].content}


def first_questions(questions: Iterable[tuple[str, Question]], count: int) -> list[Question]:
    """The `count` questions with the lowest content ids of every task, in order of task and id, repeats once.

    questions: (content id, question). The choice does not depend on the order they come in, and more data changes it
    as little as possible.
    """
    by_task: dict[str, dict[str, Question]] = defaultdict(dict)
    for content_id, one in questions:
        by_task[one["task"]].setdefault(content_id, one)
    return [by_task[task][content_id] for task in sorted(by_task) for content_id in sorted(by_task[task])[:count]]


def evaluate_answers(
    model_folder: Path | str,
    questions: Sequence[Question],
    *,
    max_tokens: int,
    templates: Mapping[str, str] | None = None,
    samples: int = 3,
    dtype: str = "auto",
    device: str | None = None,
    num_threads: int | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Greedy answers to `questions`: {"tasks": {task: {"exact_match", "examples"}}, "samples": [...]}.

    exact_match: share of answers equal to the reference but for white space. A question that cannot be answered (too
    long, refused by the template) is a wrong answer, and its sample has the reason as `error`.
    templates: task -> Jinja text of its chat template; a task that is not in it takes the tokenizer's own.
    samples: how many questions of every task, in their order, are returned with question, reference, answer, correct,
    cut (the answer reached `max_tokens`) and error.

    Raises UserError if the folder holds no usable model, or a task has no template at all.
    """
    tokenizer = load_tokenizer(str(model_folder), trust_remote_code=trust_remote_code)
    answers: dict[int, dict[str, Any]] = {}
    requests: list[Request] = []
    for index, asked in enumerate(questions):
        template = (templates or {}).get(asked["task"], getattr(tokenizer, "chat_template", None))
        if template is None:
            raise UserError(
                f"tasks: {asked['task']}: {model_folder} has no chat template to ask with; set template: raw or a file"
            )
        try:
            ids = _prompt_ids(tokenizer, asked["messages"], template)
            requests.append(Request(request_id=str(index), prompt=ids, sampling=Sampling(max_tokens=max_tokens)))
        except (TemplateError, UnicodeEncodeError) as error:
            answers[index] = _failed(f"the chat template refuses the question: {error}")
    engine = HfEngine(
        str(model_folder), dtype=dtype, device=device, num_threads=num_threads, trust_remote_code=trust_remote_code
    )
    try:
        generated = engine.generate(requests)
    finally:
        engine.close()
    for request, found in zip(requests, generated, strict=True):
        index = int(request.request_id)
        if isinstance(found, EngineError):
            answers[index] = _failed(found.reason)
        else:
            text, reference = found[0].text, questions[index]["reference"]
            correct = normalise(text) == normalise(reference)
            answers[index] = {
                "answer": text, "correct": correct, "cut": found[0].finish_reason == "length", "error": None,
            }  # fmt: skip
    return _summary(questions, answers, samples)


def normalise(text: str) -> str:
    """White space at the ends removed, and any other run of it made one space."""
    return " ".join(text.split())


def _prompt_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], template: str) -> Ids:
    """As `hf_text.prompt_ids`, with the template given: what comes before the answer in training."""
    text = tokenizer.apply_chat_template(
        [dict(message) for message in messages], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    text.encode()
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _failed(reason: str) -> dict[str, Any]:
    return {"answer": "", "correct": False, "cut": False, "error": reason}


def _summary(questions: Sequence[Question], answers: Mapping[int, Mapping[str, Any]], samples: int) -> dict[str, Any]:
    by_task: dict[str, list[int]] = defaultdict(list)
    for index, asked in enumerate(questions):
        by_task[asked["task"]].append(index)
    tasks = {
        task: {"exact_match": sum(answers[index]["correct"] for index in own) / len(own), "examples": len(own)}
        for task, own in by_task.items()
    }
    shown = [
        {
            "task": task,
            "question": "\n\n".join(message["content"] for message in questions[index]["messages"]),
            "reference": questions[index]["reference"],
            **answers[index],
        }
        for task, own in by_task.items()
        for index in own[:samples]
    ]
    return {"tasks": tasks, "samples": shown}

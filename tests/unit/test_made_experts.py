"""The demo's calculators: they take part in a dialogue through the real endpoint engine, and are as good as they say."""

import asyncio
import json
from typing import Any

import httpx
import pytest

from stitch_ray.config.ensemble import DialogueConfig, LimitsConfig
from stitch_ray.config.reliability import EndpointConfig
from stitch_ray.data.made_experts import SKILLS, expert_server, turn_of
from stitch_ray.data.made_questions import short_questions
from stitch_ray.engines.openai_api import OpenAIEngine
from stitch_ray.ensemble.budget import Budget
from stitch_ray.ensemble.dialogue_route import DialogueRoute
from stitch_ray.ensemble.types import Answer, Limits, Question, Refined
from stitch_ray.errors import UserError


def test_each_is_right_as_often_as_it_says() -> None:
    rows = short_questions(2000)
    for expert, skill in SKILLS.items():
        right = sum(turn_of(expert, row["question"])["answer"] == row["answer"] for row in rows)
        assert abs(right / len(rows) - skill) < 0.03


def test_a_turn_follows_from_name_and_question_alone_and_a_wrong_one_is_a_digit_of_the_question() -> None:
    rows = short_questions(300, seed=5)
    said = [[turn_of(expert, row["question"])["answer"] for row in rows] for expert in SKILLS]
    assert said == [[turn_of(expert, row["question"])["answer"] for row in rows] for expert in SKILLS]
    assert said[0] != said[1]
    for row, answer in zip(rows * 2, said[0] + said[1], strict=True):
        digits = row["question"].split()[2] if row["task"] == "median" else "0123456"
        assert answer in digits


def test_the_question_is_found_in_the_prompt_of_a_dialogue() -> None:
    question = short_questions(1)[0]["question"]
    shown = json.dumps({"question": question, "draft": "9", "said": []})
    assert turn_of("solver", f"Discuss.\n{shown}\nAnswer in JSON.") == turn_of("solver", question)


@pytest.mark.parametrize("prompt", ["Who wrote Faust?", "median of many", ""])
def test_what_they_cannot_calculate_they_say(prompt: str) -> None:
    assert turn_of("checker", prompt) == {"comment": "I only calculate medians and remainders.", "answer": "?"}


def test_their_server_lists_both_speaks_the_chat_api_and_knows_no_other_model() -> None:
    question = short_questions(1)[0]["question"]

    def body(model: str, *contents: str) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": content} for content in contents]}

    with expert_server() as url, httpx.Client(base_url=url, trust_env=False) as client:
        assert [one["id"] for one in client.get("/models").json()["data"]] == list(SKILLS)
        alone = client.post("/chat/completions", json=body("solver", question)).json()
        turn = client.post("/chat/completions", json=body("solver", "You are the solver.", question)).json()
        unknown = client.post("/chat/completions", json=body("poet", question))
        port = int(url.rsplit(":", 1)[1].split("/")[0])
        with pytest.raises(UserError, match=f"port {port} of this machine is taken"), expert_server(port):
            pass
    expected = turn_of("solver", question)
    assert alone["choices"][0]["message"]["content"] == expected["answer"]
    assert json.loads(turn["choices"][0]["message"]["content"]) == expected
    assert alone["usage"] == {"prompt_tokens": len(question.split()), "completion_tokens": 1}
    assert (unknown.status_code, "poet" in unknown.json()["error"]["message"]) == (404, True)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/models", trust_env=False)


def test_they_refine_a_draft_in_dialogue() -> None:
    row = next(row for row in short_questions(50) if row["task"] == "remainder")

    async def refined(url: str) -> Refined:
        engines = [OpenAIEngine(EndpointConfig(url=url, model=name, name=name)) for name in SKILLS]  # type: ignore[call-arg]
        route = DialogueRoute(DialogueConfig(), engines, list(SKILLS))  # type: ignore[call-arg]
        question = Question(example_id="q", question=row["question"])
        budget = Budget(Limits(**LimitsConfig().model_dump()))  # type: ignore[call-arg]
        try:
            return [item async for item in route.refine(question, Answer(text="9"), budget)][-1]  # type: ignore[return-value]
        finally:
            for engine in engines:
                await engine.close()

    with expert_server() as url:
        found = asyncio.run(refined(url))
    assert found.text == turn_of("checker", row["question"])["answer"]
    assert found.changed_by in SKILLS

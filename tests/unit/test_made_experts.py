"""The demo's calculators: they take part in a dialogue through the real endpoint engine, and are as good as they say."""

import asyncio

from stitch_ray.config.ensemble import DialogueConfig, LimitsConfig
from stitch_ray.config.reliability import EndpointConfig
from stitch_ray.data.made_experts import SKILLS, expert_server, turn_of
from stitch_ray.data.made_questions import short_questions
from stitch_ray.engines.openai_api import OpenAIEngine
from stitch_ray.ensemble.budget import Budget
from stitch_ray.ensemble.dialogue_route import DialogueRoute
from stitch_ray.ensemble.types import Answer, Limits, Question, Refined


def test_each_is_right_as_often_as_it_says() -> None:
    rows = short_questions(2000)
    for expert, skill in SKILLS.items():
        right = sum(turn_of(expert, row["question"])["answer"] == row["answer"] for row in rows)
        assert abs(right / len(rows) - skill) < 0.03


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
    assert found.changed_by is not None

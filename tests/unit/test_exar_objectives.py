"""Objectives `exar` and `validator`: what is rendered, which text carries loss, and which rows are refused."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest

from stitch_ray.data.formats import convert
from stitch_ray.data.quarantine import BadRow
from stitch_ray.data.readers import SourceRow
from stitch_ray.exclusion.prompts import exclusion_prompt, validator_prompt
from stitch_ray.records import Example, Turn
from stitch_ray.training.objectives import Rendered, objective


def example(**record: Any) -> Example:
    return convert(SourceRow("rows.jsonl", 1, json.dumps(record), record, None))


def rendered(name: str, one: Example, seed: int = 0) -> list[Rendered]:
    return list(objective(name).render(one, Random(seed)))


def test_gold_is_the_answer_of_every_record_and_all_wrong_answers_share_one_prompt() -> None:
    one = example(question="Who?", answer=["gold", "also gold"], excluded=["b", "a", "b", " "])
    found = rendered("exar", one)
    assert [record.spans[-1].text for record in found] == ["gold"] * 3
    assert all([span.weight for span in record.spans] == [0.0, 1.0] for record in found)
    prompts = [record.spans[0].text for record in found]
    assert prompts[0] == "Who?"
    assert sorted(line for line in prompts[2].splitlines() if line.startswith("- ")) == ["- a", "- b"]
    assert sum(line.startswith("- ") for line in prompts[1].splitlines()) == 1
    assert {rendered("exar", one, seed)[2].spans[0].text for seed in range(9)} != {prompts[2]}


@pytest.mark.parametrize(("excluded", "records"), [([], 1), (["a"], 2), (["a", "b", "c"], 3)])
def test_as_many_records_as_there_is_to_learn(excluded: list[str], records: int) -> None:
    assert len(rendered("exar", example(question="Who?", answer="gold", excluded=excluded))) == records


def test_what_is_rendered_in_training_is_what_is_asked_in_use() -> None:
    found = rendered("exar", example(question="Who?", context="Then.", answer="gold", excluded=["a"]))[1]
    asked = exclusion_prompt((Turn("user", "Who?\n\nThen."),), ["a"])
    assert [Turn(str(span.role), span.text) for span in found.spans[:-1]] == list(asked)
    judged = rendered("validator", example(question="Who?", answer="she", verdict="WRONG"))[0]
    asked = validator_prompt((Turn("user", "Who?"),), "she")
    assert [Turn(str(span.role), span.text) for span in judged.spans[:-1]] == list(asked)


def test_the_verdict_carries_the_loss_and_its_weight() -> None:
    found = rendered("validator", example(question="Who?", answer="she", verdict="CORRECT", weight=2.5))
    assert [(span.text, span.weight, span.role) for span in found[0].spans[1:]] == [("CORRECT", 2.5, "assistant")]
    assert "she" in found[0].spans[0].text


def test_rows_that_would_teach_the_wrong_thing_are_refused() -> None:
    with pytest.raises(BadRow, match="to be given and excluded"):
        rendered("exar", example(question="Who?", answer="gold", excluded=["gold "]))
    with pytest.raises(BadRow, match="needs an answer and its verdict"):
        rendered("validator", example(question="Who?", answer="gold"))
    with pytest.raises(BadRow, match="field 'verdict' is 'INCORRECT'"):
        example(question="Who?", answer="she", verdict="INCORRECT")
    with pytest.raises(BadRow, match="field 'weight' is 0"):
        example(question="Who?", answer="she", verdict="WRONG", weight=0)
    with pytest.raises(BadRow, match="field 'excluded' item 2 is number"):
        example(question="Who?", answer="she", excluded=["a", 1])


def test_content_ids_tell_such_rows_apart_and_leave_others_as_they_were() -> None:
    plain = example(question="Who?", answer="she")
    assert plain.content_id == example(question="Who?", answer="she", excluded=[]).content_id
    others = [
        example(question="Who?", answer="she", excluded=["he"]),
        example(question="Who?", answer="she", verdict="WRONG"),
        example(question="Who?", answer="she", verdict="CORRECT"),
        example(question="Who?", answer="she", verdict="CORRECT", weight=2),
    ]
    assert len({one.content_id for one in [plain, *others]}) == 5
    assert len({one.group_id for one in [plain, *others]}) == 1

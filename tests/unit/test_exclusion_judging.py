"""What is said of a validator: against the rule and against people, in probabilities and in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from stitch_ray.exclusion.judging.pipeline import measure
from stitch_ray.exclusion.judging.preflight import Ready
from stitch_ray.exclusion.judging.worker import prompt_of
from stitch_ray.exclusion.prompts import validator_prompt
from stitch_ray.records import Turn

READY = cast(Ready, SimpleNamespace(config=SimpleNamespace(threshold=0.5, bootstrap=0, ece_bins=15, seed=0)))


def row(label: str, probability: float | None, reply: str | None, human: str | None = None) -> dict[str, Any]:
    return {"group_id": label, "label": label, "human": human, "probability": probability, "reply": reply}


def test_words_that_are_no_verdict_are_counted_and_never_right() -> None:
    rows = [
        row("CORRECT", 0.9, "CORRECT"),
        row("WRONG", 0.1, "wrong."),
        row("WRONG", 0.8, "INCORRECT"),  # the published parser takes this for CORRECT
        row("CORRECT", 0.2, None),
        row("CORRECT", None, "CORRECT"),  # not judged
    ]
    found = measure(rows, "label", READY)
    assert found is not None
    assert found["num"] == 4
    assert (found["tp"], found["fp"], found["fn"], found["tn"]) == (1, 1, 1, 1)
    assert found["replies"] == {"unparsable": 2, "accuracy": 0.5}


def test_people_are_compared_where_they_judged() -> None:
    rows = [row("CORRECT", 0.9, "CORRECT", "WRONG"), row("WRONG", 0.1, "WRONG"), row("WRONG", 0.2, "WRONG", "WRONG")]
    found = measure(rows, "human", READY)
    assert found is not None
    assert (found["num"], found["accuracy"], found["auroc"]) == (2, 0.5, None)
    assert measure([row("WRONG", 0.1, "WRONG")], "human", READY) is None


def test_the_prompt_is_that_of_training() -> None:
    expected = validator_prompt((Turn("user", "Who?\n\nThen."),), "she")
    assert prompt_of("Who?", "Then.", "she") == expected

"""How a training ended: which checkpoint becomes the model, and that it is remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.training.job import Outcome


def config(**sections: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"model": {"path": "m"}, "tasks": [{"name": "t", "data": "d"}], **sections})


@pytest.mark.parametrize("status", ["finished", "stopped_early"])
def test_with_early_stopping_the_best_checkpoint_is_the_model_however_it_ended(status: Any) -> None:
    stopping = config(early_stopping={"patience": 2}, split={"validation": 0.1})
    outcome = Outcome(status=status, step=9, total_steps=9, best_step=4, best_loss=0.5)
    assert outcome.model_step(stopping) == 4
    assert outcome.model_step(config()) == 9
    assert Outcome(status=status, step=9, total_steps=9).model_step(stopping) == 9  # nothing was validated


def test_an_outcome_is_remembered_as_it_was(tmp_path: Path) -> None:
    assert Outcome.read(tmp_path) is None
    outcome = Outcome(status="stopped_early", step=7, total_steps=9, best_step=5, best_loss=0.25, examples=("a", "b"))
    outcome.write(tmp_path)
    found = Outcome.read(tmp_path)
    assert found is not None
    assert (found.status, found.step, found.best_step, tuple(found.examples)) == ("stopped_early", 7, 5, ("a", "b"))

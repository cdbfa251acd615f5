"""The ready configurations of exar, and how a chain wires its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from stitch_ray.config import CONFIGS, load_config
from stitch_ray.config.exar import ExarRunConfig
from stitch_ray.config.loading import validate
from stitch_ray.errors import UserError
from stitch_ray.exclusion.chain.stages import Stages

ROOT = Path(__file__).parents[2]
CHAIN: dict[str, Any] = {"data": {"paths": ["qa.xlsx"], "fields": {"answer": "gold"}}, "model": {"path": "base"}}


def stages(**changes: Any) -> Stages:
    return Stages(validate(ExarRunConfig, {**CHAIN, **changes}, "chain"), Path("run"))


@pytest.mark.parametrize(("name", "job"), [("exar_run", "exar-run"), ("exar_refine", "exar-refine")])
def test_ready_configurations_are_valid_and_show_every_section(name: str, job: str) -> None:
    file = ROOT / "jobs" / "configs" / f"{name}.yaml"
    load_config(CONFIGS[job], file)
    shown = set(yaml.safe_load(file.read_text()))
    assert CONFIGS[job].model_fields.keys() - shown <= {"template", "sample_temperature"}


def test_every_stage_starts_from_the_one_before() -> None:
    made = stages()
    zero, validator, exar = made.stage_zero(), made.validator(), made.exar()
    assert zero is not None
    assert (zero.model.path, zero.tasks[0].fields) == ("base", {"answer": "gold"})
    assert validator.model.path == exar.model.path == "run/stages/stage-zero/model"
    assert [task.objective for task in exar.tasks] == ["exar", None]
    assert [task.objective for task in validator.tasks] == ["validator"]
    refine = made.refine()
    assert refine.model.path == "run/stages/exar/model"
    assert refine.validator.model is not None
    assert refine.validator.model.path == "run/stages/validator/model"
    assert refine.data.paths == ["run/questions/test.jsonl"]
    assert all(one.data.paths == ["run/questions/plus.jsonl"] for one in made.predictions().values())


def test_two_adapters_share_their_base_and_stage_zero_is_merged_for_them() -> None:
    lora = {"method": "lora"}
    refine = stages(stage_zero=lora, validator=lora, exar=lora).refine()
    assert refine.model.path == "run/stages/stage-zero-merged"
    assert (refine.adapters.answer, refine.adapters.validator) == (
        "run/stages/exar/model",
        "run/stages/validator/model",
    )
    mixed = stages(exar=lora).refine()
    assert (mixed.adapters.answer, mixed.adapters.validator) == ("run/stages/exar/model", None)
    assert mixed.validator.model is not None
    plain = stages(stage_zero=None, validator=lora).refine()
    assert plain.model.path == "run/stages/exar/model"
    assert stages(stage_zero=None).stage_zero() is None
    assert len(stages(stage_zero=None).exar().tasks) == 1


def test_training_runs_where_the_model_runs_unless_a_section_says_otherwise() -> None:
    made = stages(model={"path": "base", "num_gpus": 1, "num_threads": 2}, exar={"resources": {"num_gpus": 2}})
    assert (made.validator().resources.num_gpus, made.validator().resources.num_threads) == (1, 2)
    assert (made.exar().resources.num_gpus, made.exar().resources.num_threads) == (2, 2)


def test_controls_take_the_validators_place() -> None:
    made = stages(validator={"method": "lora"}, exar={"method": "lora"}, threshold=0.7)
    kinds = {name: made.refine(name) for name in ("oracle", "random", "always")}
    assert all(one.adapters.validator is None and one.adapters.answer for one in kinds.values())
    assert (kinds["oracle"].validator.kind, kinds["always"].validator.accept) == ("oracle", 1.0)
    assert (kinds["random"].validator.kind, kinds["always"].validator.kind) == ("random", "random")
    assert {one.validator.threshold for one in kinds.values()} == {0.7}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"validator": {"epoch": 3}}, "validator: epoch: unknown key"),
        ({"exar": {"tasks": []}}, "exar.tasks: the chain sets it"),
        ({"stage_zero": {"model": {"path": "x"}}}, "stage_zero.model.path: the chain sets it"),
    ],
)
def test_keys_that_a_stage_refuses_are_named_with_their_section(changes: Any, problem: str) -> None:
    made = stages(**changes)
    with pytest.raises(UserError, match=problem):
        made.stage_zero(), made.validator(), made.exar()


def test_the_split_leaves_something_for_stage_zero() -> None:
    with pytest.raises(UserError, match="leave nothing for stage zero"):
        stages(split={"test": 0.5, "plus": 0.5})

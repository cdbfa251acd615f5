"""The configuration of `finetune`: what is refused, what is filled in, and that the shipped ones are valid."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from stitch_ray.config import FinetuneConfig, load_config
from stitch_ray.config.loading import absolute_paths, validate
from stitch_ray.errors import UserError

CONFIGS = Path(__file__).parents[2] / "jobs" / "configs"
ONE = {"name": "a", "data": "a.json"}
TWO = [ONE, {"name": "b", "data": ["b.json", "c.json"]}]


def config(**sections: Any) -> FinetuneConfig:
    return validate(FinetuneConfig, {"model": {"path": "m"}, "tasks": [ONE], **sections}, "config")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"tasks": [ONE, ONE]}, "unique"),
        ({"adapter": {"rank": 4}}, "adapter has no effect with method: full"),
        ({"coba": {"tau": 3}}, "coba has no effect with loss: task_token_mean"),
        ({"loss": "coba"}, "needs at least two"),
        ({"loss": "coba", "tasks": TWO, "split": {"validation": 0}}, "needs split.validation above 0"),
        ({"loss": "coba", "tasks": TWO, "coba": {"warmup": 10, "history": 5}}, "at least coba.warmup"),
        (
            {"loss": "token_mean", "tasks": [{**ONE, "weight": 2}]},
            r"tasks\[\]\.weight has no effect with loss: token_mean",
        ),
        ({"mixing": {"weights": [1, 2]}}, "mixing.weights needs 1 positive"),
        ({"mixing": {"weights": [0.0]}}, "mixing.weights needs 1 positive"),
        ({"early_stopping": {}, "split": {"validation": 0}}, "early_stopping watches the validation loss"),
        ({"eval": {"generate": 3}, "split": {"validation": 0}}, "eval.generate asks validation questions"),
        ({"epochs": 2, "max_steps": 5}, "epochs or max_steps, not both"),
        ({"batch": {"tokens": 100}, "max_length": 200}, "cannot hold an example of max_length 200"),
        ({"batch": {"tokens": 100, "examples": 2}}, "batch.tokens or batch.examples, not both"),
        ({"workers": 0}, "workers must be"),
        ({"workers": [3, 2]}, "workers must be"),
        ({"zero": {"stage": 2, "offload": "all"}}, "needs zero.stage: 3"),
        ({"split": {"validation": 0.5, "test": 0.5}}, "nothing to train on"),
        ({"model": {"path": "m", "dtype": "float16"}}, "model.dtype"),
    ],
)
def test_what_contradicts_itself_or_has_no_effect_is_refused_with_the_key(
    sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        config(**sections)


@pytest.mark.parametrize(
    ("workers", "accumulation", "micro_batches"), [(1, 8, 8), (2, 4, 8), ([1, 4], 2, 8), ([2, 2], 1, 2)]
)
def test_a_step_has_as_many_micro_batches_with_few_workers_as_with_the_most(
    workers: Any, accumulation: int, micro_batches: int
) -> None:
    assert config(workers=workers, batch={"accumulation": accumulation}).micro_batches == micro_batches


def test_a_micro_batch_holds_max_length_tokens_unless_the_configuration_says_more() -> None:
    assert config(max_length=300).batch_tokens == 300
    assert config(max_length=300, batch={"tokens": 900}).batch_tokens == 900
    assert config(max_length=300, batch={"examples": 4}).batch_tokens is None
    assert config(max_length=300, batch={"tokens": 100}, packing=False).batch_tokens == 100


def test_data_may_be_one_path_or_several() -> None:
    assert [task.data for task in config(tasks=TWO).tasks] == [["a.json"], ["b.json", "c.json"]]


@pytest.mark.parametrize("sections", [{}, {"method": "lora", "adapter": {"rank": 4}}, {"max_steps": 3}, {"tasks": TWO}])
def test_the_resolved_configuration_reads_back_as_the_same(sections: dict[str, Any]) -> None:
    before = config(**sections)
    resolved = yaml.safe_load(yaml.safe_dump(before.model_dump(mode="json", exclude_none=True)))
    assert validate(FinetuneConfig, resolved, "config.yaml") == before


@pytest.mark.parametrize("file", sorted(path.name for path in CONFIGS.glob("finetune*.yaml")))
def test_the_shipped_configurations_are_valid(file: str) -> None:
    assert load_config(FinetuneConfig, CONFIGS / file).tasks


def test_selectit_s_recipe_has_its_128_examples_a_step() -> None:
    found = load_config(FinetuneConfig, CONFIGS / "finetune_selectit_llama.yaml")
    assert found.micro_batches * (found.batch.examples or 0) == 128


def test_paths_of_model_data_template_and_adapter_become_absolute(tmp_path: Path) -> None:
    for name in ("m", "adapter"):
        (tmp_path / name).mkdir()
    for name in ("a.json", "chat.jinja"):
        (tmp_path / name).touch()
    before = config(method="lora", adapter={"start_from": "adapter"}, tasks=[{**ONE, "template": "chat.jinja"}, TWO[1]])
    found = absolute_paths(before, tmp_path)
    assert found["model"]["path"] == f"{tmp_path}/m"
    assert found["adapter"]["start_from"] == f"{tmp_path}/adapter"
    assert found["tasks"][0]["data"] == [f"{tmp_path}/a.json"]
    assert found["tasks"][0]["template"] == f"{tmp_path}/chat.jinja"
    assert found["tasks"][1]["data"] == ["b.json", "c.json"]
    assert found["tasks"][1]["template"] == "chat"

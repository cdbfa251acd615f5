"""Configurations: what is refused and with which words, overrides, defaults, the schema."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from stitch_ray.api import as_config
from stitch_ray.config import CONFIGS, SelectConfig, load_config, parse_overrides
from stitch_ray.config.loading import absolute_paths, validate
from stitch_ray.errors import UserError

SMALLEST = {"data": {"paths": ["corpus.json"]}, "models": [{"path": "models/tiny"}]}

SMALLEST_FINETUNE = {"model": {"path": "models/tiny"}, "tasks": [{"name": "a", "data": "a.json"}]}

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def config(**sections: Any) -> SelectConfig:
    return SelectConfig.model_validate({**SMALLEST, **sections})


def models(*names: str) -> list[dict[str, str]]:
    return [{"path": name} for name in names]


def all_models(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A configuration and every section below it."""
    yield model
    for field in model.model_fields.values():
        for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from all_models(part)


# Reading the file


@pytest.mark.parametrize(
    ("text", "line", "key", "known"),
    [
        ("data: {paths: [a]}\nmodels: [{path: m}]\nratings: {}\n", 3, "ratings", "rating"),
        ("data: {paths: [a]}\nmodels: [{path: m}]\nrating:\n  # a\n  alhpa: 1\n", 5, "rating.alhpa", "alpha"),
        ("data:\n  paths: [a]\nmodels:\n  - path: m\n    dtpye: auto\n", 5, "models.0.dtpye", "dtype"),
        (
            "data: {paths: [a]}\nmodels: [{path: m}]\nselect:\n  diversity:\n    encoder: e\n    max_cosin: 1\n",
            6,
            "select.diversity.max_cosin",
            "encoder, max_cosine",
        ),
    ],
)
def test_an_unknown_key_names_file_line_and_the_known_keys(
    write: Write, text: str, line: int, key: str, known: str
) -> None:
    path = write(text)
    with pytest.raises(UserError) as error:
        load_config(SelectConfig, path)
    found = [line for line in str(error.value).splitlines() if "unknown key" in line]
    assert len(found) == 1
    assert found[0].startswith(f"{path}:{line}: {key}: unknown key; known here: ")
    assert known in found[0].partition("known here: ")[2]


def test_every_problem_is_reported_at_once_each_on_a_line_of_its_own(write: Write) -> None:
    path = write("data:\n  limit: 0\nmodels:\n  - path: m\n    dtype: int8\n")
    with pytest.raises(UserError) as error:
        load_config(SelectConfig, path)
    lines = str(error.value).splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        [f"{path}:1", "data.paths"],
        [f"{path}:2", "data.limit"],
        [f"{path}:5", "models.0.dtype"],
    ]
    assert lines[0].endswith("this key is required")


def test_a_rule_across_fields_is_reported_at_the_section_without_pydantic_wording(write: Write) -> None:
    path = write("data: {paths: [a]}\nmodels: [{path: m}]\nselect:\n  proportion: .5\n  count: 3\n")
    with pytest.raises(UserError) as error:
        load_config(SelectConfig, path)
    assert str(error.value) == f"{path}:3: select: give proportion or count, not both"


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "not valid YAML"), ("- 1\n", "mapping of keys, not list"), ("", "mapping of keys, not NoneType")],
)
def test_a_file_that_is_no_mapping_is_refused_by_name(write: Write, text: str, message: str) -> None:
    path = write(text)
    with pytest.raises(UserError, match=message) as error:
        load_config(SelectConfig, path)
    assert str(path) in str(error.value)


def test_a_missing_or_undecodable_file_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config(SelectConfig, tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff")
    with pytest.raises(UserError, match="cannot read the configuration"):
        load_config(SelectConfig, tmp_path / "latin.yaml")


def test_the_python_api_takes_a_mapping_a_file_or_a_configuration(write: Write) -> None:
    expected = config()
    assert as_config(SMALLEST, SelectConfig) == expected
    assert as_config(expected, SelectConfig) is expected
    assert as_config(str(write(yaml.safe_dump(SMALLEST))), SelectConfig) == expected
    with pytest.raises(UserError, match=r"^config: seeds: unknown key"):
        as_config({**SMALLEST, "seeds": 1}, SelectConfig)


# Overrides


def test_overrides_are_applied_after_the_file(write: Write) -> None:
    path = write("data: {paths: [a, b]}\nmodels: [{path: m}]\nrating: {alpha: 1}\n")
    found = load_config(
        SelectConfig,
        path,
        [
            "rating.alpha=0.5",
            "rating.mode=repo",
            "models.0.dtype=bfloat16",
            "data.paths.1=c",
            "select.count=7",
            "seed=3",
        ],
    )
    assert (found.rating.alpha, found.rating.mode, found.seed) == (0.5, "repo", 3)
    assert (found.models[0].dtype, found.data.paths, found.select.count) == ("bfloat16", ["a", "c"], 7)


def test_the_last_override_of_a_key_wins_and_null_restores_the_default(write: Write) -> None:
    path = write("data: {paths: [a], limit: 5}\nmodels: [{path: m}]\n")
    assert load_config(SelectConfig, path, ["seed=1", "seed=2", "data.limit=null"]).seed == 2
    assert load_config(SelectConfig, path, ["data.limit="]).data.limit is None


def test_values_are_yaml_and_only_the_first_equals_sign_separates() -> None:
    assert parse_overrides(["a.b=[1, x]", "c=a=b", "d='1'", "e={f: true}"]) == [
        (["a", "b"], [1, "x"]),
        (["c"], "a=b"),
        (["d"], "1"),
        (["e"], {"f": True}),
    ]


@pytest.mark.parametrize("override", ["rating.alpha", "=1", " =1"])
def test_an_override_without_key_or_value_shows_the_form(override: str) -> None:
    with pytest.raises(UserError, match="expected KEY=VALUE"):
        parse_overrides([override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("a=[1", r"--set a=\[1: the value is not valid YAML"),
        ("models.1.dtype=auto", "--set models.1.dtype: models has 1 entries, no '1'"),
        ("models.first.dtype=auto", "models has 1 entries, no 'first'"),
        ("models.-1.dtype=auto", "models has 1 entries, no '-1'"),
        ("models.².dtype=auto", "models has 1 entries, no '²'"),
        ("models.0.path.x=1", "models.0.path is a value, not a section"),
        ("seed.x=1", "seed is a value, not a section"),
    ],
)
def test_an_override_that_fits_nowhere_names_itself(write: Write, override: str, message: str) -> None:
    path = write("data: {paths: [a]}\nmodels: [{path: m}]\nseed: 1\n")
    with pytest.raises(UserError, match=message):
        load_config(SelectConfig, path, [override])


def test_an_unknown_key_from_an_override_is_refused_like_one_in_the_file(write: Write) -> None:
    with pytest.raises(UserError, match=r"rating\.alhpa: unknown key; known here: alpha"):
        load_config(SelectConfig, write(yaml.safe_dump(SMALLEST)), ["rating.alhpa=1"])


# Rules


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"models": models("a/m", "b/m")}, r"models\[\]\.name must be unique"),
        ({"rating": {"weights": [1, 2]}}, "rating.weights has 2 values for 1 models"),
        ({"rating": {"weights": "repo"}}, "exactly three models"),
        ({"rating": {"mode": "repo", "num_prompts": 4}}, "num_prompts equal to num_ratings"),
        ({"rating": {"token_prompt": 5}}, "token_prompt must be smaller"),
        ({"models": models("a", "b"), "select": {"level": "sentence"}}, "use level: model"),
        ({"select": {"proportion": 0.1, "count": 5}}, "proportion or count, not both"),
        ({"select": {"method": "diverse"}}, "go together"),
        ({"select": {"diversity": {"encoder": "e"}}}, "go together"),
        ({"models": [{"path": "m", "tensor_parallel": 2}]}, "tensor_parallel needs engine: vllm"),
        ({"models": [{"path": "m", "engine": "vllm", "tensor_parallel": 2, "num_gpus": 1}]}, "needs num_gpus: 2"),
        ({"models": [{"path": "m", "engine": "vllm", "batch_tokens": 9}]}, "batch_tokens has no effect"),
        ({"models": []}, "at least 1 item"),
        ({"data": {"paths": []}}, "at least 1 item"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(**sections)


@pytest.mark.parametrize(
    "sections",
    [
        {"models": models("a", "b", "c"), "rating": {"weights": "repo"}},
        {"models": models("a", "b"), "rating": {"weights": [0.4, 0.6]}, "select": {"level": "model"}},
        {"models": models("a", "b"), "select": {"level": "token"}},
        {"models": [{"path": "a/m", "name": "one"}, {"path": "b/m", "name": "two"}]},
        {"models": [{"path": "m", "engine": "vllm", "tensor_parallel": 2, "num_gpus": 2}]},
        {"rating": {"token_prompt": 4}},
        {"rating": {"mode": "repo", "num_prompts": 3, "num_ratings": 3}},
        {"select": {"method": "diverse", "diversity": {"encoder": "e"}}},
    ],
)
def test_the_same_settings_within_the_rules_are_taken_as_they_are(sections: dict[str, Any]) -> None:
    def missing(found: Any, given: Any, place: str) -> list[str]:
        if isinstance(given, dict):
            return [problem for key in given for problem in missing(found[key], given[key], f"{place}.{key}")]
        if isinstance(given, list):
            pairs = zip(found, given, strict=True)
            return [problem for k, (one, other) in enumerate(pairs) for problem in missing(one, other, f"{place}.{k}")]
        return [] if found == given else [place]

    assert missing(config(**sections).model_dump(), sections, "config") == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rating.num_ratings", 1),
        ("rating.num_ratings", 10),
        ("rating.num_prompts", 0),
        ("rating.alpha", -0.1),
        ("rating.alpha", float("nan")),
        ("rating.alpha", float("inf")),
        ("rating.weights", [float("nan")]),
        ("rating.layout", "prompt_last"),
        ("select.proportion", 0),
        ("select.proportion", 1.01),
        ("select.count", 0),
        ("data.max_bad_fraction", 1.5),
        ("data.limit", 0),
        ("report.examples", 51),
    ],
)
def test_values_out_of_range_are_refused_with_their_key(key: str, value: object) -> None:
    section, _, name = key.partition(".")
    values = {**SMALLEST, section: {**SMALLEST.get(section, {}), name: value}}  # type: ignore[dict-item]
    with pytest.raises(UserError, match=rf"config: {key}"):
        validate(SelectConfig, values, "config")


@pytest.mark.parametrize("key", ["parameters", "num_gpus"])
def test_an_infinite_size_is_refused(key: str) -> None:
    with pytest.raises(ValidationError, match="finite"):
        config(models=[{"path": "m", key: float("inf")}])


# Defaults


def test_two_lines_are_a_whole_configuration(write: Write) -> None:
    found = load_config(SelectConfig, write("data: {paths: [corpus.json]}\nmodels: [{path: models/tiny}]\n"))
    assert found == config()
    assert (found.select.proportion, found.select.count, found.select.method) == (0.2, None, "score")
    assert (found.rating.layout, found.rating.mode, found.rating.alpha) == ("prompt_first", "paper", 0.2)
    assert (found.rating.num_prompts, found.rating.num_ratings, found.seed) == (5, 5, 0)
    assert (found.data.format, found.models[0].engine) == ("auto", "transformers")


def test_a_section_with_other_keys_keeps_the_default_proportion_and_a_count_replaces_it() -> None:
    assert config(select={"method": "random"}).select.proportion == 0.2
    assert config(select={"proportion": None}).select.proportion == 0.2
    assert config(select={"count": 9}).select.proportion is None


@pytest.mark.parametrize(
    ("path", "name"), [("a/b", "b"), ("a/b/", "b"), ("m", "m"), ("owner/Model-1.5B_x", "Model-1.5B_x")]
)
def test_a_model_is_named_after_the_last_part_of_its_path(path: str, name: str) -> None:
    assert config(models=[{"path": path}]).models[0].name == name
    assert config(models=[{"path": path, "name": ""}]).models[0].name == name


@pytest.mark.parametrize("name", ["a/b", "..", "a b", "-x"])
def test_a_model_name_is_fit_for_a_file_name(name: str) -> None:
    with pytest.raises(ValidationError, match=r"models\.0\.name"):
        config(models=[{"path": "m", "name": name}])


def test_the_deciding_level_follows_from_the_number_of_models_unless_it_is_given() -> None:
    assert config().level == "sentence"
    assert config(models=models("a", "b")).level == "model"
    assert config(models=models("a", "b"), select={"level": "token"}).level == "token"


def test_a_loaded_configuration_does_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        config().seed = 1  # type: ignore[misc]


# What editors and other machines get


@pytest.mark.parametrize("job", sorted(CONFIGS))
def test_every_field_of_every_section_has_a_description_of_one_line(job: str) -> None:
    missing = [
        f"{model.__name__}.{name}"
        for model in all_models(CONFIGS[job])
        for name, field in model.model_fields.items()
        if not field.description or "\n" in field.description
    ]
    assert missing == []


@pytest.mark.parametrize("job", sorted(CONFIGS))
def test_the_json_schema_is_valid_refuses_unknown_keys_and_takes_the_smallest_configuration(job: str) -> None:
    schema = CONFIGS[job].model_json_schema()
    checker = jsonschema.validators.validator_for(schema)
    checker.check_schema(schema)
    smallest = {
        "select": SMALLEST,
        "finetune": SMALLEST_FINETUNE,
        "sample-answers": {"data": {"paths": ["questions.json"]}, "model": {"path": "models/tiny"}},
        "train-scorer": {"answers": ["answers.jsonl"], "signals": ["perplexity"]},
        "calibrate": {"answers": ["answers.jsonl"]},
        "predict": {"data": {"paths": ["questions.json"]}, "ensemble": {"primary": {"model": {"path": "models/tiny"}}}},
        "serve": {
            "ensemble": {"primary": {"model": {"path": "models/tiny"}}},
            "scorer": "runs/scorer",
            "policy": "runs/policy",
        },
        "exar-merge": {"answers": ["runs/labelled"]},
        "exar-refine": {"data": {"paths": ["questions.json"]}, "model": {"path": "models/tiny"}},
        "exar-evaluate": {"refine": "runs/refine"},
        "exar-judge": {"answers": ["runs/labels"], "model": {"path": "models/tiny"}},
        "exar-run": {"data": {"paths": ["questions.json"]}, "model": {"path": "models/tiny"}},
    }[job]
    assert checker(schema).is_valid(smallest)
    assert not checker(schema).is_valid({**smallest, "ratings": {}})
    assert not checker(schema).is_valid({**smallest, "seed": "no number"})
    for key in schema.get("required", []):
        assert not checker(schema).is_valid({name: value for name, value in smallest.items() if name != key})


def test_paths_that_exist_become_absolute_and_names_of_remote_things_stay(tmp_path: Path) -> None:
    for folder in ("models/tiny", "encoder", "data", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("corpus.json", "data/a.jsonl", "prompts.txt"):
        (tmp_path / file).touch()
    outside = os.fspath(tmp_path / "corpus.json")
    found = absolute_paths(
        config(
            data={"paths": ["corpus.json", "data/*.jsonl", "./data/../corpus.json", "hf://owner/name", outside]},
            models=[{"path": "models/tiny"}, {"path": "owner/model"}],
            rating={"prompts": "prompts.txt"},
            select={"method": "diverse", "diversity": {"encoder": "encoder"}},
        ),
        tmp_path,
    )
    assert found["data"]["paths"] == [outside, f"{tmp_path}/data/*.jsonl", outside, "hf://owner/name", outside]
    assert [model["path"] for model in found["models"]] == [f"{tmp_path}/models/tiny", "owner/model"]
    assert found["rating"]["prompts"] == f"{tmp_path}/prompts.txt"
    assert found["select"]["diversity"]["encoder"] == f"{tmp_path}/encoder"


def test_a_configuration_made_absolute_reads_back_as_the_same_settings(tmp_path: Path) -> None:
    before = config(models=models("a", "b"), rating={"weights": [1, 2]}, select={"count": 3})
    assert SelectConfig.model_validate(yaml.safe_load(yaml.safe_dump(absolute_paths(before, tmp_path)))) == before

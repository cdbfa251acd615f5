"""YAML file + `--set` overrides -> a validated configuration, with errors that name file, line and key."""

from __future__ import annotations

import glob as globbing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from stitch_ray.config.base import Strict
from stitch_ray.errors import UserError

Config = TypeVar("Config", bound=BaseModel)


def load_config(model: type[Config], path: Path | str, overrides: Sequence[str] = ()) -> Config:
    """Read `path`, apply `overrides` (`a.b=value`, `models.0.dtype=bfloat16`) and validate. Raises UserError."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {error}") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of keys, not {type(values).__name__}")
    lines = _key_lines(text)
    for keys, value in parse_overrides(overrides):
        _assign(values, keys, value)
    return validate(model, values, str(path), lines)


def validate(model: type[Config], values: Mapping[str, Any], source: str, lines: Mapping[str, int] = {}) -> Config:
    """`values` as a configuration; each problem is a line of the UserError, with its key and line in `source`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"])
            line = _nearest_line(key, lines)
            where = f"{source}:{line}" if line else source
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                message = f"unknown key; known here: {', '.join(_known_keys(model, problem['loc']))}"
            elif problem["type"] == "missing":
                message = "this key is required"
            problems.append(f"{where}: {key}: {message}" if key else f"{where}: {message}")
        raise UserError("\n".join(problems)) from error


def parse_overrides(overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    """`a.b=value` -> (["a", "b"], value parsed as YAML). Raises UserError."""
    parsed = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key.strip():
            raise UserError(f"--set {override}: expected KEY=VALUE, such as --set rating.alpha=0.5")
        try:
            parsed.append((key.strip().split("."), yaml.safe_load(text)))
        except yaml.YAMLError as error:
            raise UserError(f"--set {override}: the value is not valid YAML") from error
    return parsed


def absolute_paths(config: Strict, base: Path) -> dict[str, Any]:
    """The configuration as plain values, local paths made absolute against `base`: fit for another directory."""
    values = config.model_dump(mode="json", exclude_none=True)
    for key in config.PATHS:
        _make_absolute(values, key.split("."), base)
    return values


def _make_absolute(values: Any, keys: Sequence[str], base: Path) -> None:
    """Follow `keys` ("*": every entry of a list or mapping) and replace what is there by its absolute path, if it is a file."""
    key, *rest = keys
    everywhere = list(values) if isinstance(values, dict) else range(len(values))
    places = everywhere if key == "*" else [key] if key in values else []
    for place in places:
        if rest:
            _make_absolute(values[place], rest, base)
        elif isinstance(values[place], str):
            values[place] = _absolute(values[place], base)


def _absolute(text: str, base: Path) -> str:
    local = base / text
    known = local.exists() or bool(globbing.glob(str(local)))
    return str(local.resolve()) if known and "://" not in text else text


def _assign(values: Any, keys: Sequence[str], value: Any) -> None:
    path = ".".join(keys)
    for position, key in enumerate(keys):
        last = position == len(keys) - 1
        if isinstance(values, list):
            if not key.isdecimal() or int(key) >= len(values):
                raise UserError(f"--set {path}: {'.'.join(keys[:position])} has {len(values)} entries, no {key!r}")
            if last:
                values[int(key)] = value
            else:
                values = values[int(key)]
        elif isinstance(values, dict):
            if last:
                values[key] = value
            else:
                if values.get(key) is None:
                    values[key] = {}
                values = values[key]
        else:
            raise UserError(f"--set {path}: {'.'.join(keys[:position])} is a value, not a section")


def _key_lines(text: str) -> dict[str, int]:
    """Dotted key -> its line, counted from 1."""
    lines: dict[str, int] = {}

    def walk(node: yaml.Node | None, prefix: str) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                name = f"{prefix}{key.value}"
                lines[name] = key.start_mark.line + 1
                walk(value, f"{name}.")
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[f"{prefix}{index}"] = value.start_mark.line + 1
                walk(value, f"{prefix}{index}.")

    walk(yaml.compose(text, Loader=yaml.SafeLoader), "")
    return lines


def _nearest_line(key: str, lines: Mapping[str, int]) -> int | None:
    while key:
        if key in lines:
            return lines[key]
        key = key.rpartition(".")[0]
    return None


def _known_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in location[:-1]:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        if field is None:
            return []
        arguments = [field.annotation, *getattr(field.annotation, "__args__", ())]
        models = [a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)]
        if not models:
            return []
        current = models[0]
    return sorted(current.model_fields)

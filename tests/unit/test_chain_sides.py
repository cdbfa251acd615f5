"""The data of a chain in three: every usable row on one side, a question always on the same one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stitch_ray.config.base import DataConfig
from stitch_ray.config.exar import ExarChainSplitConfig
from stitch_ray.data.splits import split_of
from stitch_ray.errors import UserError
from stitch_ray.exclusion.chain.sides import side_of, write_sides
from stitch_ray.exclusion.chain.stages import SIDES
from stitch_ray.records import content_hash

GROUPS = [content_hash(number) for number in range(4000)]


def split(**values: Any) -> ExarChainSplitConfig:
    return ExarChainSplitConfig.model_validate(values)


def data(file: Path, **values: Any) -> DataConfig:
    return DataConfig.model_validate({"paths": [str(file)], **values})


def source(folder: Path, *rows: Any, name: str = "qa.jsonl") -> Path:
    (folder / name).write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return folder / name


def qa(number: int, answer: str = "yes") -> dict[str, str]:
    return {"question": f"Question {number}?", "answer": answer}


def files(folder: Path) -> dict[str, Path]:
    return {name: folder / "sides" / f"{name}.jsonl" for name in SIDES}


def written(folder: Path) -> dict[str, list[dict[str, str]]]:
    return {name: [json.loads(line) for line in file.read_text().splitlines()] for name, file in files(folder).items()}


def test_the_shares_are_met_and_a_larger_test_side_takes_nothing_back() -> None:
    small, large = ([side_of(group, split(test=test, plus=0.4)) for group in GROUPS] for test in (0.2, 0.3))
    for name, share in (("test", 0.2), ("plus", 0.4), ("zero", 0.4)):
        assert abs(small.count(name) / len(GROUPS) - share) < 4 * (share * (1 - share) / len(GROUPS)) ** 0.5
    assert all(after == "test" for before, after in zip(small, large, strict=True) if before == "test")


def test_what_is_tested_on_here_is_tested_on_in_every_job_of_the_project() -> None:
    config = split(test=0.2, plus=0.4)
    tested = [group for group in GROUPS if side_of(group, config) == "test"]
    assert tested == [group for group in GROUPS if split_of(group, 0, 0.2, config.salt) == "test"]
    other = [group for group in GROUPS if side_of(group, split(salt="another")) == "test"]
    assert tested != other


def test_every_usable_row_is_on_the_side_of_its_question_as_it_is(tmp_path: Path) -> None:
    rows = [qa(number % 40, f"answer {number}") for number in range(80)]
    file = source(tmp_path, *rows)
    counts, bad = write_sides([str(file)], data(file), split(), files(tmp_path))
    found = written(tmp_path)
    assert counts == {name: len(found[name]) for name in SIDES}
    assert bad == []
    assert sorted(json.dumps(row) for part in found.values() for row in part) == sorted(map(json.dumps, rows))
    questions = [{row["question"] for row in part} for part in found.values()]
    assert len(set.union(*questions)) == sum(map(len, questions)) == 40


def test_neither_the_order_of_rows_nor_of_files_changes_a_byte(tmp_path: Path) -> None:
    rows = [qa(number) for number in range(60)]
    for name, sources in (
        ("one", [source(tmp_path, *rows)]),
        ("two", [source(tmp_path, *rows[30:][::-1], name="b.jsonl"), source(tmp_path, *rows[:30], name="a.jsonl")]),
    ):
        write_sides([str(file) for file in sources], data(sources[0]), split(), files(tmp_path / name))
    for name in SIDES:
        assert files(tmp_path / "one")[name].read_bytes() == files(tmp_path / "two")[name].read_bytes()


def test_unusable_rows_are_told_and_on_no_side(tmp_path: Path) -> None:
    rows = [qa(number) for number in range(40)]
    file = source(tmp_path, *rows[:20], {"question": "Without an answer?"}, "{half", *rows[20:])
    counts, bad = write_sides([str(file)], data(file), split(), files(tmp_path))
    assert counts.total() == 40
    assert [row.line for row in bad] == [21, 22]


def test_the_limit_is_over_all_sources_and_counts_unusable_rows(tmp_path: Path) -> None:
    first = source(tmp_path, *[qa(number) for number in range(30)], "{half", name="a.jsonl")
    second = source(tmp_path, *[qa(number) for number in range(30, 60)], name="b.jsonl")
    counts, bad = write_sides([str(first), str(second)], data(first, limit=50), split(), files(tmp_path))
    assert (counts.total(), len(bad)) == (49, 1)


def test_a_side_without_a_question_is_refused_with_the_first_unusable_row(tmp_path: Path) -> None:
    file = source(tmp_path, qa(1), {"question": "Without an answer?"})
    with pytest.raises(
        UserError, match=r"split: no question for \w+ among 1 rows; .*qa\.jsonl:2: missing field 'answer'"
    ):
        write_sides([str(file)], data(file, format="question_answer"), split(), files(tmp_path))

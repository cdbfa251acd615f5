"""Workbooks as records: cells are text, and a header that cannot name its columns is refused."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from openpyxl import Workbook

from stitch_ray.config.base import DataConfig
from stitch_ray.data.corpus import read_source
from stitch_ray.data.readers import expand, iter_rows
from stitch_ray.data.workbook import sheet_rows
from stitch_ray.errors import UserError


def book(path: Path, **sheets: list[list[Any]]) -> str:
    made = Workbook()
    made.remove(made.active)
    for name, rows in sheets.items():
        page = made.create_sheet(name)
        for row in rows:
            page.append(row)
    made.save(path)
    return str(path)


def test_cells_are_text_as_they_are_written(tmp_path: Path) -> None:
    cells = ["None", "nan", "NA", None, 1806, 0.1, 3.0, True, datetime.date(1806, 2, 1), " kept "]
    source = book(tmp_path / "a.xlsx", one=[[f"c{n}" for n in range(len(cells))], cells])
    [row] = sheet_rows(source)
    assert list(row.record.values()) == ["None", "nan", "NA", "", "1806", "0.1", "3", "TRUE", "1806-02-01", " kept "]
    assert (row.sheet, row.number) == ("one", 2)


def test_sheets_follow_one_another_and_blank_rows_are_none(tmp_path: Path) -> None:
    rows: list[list[Any]] = [["q", "a"], ["x", "y"], [None, None], ["z"]]
    source = book(tmp_path / "a.xlsx", first=rows, second=[["q", "a"], ["u", "v"]])
    found = [(row.sheet, row.number, row.record) for row in sheet_rows(source)]
    assert found == [
        ("first", 2, {"q": "x", "a": "y"}),
        ("first", 4, {"q": "z", "a": ""}),
        ("second", 2, {"q": "u", "a": "v"}),
    ]
    assert [row.sheet for row in sheet_rows(source, "second")] == ["second"]
    with pytest.raises(UserError, match=r"has no sheet 'third'; its sheets: first, second"):
        list(sheet_rows(source, "third"))


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (["q", "q"], "its first row names 'q' twice"),
        (["q", None, "a"], "column 2 has no name"),
        (["q"], "row 2 has a value in a column that the first row does not name"),
    ],
)
def test_a_header_that_does_not_name_the_columns_is_refused(tmp_path: Path, header: list[Any], problem: str) -> None:
    source = book(tmp_path / "a.xlsx", page=[header, ["x", "y", "z"]])
    with pytest.raises(UserError, match=f"a.xlsx: sheet 'page': .*{problem}"):
        list(iter_rows(source))


def test_a_workbook_is_data_like_any_other_under_the_names_it_has(tmp_path: Path) -> None:
    source = book(tmp_path / "qa.xlsx", page=[["Question", "answer_text"], ["Who?", "None"], ["When?", None]])
    config = DataConfig.model_validate({"paths": [source], "fields": {"question": "Question", "answer": "answer_text"}})
    [(good, bad)] = list(read_source(expand([source])[0], config))
    assert [(one.messages[0].content, one.references) for one in good] == [("Who?", ("None",))]
    assert [(row.line, row.reason) for row in bad] == [(2, "empty response: field 'answer'")]
    other = config.model_copy(update={"fields": {"answer": "gold"}})
    [(_, bad)] = list(read_source(source, other))
    assert bad[0].reason == "missing column 'gold'; there are Question, answer_text"


def test_a_file_that_is_no_workbook_names_itself(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("question,answer\n")
    with pytest.raises(UserError, match=r"a.xlsx: cannot be read past record 0"):
        list(iter_rows(str(tmp_path / "a.xlsx")))

"""Excel workbooks (.xlsx) as records: the first row of every sheet names the fields, every further row is one record."""

from __future__ import annotations

import datetime
import warnings
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

from stitch_ray.errors import UserError


@dataclass(frozen=True, slots=True)
class SheetRow:
    """`number` is the row as a spreadsheet counts it: the first record of a sheet is row 2."""

    sheet: str
    number: int
    record: dict[str, str]


def sheet_rows(source: str, sheet: str | None = None) -> Iterator[SheetRow]:
    """The records of all sheets in their order, or of the one called `sheet`; rows without any value are passed over.

    Cells are text: "None", "nan" and "NA" stay what they are, an empty cell is "", a number is written as short as it
    can be told from every other (1806, 0.1), a formula is the value it was saved with.
    Raises UserError for a missing sheet, and for a first row that leaves a filled column without a name or repeats one.
    """
    from openpyxl import load_workbook

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of styles and extensions, none of which holds a value
        with closing(load_workbook(source, read_only=True, data_only=True)) as book:
            if sheet is not None and sheet not in book.sheetnames:
                raise UserError(f"{source}: has no sheet {sheet!r}; its sheets: {', '.join(book.sheetnames)}")
            for page in book.worksheets:
                if sheet is None or page.title == sheet:
                    yield from _page_rows(f"{source}: sheet {page.title!r}", page)


def _page_rows(place: str, page: object) -> Iterator[SheetRow]:
    fields: list[str] | None = None
    for number, cells in enumerate(page.iter_rows(values_only=True), start=1):  # type: ignore[attr-defined]
        texts = [_text(cell) for cell in cells]
        if fields is None:
            fields = _fields(place, texts)
            continue
        if not any(texts):
            continue
        if any(texts[len(fields) :]):
            raise UserError(f"{place}: row {number} has a value in a column that the first row does not name")
        texts += [""] * (len(fields) - len(texts))
        yield SheetRow(page.title, number, dict(zip(fields, texts, strict=False)))  # type: ignore[attr-defined]


def _fields(place: str, texts: list[str]) -> list[str]:
    names = [text.strip() for text in texts]
    while names and not names[-1]:
        names.pop()
    if names and not names[0]:
        names[0] = "index"  # pandas writes one there, without a name
    if "" in names:
        raise UserError(f"{place}: its first row must name every column; column {names.index('') + 1} has no name")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{place}: its first row names {twice[0]!r} twice")
    return names


def _text(cell: object) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "TRUE" if cell else "FALSE"
    if isinstance(cell, float) and cell.is_integer() and abs(cell) < 1e15:
        return str(int(cell))
    if isinstance(cell, datetime.datetime) and cell.time() == datetime.time():
        return cell.date().isoformat()
    if isinstance(cell, datetime.date | datetime.time):
        return cell.isoformat()
    return str(cell)

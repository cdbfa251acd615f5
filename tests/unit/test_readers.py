import datetime
import gzip
import json
import subprocess
import sys

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stitch_ray.data.readers import SourceRow, expand, iter_rows
from stitch_ray.errors import UserError

RECORDS = [
    {"instruction": 'Di "l\'«été» \\"ici\\"" 你好 👩‍🚀', "input": "", "output": "a\tb\n"},
    {"instruction": "q\u2028r", "n": -1, "x": 1.5, "big": 10**30, "flags": [True, None, {"deep": [[]]}]},
]
JSON_LINES = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in RECORDS)
COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: pa.compress(data, "zstd", asbytes=True)}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return str(path)

    return write


def records(source):
    return [row.record for row in iter_rows(source)]


def errors(source):
    return [(row.line, row.error) for row in iter_rows(source) if row.error is not None]


def broken(source):
    with pytest.raises(UserError) as caught:
        list(iter_rows(source))
    assert str(caught.value).startswith(source)
    return str(caught.value)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("indent", [None, 2])
def test_json_array_yields_its_records_in_order(write, ending, indent):
    text = json.dumps(RECORDS, ensure_ascii=False, indent=indent)
    source = write(f"data.json{ending}", COMPRESS[ending](text.encode()))
    rows = list(iter_rows(source))
    assert [row.record for row in rows] == RECORDS
    assert [row.line for row in rows] == [1, 2]
    assert [row.raw for row in rows] == JSON_LINES.rstrip("\n").split("\n")


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["data.jsonl", "data.ndjson", "really_lines.json"])
def test_json_lines_yield_each_line_as_it_stands(write, name, ending):
    source = write(name + ending, COMPRESS[ending](JSON_LINES.encode()))
    rows = list(iter_rows(source))
    assert rows == [
        SourceRow(source, line, raw, record, None)
        for line, (raw, record) in enumerate(zip(JSON_LINES.rstrip("\n").split("\n"), RECORDS, strict=True), start=1)
    ]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_compressed_files_of_several_members_are_read_to_the_end(write, ending):
    assert len(records(write(f"data.jsonl{ending}", COMPRESS[ending](JSON_LINES.encode()) * 3))) == 6


def test_bad_lines_are_rows_with_an_error_and_blank_ones_count(write):
    source = write("data.jsonl", b'{"a": 1}\r\n\n  \n{"a": \n[1]\n7\nnull\n{"a": "\xff"}\n{"a": 2}')
    rows = list(iter_rows(source))
    assert [(row.line, row.record) for row in rows if row.error is None] == [(1, {"a": 1}), (9, {"a": 2})]
    assert rows[0].raw == '{"a": 1}'
    assert rows[1].raw == '{"a": '
    assert rows[1].error.startswith("invalid JSON: Expecting value")
    assert errors(source)[1:] == [
        (5, "row is of type list, expected an object"),
        (6, "row is of type int, expected an object"),
        (7, "row is of type NoneType, expected an object"),
        (8, "invalid UTF-8 at byte 8 of the line"),
    ]
    assert all(row.record is None for row in rows if row.error is not None)


def test_line_nested_too_deeply_is_only_its_own_error(write):
    source = write("data.jsonl", '{"a": ' + "[" * 100_000 + '\n{"a": 1}\n')
    assert [line for line, _ in errors(source)] == [1]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "lines.json"])
def test_byte_order_mark_is_no_part_of_the_data(write, name):
    text = json.dumps(RECORDS) if name == "data.json" else JSON_LINES
    source = write(name, b"\xef\xbb\xbf" + text.encode())
    rows = list(iter_rows(source))
    assert [row.record for row in rows] == RECORDS
    assert rows[0].raw.startswith("{")


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_nan_and_infinity_are_numbers(write, name):
    line = '{"a": NaN, "b": [Infinity, -Infinity, 1e400]}'
    (row,) = iter_rows(write(name, f"[{line}]" if name == "data.json" else line))
    assert str(row.record) == "{'a': nan, 'b': [inf, -inf, inf]}"
    assert row.raw.startswith('{"a": NaN')


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_lone_surrogate_is_kept_and_raw_can_be_written_as_utf8(write, name):
    line = r'{"a": "x\ud83dy", "b": "\ud83d\ude00"}'
    (row,) = iter_rows(write(name, f"[{line}]" if name == "data.json" else line))
    assert row.record == {"a": "x\ud83dy", "b": "😀"}
    assert json.loads(row.raw.encode("utf-8")) == row.record


def test_numbers_of_an_array_are_int_and_float(write):
    (record,) = records(write("data.json", '[{"i": 1, "f": 1.10}]'))
    assert {key: type(value) for key, value in record.items()} == {"i": int, "f": float}


def test_rows_of_an_array_that_are_no_objects_are_errors(write):
    source = write("data.json", '[{"a": 1}, [2], 3, "four", null, {"a": 5}]')
    assert records(source) == [{"a": 1}, None, None, None, None, {"a": 5}]
    assert [line for line, _ in errors(source)] == [2, 3, 4, 5]


def test_invalid_utf8_in_an_array_is_only_its_rows_error(write):
    source = write("data.json", b'[{"a": "\xff"}, {"a": "\xc3\xa9"}]')
    assert errors(source) == [(1, "invalid UTF-8 in the record")]
    assert records(source)[1] == {"a": "é"}


@pytest.mark.parametrize("indent", [None, 2])
def test_object_around_one_list_of_objects_yields_the_list(write, indent):
    wrapped = {"version": 1, "tags": ["x"], "data": RECORDS, "meta": {"rows": [{}]}}
    source = write("data.json", json.dumps(wrapped, indent=indent))
    assert records(source) == RECORDS
    assert [row.line for row in iter_rows(source)] == [1, 2]


def test_object_around_two_lists_of_objects_is_refused(write):
    assert "'train' and 'test'" in broken(write("data.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}'))


@pytest.mark.parametrize("record", [{"instruction": "q", "tags": ["x"]}, {"conversations": [{"value": "q"}]}])
@pytest.mark.parametrize("indent", [None, 2])
def test_single_object_is_one_record(write, record, indent):
    assert records(write("data.json", json.dumps(record, indent=indent))) == [record]


@pytest.mark.parametrize("text", ["[]", " [ ] \n"])
def test_empty_array_has_no_rows(write, text):
    assert records(write("data.json", text)) == []


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("", 1),
        ("plain text", 1),
        ('[{"a": 1}, {"a": 2', 2),
        ('[{"a": 1}, {"a": "2', 2),
        ('[{"a": 1}, {"a": 2}', 3),
        ('[{"a": 1}, {"a": 2},]', 3),
        ('[{"a": 1}, {"a": 2} {"a": 3}]', 3),
        ('[{"a": 1}, {"a": tru}, {"a": 3}]', 2),
        ('[{"a": 1}] trailing', 2),
        ('{"data": [{"a": 1}, {"a": 2}', 3),
        ('{"data": [{"a": 1}], 3: 4}', 2),
    ],
)
def test_broken_json_names_the_record_and_keeps_the_rows_before_it(write, text, position):
    source = write("data.json", text)
    assert f"broken at record {position}," in broken(source)
    rows = iter_rows(source)
    assert [next(rows).record for _ in range(position - 1)] == [{"a": 1}, {"a": 2}][: position - 1]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_truncated_or_foreign_compressed_file_is_refused(write, ending, kind):
    many = [{"n": n, "text": str(n * 7919)} for n in range(5000)]
    text = json.dumps(many) if kind == "json" else "".join(json.dumps(record) + "\n" for record in many)
    data = COMPRESS[ending](text.encode())
    assert "Truncated" in broken(write(f"cut.{kind}{ending}", data[:-9]))
    position = "broken at record 1" if kind == "json" else "cannot be read past line 0"
    assert position in broken(write(f"foreign.{kind}{ending}", b"not compressed"))


def test_parquet_rows_count_on_through_row_groups(tmp_path):
    source = str(tmp_path / "data.parquet")
    many = [{"n": n, "text": f"é{n}", "turns": [{"value": None}]} for n in range(700)]
    pq.write_table(pa.Table.from_pylist(many), source, row_group_size=300)
    rows = list(iter_rows(source))
    assert [row.record for row in rows] == many
    assert [row.line for row in rows] == list(range(1, 701))
    assert rows[1].raw == json.dumps(many[1], ensure_ascii=False)


def test_parquet_dates_are_text_in_raw_and_bytes_are_an_error(tmp_path):
    source = str(tmp_path / "data.parquet")
    pq.write_table(pa.table({"d": [datetime.date(2024, 2, 29)] * 2, "b": [None, b"\x00"]}), source)
    first, second = iter_rows(source)
    assert first.raw == '{"d": "2024-02-29", "b": null}'
    assert (second.record, second.error) == (None, "row has no JSON form: a value is of type bytes; drop that column")


def test_broken_parquet_is_refused(write):
    assert "cannot be read past record 0: ArrowInvalid" in broken(write("data.parquet", b"PAR1 and no more"))


def test_saved_dataset_is_one_source_and_its_splits_are_chained(tmp_path):
    single, both = str(tmp_path / "single"), str(tmp_path / "both")
    train, test = datasets.Dataset.from_list([{"a": "é"}] * 2), datasets.Dataset.from_list([{"a": 3}])
    test.with_format("numpy").save_to_disk(single)
    datasets.DatasetDict({"train": train, "test": train}).save_to_disk(both)
    assert sorted(expand([single, both, str(tmp_path)])) == [both, single]
    assert records(single) == [{"a": 3}]
    assert [(row.line, row.record["a"]) for row in iter_rows(both)] == [(line, "é") for line in (1, 2, 3, 4)]


def test_hub_dataset_is_streamed_and_its_failure_is_explained(monkeypatch):
    calls = []

    def load_dataset(name, **options):
        calls.append((name, options))
        if name.endswith("private"):
            raise ConnectionError("offline")
        split = datasets.Dataset.from_list([{"a": 1}]).to_iterable_dataset()
        return split if options["split"] else datasets.IterableDatasetDict({"train": split, "test": split})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert expand(["hf://owner/name:test"]) == ["hf://owner/name:test"]
    assert records("hf://owner/name:test") == [{"a": 1}]
    assert [row.line for row in iter_rows("hf://owner/name")] == [1, 2]
    assert calls == [("owner/name", {"split": split, "streaming": True}) for split in ("test", None)]
    assert "ConnectionError: offline" in broken("hf://owner/private")


def test_expand_keeps_the_order_and_names_each_source_once(write, tmp_path):
    a, b, c = write("a.jsonl.gz", b""), write("b.json", "[]"), write("c.parquet", b"")
    for name in ("README.md", ".hidden.json", "data.csv", "x.parquet.gz"):
        write(name, "")
    (tmp_path / "sub").mkdir()
    nested = write("sub/[1].json", "[]")
    assert expand([str(tmp_path)]) == [a, b, c]
    assert expand([c, f"{tmp_path}/./b.json", str(tmp_path)]) == [c, f"{tmp_path}/./b.json", a]
    assert expand([f"{tmp_path}/**/*.json"]) == [b, nested]
    assert expand([nested]) == [nested]


@pytest.mark.parametrize("path", ["missing.json", "*.nothing", "hf://only_a_name", "notes.txt", "empty"])
def test_path_that_gives_no_data_is_named(write, tmp_path, path):
    write("notes.txt", "")
    (tmp_path / "empty").mkdir()
    path = path if path.startswith("hf://") else str(tmp_path / path)
    with pytest.raises(UserError) as caught:
        expand([path])
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing.json", "no such file or directory"),
        ("notes.txt", "unknown kind of file; readable are .json,"),
        ("empty", "unknown kind of file; readable are .json,"),
    ],
)
def test_source_that_is_no_data_file_is_named_with_what_would_be_one(write, tmp_path, name, reason):
    write("notes.txt", "")
    (tmp_path / "empty").mkdir()
    assert reason in broken(str(tmp_path / name))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    rows=st.lists(st.dictionaries(st.text(), JSON_VALUES, max_size=4), max_size=6),
    options=st.fixed_dictionaries({"ensure_ascii": st.booleans(), "indent": st.sampled_from([None, 1])}),
    chunk=st.integers(1, 40),
)
def test_any_array_survives_the_way_through_a_file_in_pieces_of_any_size(write, monkeypatch, rows, options, chunk):
    monkeypatch.setattr("stitch_ray.data.readers._CHUNK", chunk)
    source = write("data.json", json.dumps(rows, **options))
    assert records(source) == rows
    assert [json.loads(row.raw) for row in iter_rows(source)] == rows


@pytest.mark.parametrize("chunk", range(1, 12))
def test_numbers_and_wrappers_are_whole_wherever_the_text_is_cut(write, monkeypatch, chunk):
    monkeypatch.setattr("stitch_ray.data.readers._CHUNK", chunk)
    assert [row.raw for row in iter_rows(write("numbers.json", "[123456, -1.5e3]"))] == ["123456", "-1500.0"]
    assert records(write("wrapped.json", '{"data" : [  {"a": 1}, {"a": 2}]}')) == [{"a": 1}, {"a": 2}]


MEASURE = """
import resource, sys
from stitch_ray.data.readers import iter_rows
rows = sum(row.error is None for row in iter_rows(sys.argv[1]))
print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_array_larger_than_the_memory_allowed_is_read_within_it(tmp_path):
    path = tmp_path / "large.json"
    block = ",\n".join(json.dumps({"instruction": f"é{n}", "output": "word " * 400}) for n in range(500))
    num_blocks = 520
    with path.open("w", encoding="utf-8") as file:
        file.write("[" + block)
        for _ in range(num_blocks - 1):
            file.write("," + block)
        file.write("]")
    assert path.stat().st_size > 500e6
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    num_rows, peak_mb = map(int, done.stdout.split())
    assert num_rows == 500 * num_blocks
    assert peak_mb < 500

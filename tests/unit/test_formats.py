import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch_ray.data.formats import FORMATS, convert, detect
from stitch_ray.data.quarantine import BadRow
from stitch_ray.data.readers import SourceRow, expand, iter_rows
from stitch_ray.errors import UserError
from stitch_ray.records import Turn
from tests import needs

QUESTION = 'Què vol dir "l\'«été» \\"ici\\"" 你好 👩‍🚀?\n'
ANSWER = '\tÉs "l\'estiu".  '

GOOD = {
    "alpaca": {"instruction": QUESTION, "input": "", "output": ANSWER},
    "dolly": {"instruction": QUESTION, "context": "", "response": ANSWER},
    "prompt_completion": {"prompt": QUESTION, "completion": ANSWER},
    "question_answer": {"question": QUESTION, "answer": ANSWER},
    "judged_answer": {"question": QUESTION, "answer": ANSWER, "verdict": "WRONG"},
    "sharegpt": {
        "conversations": [
            {"from": "system", "value": ""},
            {"from": "human", "value": QUESTION},
            {"from": "gpt", "value": ANSWER},
        ]
    },
    "messages": {
        "messages": [
            {"role": "system", "content": ""},
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER},
        ]
    },
    "chatml": {
        "text": f"<|im_start|>system\n<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n"
        f"<|im_start|>assistant\n{ANSWER}<|im_end|>\n"
    },
}


def row(record):
    return SourceRow("data.json", 7, json.dumps(record), record, None)


def reason(record, format="auto", **options):
    with pytest.raises(BadRow) as caught:
        convert(row(record), format, **options)
    return str(caught.value)


def user(content="q"):
    return {"role": "user", "content": content}


def assistant(content="a"):
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("name", FORMATS)
def test_text_of_every_format_is_kept_exactly(name):
    example = convert(row(GOOD[name]), name)
    system = () if example.messages[0].role == "user" else (Turn("system", ""),)
    assert example.messages == (*system, Turn("user", QUESTION), Turn("assistant", ANSWER))
    assert len(system) == (name in ("sharegpt", "messages", "chatml"))
    assert (example.source, example.line, example.raw) == ("data.json", 7, json.dumps(GOOD[name]))


@pytest.mark.parametrize("name", FORMATS)
def test_format_is_told_by_the_fields_alone(name):
    assert detect([GOOD[name]]) == name
    assert convert(row(GOOD[name])) == convert(row(GOOD[name]), name)


@pytest.mark.parametrize("name", FORMATS)
def test_null_columns_that_parquet_fills_in_do_not_change_the_format(name):
    every_column = {field: None for record in GOOD.values() for field in record}
    record = {**every_column, **GOOD[name]}
    assert detect([record]) == name
    assert convert(row(record)).messages == convert(row(GOOD[name])).messages


def test_sample_of_several_formats_is_left_to_each_record():
    assert detect([GOOD["alpaca"], {"noise": 1}, GOOD["messages"]]) == "auto"


def test_sample_that_fits_no_format_names_the_fields_seen_and_the_formats_known():
    with pytest.raises(UserError, match=r"Seen: bar, foo\. .*alpaca.*question_answer"):
        detect([{"foo": 1}, {"bar": 2}])
    with pytest.raises(UserError, match="text"):
        detect([{"text": "plain prose is not ChatML"}])


def test_unknown_format_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"'alpacca'.*auto, alpaca, sharegpt"):
        convert(row(GOOD["alpaca"]), "alpacca")


def test_error_of_the_reader_is_the_reason():
    with pytest.raises(BadRow, match="invalid JSON: no"):
        convert(SourceRow("data.jsonl", 1, "{", None, "invalid JSON: no"))


@pytest.mark.parametrize(("name", "field"), [("alpaca", "input"), ("dolly", "context"), ("question_answer", "context")])
def test_optional_field_becomes_context_and_empty_or_null_is_none(name, field):
    assert convert(row({**GOOD[name], field: " given "})).context == " given "
    absent = convert(row({key: value for key, value in GOOD[name].items() if key != field}))
    for nothing in ("", " \n", None):
        example = convert(row({**GOOD[name], field: nothing}))
        assert example.context is None
        assert example.content_id == absent.content_id
    assert reason({**GOOD[name], field: ["x"]}) == f"field '{field}' is list, expected text"


def test_selectit_files_without_speakers_take_turns():
    record = {"conversations": [{"value": "one"}, {"value": "two"}, {"value": "three"}, {"value": "four"}]}
    assert [turn.role for turn in convert(row(record)).messages] == ["user", "assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        *((name, "user") for name in ("human", "user")),
        *((name, "assistant") for name in ("gpt", "chatgpt", "bard", "bing", "assistant", "function_call")),
        *((name, "tool") for name in ("tool", "function", "observation")),
        ("system", "system"),
    ],
)
def test_speakers_map_to_the_four_roles(speaker, role):
    start = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
    record = {"conversations": [*start, {"from": speaker, "value": "x"}]}
    assert convert(row(record)).messages[2] == Turn(role, "x")


def test_parts_of_text_are_joined_as_they_stand():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    assert convert(row({"messages": [user(parts), assistant()]})).messages[0] == Turn("user", "one two")


def test_all_answers_are_references_and_the_first_is_the_response():
    example = convert(row({"question": "q", "answer": ["a", "b"]}))
    assert example.messages[1] == Turn("assistant", "a")
    assert example.references == ("a", "b")
    assert convert(row(GOOD["question_answer"])).references == (ANSWER,)


def test_completion_may_be_called_response():
    assert convert(row({"prompt": "q", "completion": None, "response": "a"})).messages[1] == Turn("assistant", "a")


def test_task_and_own_id_come_from_the_usual_fields():
    labelled = convert(row({**GOOD["dolly"], "category": "open_qa", "uid": 7, "id": "", "example_id": None}))
    assert (labelled.task, labelled.own_id) == ("open_qa", "7")
    first = convert(row({**GOOD["alpaca"], "task": "t", "category": "c", "dataset": "d", "id": "a", "uid": "b"}))
    assert (first.task, first.own_id) == ("t", "a")
    of_other_types = convert(row({**GOOD["alpaca"], "dataset": 3, "id": 1.5, "uid": True}))
    assert (of_other_types.task, of_other_types.own_id) == (None, None)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "q"}, "missing field 'output'"),
        ({"instruction": "q", "output": None}, "field 'output' is null, expected text"),
        ({"instruction": "q", "output": ["a"]}, "field 'output' is list, expected text"),
        ({"instruction": "q", "output": 4}, "field 'output' is number, expected text"),
        ({"instruction": "q", "output": " \n\t"}, "empty response: field 'output'"),
        ({"instruction": " ", "output": "a"}, "empty instruction: field 'instruction'"),
        ({"instruction": "q", "output": "a\x00"}, "field 'output' has the control character U+0000 at character 2"),
        (
            {"instruction": "q\x1b[0m", "output": "a"},
            "field 'instruction' has the control character U+001B at character 2",
        ),
        ({"instruction": "q", "output": "\ud83d"}, "field 'output' has the lone surrogate U+D83D at character 1"),
        (
            {"instruction": "q", "output": "a", "id": "\udc00"},
            "field 'id' has the lone surrogate U+DC00 at character 1",
        ),
        ({"instruction": "q", "response": {}}, "field 'response' is object, expected text"),
        ({"prompt": "q"}, "missing field 'completion' or 'response'"),
        ({"question": "q", "answer": []}, "empty response: field 'answer' is an empty list"),
        ({"question": "q", "answer": ["a", 4]}, "field 'answer 2' is number, expected text"),
        ({"question": "q", "answer": [" "]}, "empty response: field 'answer 1'"),
        ({"messages": []}, "conversation has no assistant turn"),
        ({"messages": [user()]}, "conversation has no assistant turn"),
        ({"messages": [assistant(), user()]}, "turn 1 is an assistant turn before any user turn"),
        ({"messages": [user(), assistant(""), user()]}, "empty response in turn 2"),
        ({"messages": [user(""), assistant()]}, "empty instruction in turn 1"),
        ({"messages": [user(), {"role": "judge", "content": "x"}]}, "turn 2: unknown role 'judge'"),
        ({"messages": [user(), {"role": "assistant"}]}, "turn 2: missing field 'content'"),
        ({"messages": {"role": "user"}}, "field 'messages' is object, expected list"),
        ({"messages": [[user(), assistant()]]}, "wrong nesting: turn 1 is list, expected object"),
        (
            {"messages": [user(), {**assistant(), "tool_calls": [{}]}]},
            "turn 2 calls tools, which a turn of text cannot hold",
        ),
        ({"messages": [user([{"type": "image_url"}])]}, "turn 1 part 1 is not an object of type 'text'"),
        ({"conversations": [{"from": "human", "value": "q"}, {"value": "a"}]}, "turn 2: missing field 'from'"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turn 1: field 'value' is number, expected text"),
        ({"foo": 1, "bar": 2}, "fields fit no known format: bar, foo"),
    ],
)
def test_reason_says_what_is_wrong_with_the_record(record, expected):
    assert reason(record) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<|im_start|>user\nq<|im_end|> stray <|im_start|>assistant\na<|im_end|>", "wrong nesting: text outside"),
        ("<|im_start|>user\nq<|im_end|><|im_start|>assistant\na", "wrong nesting: text outside"),
        ("<|im_start|>user\n<|im_start|>assistant\na<|im_end|>", "wrong nesting: block 1"),
        ("<|im_start|>user q<|im_end|>", "wrong nesting: block 1"),
        ("<|im_start|>narrator\nq<|im_end|>", "block 1: unknown role 'narrator'"),
        ("no markup at all", "wrong nesting: text outside"),
    ],
)
def test_chatml_that_is_not_closed_blocks_is_rejected(text, expected):
    assert reason({"text": text}, "chatml").startswith(expected)


def test_length_is_limited_over_the_whole_example():
    record = {"instruction": "q" * 4, "input": "c" * 3, "output": "a" * 3}
    assert convert(row(record), max_characters=10) == convert(row(record))
    assert reason(record, max_characters=9) == "example is 10 characters long, more than the 9 allowed"
    several = {"question": "q" * 4, "answer": ["a" * 3, "b" * 3]}
    assert convert(row(several), max_characters=10) == convert(row(several))
    assert "10 characters" in reason(several, max_characters=9)
    assert "1,000,002 characters" in reason({"prompt": "q", "completion": "a" * 1_000_001})


@given(st.text(min_size=1), st.text(min_size=1), st.text())
def test_any_text_is_either_kept_exactly_or_rejected(question, answer, context):
    record = {"instruction": question, "input": context, "output": answer}
    control = any(char < " " and char not in "\t\n\r" for char in question + answer + context)
    if control or not question.strip() or not answer.strip():
        words = "empty|has the control character" if control else "empty"
        assert re.search(words, reason(record))
        return
    example = convert(row(record))
    assert example.messages == (Turn("user", question), Turn("assistant", answer))
    assert example.context == (context if context.strip() else None)


def test_real_files_give_the_known_counts():
    alpaca = [convert(found) for found in iter_rows(str(needs.real_data("instructions", "alpaca_en_1k.json")))]
    assert (len(alpaca), len({example.content_id for example in alpaca})) == (999, 985)

    rows = [
        found
        for source in expand([str(needs.real_data("alpaca_eval") / "*/model_outputs.json")])
        for found in iter_rows(source)
    ]
    reasons = []
    for found in rows:
        try:
            convert(found)
        except BadRow as error:
            reasons.append(str(error))
    assert len(rows) == 3218
    assert reasons == ["empty response: field 'output'"] * 2

"""Preparing training data: splits, counts that add up, and files that depend on the rows alone."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.data import formats, readers
from stitch_ray.data.splits import split_of
from stitch_ray.errors import UserError
from stitch_ray.training import prepare as preparation
from stitch_ray.training.dataset import TokenDataset
from stitch_ray.training.prepare import Prepared, build, validation_examples

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

Record = dict[str, Any]
FILES = ("train.arrow", "validation.arrow", "test.jsonl")
SALT = "tests"
MAX_LENGTH = 160


def side(question: str) -> str:
    record = {"instruction": question, "output": "x"}
    example = formats.convert(readers.SourceRow("", 1, json.dumps(record), record, None))
    return split_of(example.group_id, 0.2, 0.15, SALT)


def training_question(text: str) -> str:
    """`text` with the first number behind it that puts it on the side of training."""
    return next(question for n in range(1000) if side(question := f"{text} {n}") == "train")


SHARED = [f"How long is river {n}?" for n in range(12)]
OVERLONG = {"instruction": training_question("Count"), "output": "one two three " * 200}
ENDLESS = {"instruction": training_question("word " * 300), "output": "Done."}
NO_SYSTEM = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": training_question("Sum up")},
        {"role": "assistant", "content": "Done."},
    ]
}


def facts() -> list[Record]:
    rows = [{"instruction": f"Name city {n}.", "input": f"Country {n}", "output": f"City {n}."} for n in range(60)]
    rows += [{"instruction": question, "output": "Very long."} for question in SHARED]
    return [*rows, rows[0], OVERLONG, ENDLESS, {"instruction": "Without an answer", "output": ""}]


def sums() -> list[Record]:
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(40)]
    return [*rows, *({"question": question, "answer": "9 km"} for question in SHARED)]


@pytest.fixture
def prepare(tmp_path: Path, tiny_model: Path) -> Callable[..., Prepared]:
    """Prepares two tasks; files of records can be given in place of the usual ones."""

    def run(
        name: str = "data",
        tasks: dict[str, list[list[Record]]] | None = None,
        task: Record | None = None,
        **settings: Any,
    ) -> Prepared:
        listed = []
        for number, (task_name, files) in enumerate((tasks or {"facts": [facts()], "sums": [sums()]}).items()):
            paths = []
            for part, records in enumerate(files):
                path = tmp_path / name / f"{number}-{part}.jsonl"
                path.parent.mkdir(exist_ok=True)
                path.write_text("".join(json.dumps(record) + "\n" for record in records))
                paths.append(str(path))
            listed.append({"name": task_name, "data": paths, **(task or {})})
        values = {
            "model": {"path": str(tiny_model)},
            "tasks": listed,
            "max_length": MAX_LENGTH,
            "split": {"validation": 0.2, "test": 0.15, "salt": SALT},
            **settings,
        }
        return build(tmp_path / f"prepared-{name}", FinetuneConfig(**values), str(tiny_model))

    return run


def contents(rows: TokenDataset) -> list[tuple[int, str, list[int], list[float]]]:
    return [
        (int(rows.task_ids[row]), rows.example_ids[row], rows.tokens(row)[0].tolist(), rows.tokens(row)[1].tolist())
        for row in range(len(rows))
    ]


def test_every_row_is_accounted_for(prepare: Callable[..., Prepared], tiny_model: Path) -> None:
    found = prepare()
    assert list(found.tasks) == ["facts", "sums"]
    rows_in = {"facts": 76, "sums": 52}
    for number, (name, counts) in enumerate(found.tasks.items()):
        assert counts.rows_in == rows_in[name]
        kept = counts.train + counts.validation + counts.test
        assert counts.rows_in == kept + counts.quarantined + counts.dropped
        assert min(counts.train, counts.validation, counts.test) > 0
        of_task = found.train.task_ids == number
        assert counts.train == counts.train_records == int(of_task.sum())
        assert counts.tokens == int(found.train.lengths[of_task].sum())
        assert counts.loss_tokens == int(found.train.loss_weights[of_task].sum())
        assert counts.validation == int((found.validation.task_ids == number).sum())
    facts_counts, sums_counts = found.tasks.values()
    assert (facts_counts.quarantined, facts_counts.dropped, facts_counts.truncated) == (1, 1, 1)
    assert (sums_counts.quarantined, sums_counts.dropped, sums_counts.truncated) == (0, 0, 0)
    (bad,) = found.quarantined
    assert (Path(bad.source).name, bad.line) == ("0-0.jsonl", 76)
    assert "empty response" in bad.reason
    assert found.train.lengths.max() == MAX_LENGTH == found.max_length
    for row in range(len(found.train)):
        assert found.train.tokens(row)[1][0] == 0
        assert found.train.tokens(row)[1].sum() > 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [tokenizer.decode(found.train.tokens(row)[0]) for row in range(len(found.train))]
    assert any("Name city" in text and "Country" in text for text in texts), "instruction and input"


def test_exact_repeats_are_rows_of_their_own(prepare: Callable[..., Prepared]) -> None:
    row = {"instruction": training_question("Twice"), "output": "Yes."}
    found = prepare(tasks={"one": [[row, row, row]]})
    first = found.train.example_ids[0]
    assert list(found.train.example_ids) == [first, f"{first}-2", f"{first}-3"]


def test_the_files_depend_on_the_rows_alone(prepare: Callable[..., Prepared], monkeypatch: pytest.MonkeyPatch) -> None:
    first = prepare()
    shuffled = facts()
    random.Random(1).shuffle(shuffled)
    monkeypatch.setattr(preparation, "_ROWS_A_PIECE", 7)
    other = prepare("other", {"facts": [shuffled[:5], shuffled[5:50], shuffled[50:]], "sums": [sums()[::-1]]})
    for name in FILES:
        assert (first.folder / name).read_bytes() == (other.folder / name).read_bytes(), name
    assert first.tasks == other.tasks


def test_a_question_is_on_one_side_in_all_tasks_and_as_data_is_added(prepare: Callable[..., Prepared]) -> None:
    found = prepare()
    examples = list(validation_examples(found, prepare_config(found)))
    held_out = {example.messages[0].content for _, example in examples}
    tested = [json.loads(line) for line in found.test_file.read_text().splitlines()]
    for question in SHARED:
        tasks = {task for task, example in examples if example.messages[0].content == question}
        assert tasks == ({0, 1} if side(question) == "validation" else set())
        tasks = {record["task"] for record in tested if question in (record.get("instruction"), record.get("question"))}
        assert tasks == ({"facts", "sums"} if side(question) == "test" else set())
    half = prepare("half", {"facts": [facts()[::2]], "sums": [sums()[::2]]})
    of_half = {example.messages[0].content for _, example in validation_examples(half, prepare_config(half))}
    assert of_half < held_out


def prepare_config(found: Prepared) -> FinetuneConfig:
    tasks = [{"name": name, "data": "unused"} for name in found.tasks]
    return FinetuneConfig(model={"path": "unused"}, tasks=tasks)


def test_validation_examples_are_those_of_the_validation_file(prepare: Callable[..., Prepared]) -> None:
    found = prepare()
    examples = list(validation_examples(found, prepare_config(found)))
    assert [number for number, _ in examples] == found.validation.task_ids.tolist()
    assert [example.content_id for _, example in examples] == list(found.validation.example_ids)


def test_the_test_split_is_written_as_it_was_read(prepare: Callable[..., Prepared]) -> None:
    records = {"one": [[{"question": f"Is {n} odd?", "answer": "Ω", "x": {"n": n}} for n in range(40)]]}
    found = prepare(tasks=records)
    written = [json.loads(line) for line in found.test_file.read_text("utf-8").splitlines()]
    assert len(written) == found.tasks["one"].test > 0
    assert all(
        {**record, "task": "one"} in written for record in records["one"][0] if side(record["question"]) == "test"
    )


def test_a_finished_folder_is_used_and_an_unfinished_one_made_anew(prepare: Callable[..., Prepared]) -> None:
    first = prepare()
    before = {name: (first.folder / name).stat().st_mtime_ns for name in FILES}
    again = prepare()
    assert {name: (first.folder / name).stat().st_mtime_ns for name in FILES} == before
    assert again.tasks == first.tasks
    assert again.quarantined == first.quarantined
    bytes_before = (first.folder / "train.arrow").read_bytes()
    (first.folder / preparation.MARKER).unlink()
    (first.folder / "train.arrow").write_bytes(b"torn")
    (first.folder / "pieces").mkdir()
    (first.folder / "pieces" / "leftover").touch()
    made = prepare()
    assert (made.folder / "train.arrow").read_bytes() == bytes_before
    assert not (made.folder / "pieces").exists()


def test_overlong_rows_are_dropped_where_that_was_asked_for(prepare: Callable[..., Prepared]) -> None:
    counts = prepare(overlong="drop").tasks["facts"]
    assert (counts.dropped, counts.truncated) == (2, 0)
    assert counts.rows_in == counts.train + counts.validation + counts.test + counts.quarantined + counts.dropped


def test_rows_that_a_template_refuses_are_quarantined_with_the_reason(
    prepare: Callable[..., Prepared], tmp_path: Path
) -> None:
    template = tmp_path / "no-system.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ m.content + ('\n' if m.role == 'user' else eos_token) }}{% endfor %}"
    )
    rows = [{"instruction": training_question(f"Q{n}"), "output": "A"} for n in range(5)]
    found = prepare(tasks={"one": [[*rows, NO_SYSTEM]]}, task={"template": str(template)})
    (bad,) = found.quarantined
    assert (bad.line, bad.reason) == (6, f"template {template} refuses the conversation: no system role")
    assert bad.example_id
    assert bad.excerpt.startswith('{"messages"')
    with pytest.raises(
        UserError, match=r"tasks\.one: 1 of 6 rows cannot be used, more than max_bad_fraction 0\.1.*:6:"
    ):
        prepare("strict", {"one": [[*rows, NO_SYSTEM]]}, task={"template": str(template)}, max_bad_fraction=0.1)


def test_a_task_without_a_training_row_is_an_error_that_names_it(prepare: Callable[..., Prepared]) -> None:
    good = [{"instruction": training_question("Q"), "output": "A"}]
    with pytest.raises(UserError, match=r"tasks\.empty: no row to train on: of 1 rows .* 1 are longer than max_length"):
        prepare(tasks={"full": [good], "empty": [[ENDLESS]]})
    with pytest.raises(UserError, match=r"tasks\.bad: no usable row in .*; the first: .*:1: empty response"):
        prepare(tasks={"full": [good], "bad": [[{"instruction": "Q", "output": " "}]]})


def test_a_task_without_validation_rows_shows_in_the_counts(prepare: Callable[..., Prepared]) -> None:
    good = [{"instruction": training_question("Q"), "output": "A"}]
    found = prepare(tasks={"one": [good]})
    assert (found.tasks["one"].validation, len(found.validation)) == (0, 0)
    assert list(validation_examples(found, prepare_config(found))) == []


def test_a_template_that_does_not_suit_training_is_told_before_any_data_is_read(
    prepare: Callable[..., Prepared], tmp_path: Path
) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text("{% for m in messages %}{{ m.content + '\n' }}{% endfor %}")
    with pytest.raises(UserError, match=r"tasks\.facts: template .*endless\.jinja writes no mark behind an answer"):
        prepare(task={"template": str(template)})
    assert not (tmp_path / "prepared-data").exists()


def test_several_records_of_a_row_are_one_row_of_the_counts(
    prepare: Callable[..., Prepared], tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs the Ray task's function in this process, where an objective can be put in place of SFT."""
    from stitch_ray.training.objectives import SFT, Rendered, Span

    drawn: dict[str, list[float]] = {}

    class Both(SFT):
        def render(self, example: Any, rng: random.Random) -> Any:
            drawn.setdefault(example.content_id, []).append(rng.random())
            yield from super().render(example, rng)
            yield Rendered((Span("Again: "), Span(example.messages[-1].content * 100, 1.0)))

    rows = [{"instruction": training_question(f"Q{n}"), "output": "A."} for n in range(3)]
    found = prepare(tasks={"one": [rows]}, overlong="drop")
    config = FinetuneConfig(
        model={"path": str(tiny_model)},
        tasks=[{"name": "one", "data": "unused"}],
        overlong="drop",
        split={"validation": 0, "salt": SALT},
    )
    (corpus_file,) = (found.folder / "corpus").glob("*/rows/**/*.parquet")
    monkeypatch.setattr(preparation, "objective", lambda name: Both())
    template = AutoTokenizer.from_pretrained(tiny_model).chat_template
    for max_length, expected in ((4096, (3, 6, 0)), (MAX_LENGTH, (3, 3, 3))):
        job = preparation._Job(0, config, str(tiny_model), template, max_length)
        piece = preparation._Piece(found.folder / "again", 0, corpus_file, 0, ("a", "b", "c"))
        preparation._encode_piece(piece, job)
        counts = json.loads((piece.path / "counts.json").read_text())["counts"]
        assert (counts["train"], counts["train_records"], counts["truncated"]) == expected
    assert all(np.ptp(numbers) == 0 for numbers in drawn.values()), "chance depends on the content alone"
    assert len({numbers[0] for numbers in drawn.values()}) == 3
    ids = TokenDataset.open(piece.path / "train.arrow").example_ids
    assert list(ids) == ["a", "b", "c"]

"""From corpus rows to the questions that are asked: one file a planned batch, written before anything is asked.

A row's question is all its turns before the last answer, as in fine-tuning, and the answer is a reference (unless the
row brings references of its own). Rows that ask the same, but for case and white space, are one question with the
references of all of them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stitch_ray.batch_files import batch_file
from stitch_ray.data.corpus import Corpus, example_ids, messages_of
from stitch_ray.data.quarantine import BadRow, Quarantined
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.records import MESSAGES_TYPE, Example, Turn, question_group
from stitch_ray.reliability.answers.plan import Planned, batch_sizes, plan_batches, plan_table
from stitch_ray.runs import atomic_path, fresh_folder, write_json
from stitch_ray.training.objectives import SFT

ASKED_TWICE = "question asked twice"

QUESTION_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("group_id", pa.string()),
        ("asked", pa.string()),
        ("task", pa.string()),
        ("turns", MESSAGES_TYPE),
        ("question", pa.string()),
        ("context", pa.string()),
        ("references", pa.list_(pa.string())),
        ("tokens", pa.int32()),
        ("source", pa.string()),
        ("line", pa.int64()),
    ]
)
_PREPARED_SCHEMA = QUESTION_SCHEMA.append(pa.field("problem", pa.string())).append(pa.field("raw", pa.string()))
_MARKER = "questions.json"
_ROWS_A_GROUP = 1024


@dataclass(frozen=True, slots=True)
class Question:
    """One question. `turns` is the prompt; `question` its last user turn, and `context` what stands before that.

    `asked` is the hash of normalised question and context; `group_id` is that of the first question of a conversation,
    the unit of splits. `tokens` are those of the prompt, None where a server answers.
    """

    example_id: str
    group_id: str
    asked: str
    task: str | None
    turns: tuple[Turn, ...]
    question: str
    context: str | None
    references: tuple[str, ...]
    tokens: int | None
    source: str
    line: int


@dataclass(frozen=True, slots=True)
class Prompter:
    """What it takes to render a prompt anywhere. `template` is the Jinja text: nodes may not have its file."""

    tokenizer: str
    template: str
    source: str
    trust_remote_code: bool = False

    def chat_template(self) -> ChatTemplate:
        """The template with its tokenizer, loaded once a process."""
        return _chat_template(self)


@dataclass(frozen=True, slots=True)
class Questions:
    """The planned questions of a run: files by batch, and what became of the other rows."""

    folder: Path
    sizes: tuple[int, ...]
    dropped: Mapping[str, int]
    quarantined: tuple[Quarantined, ...]

    def __len__(self) -> int:
        return sum(self.sizes)

    def file(self, batch_id: int) -> Path:
        return batch_file(self.folder, batch_id)


@lru_cache(maxsize=4)
def _chat_template(prompter: Prompter) -> ChatTemplate:
    from stitch_ray.engines.pretrained import load_tokenizer

    tokenizer = load_tokenizer(prompter.tokenizer, trust_remote_code=prompter.trust_remote_code)
    return ChatTemplate(tokenizer, prompter.template, prompter.source)


def question_of(example: Example, example_id: str) -> Question:
    """The question of an example. Raises BadRow if there is none."""
    turns = SFT().question(example)
    if turns is None:
        raise BadRow("no answer whose question could be asked")
    turns, answer = turns[:-1], turns[-1].content
    last = max((number for number, turn in enumerate(turns) if turn.role == "user"), default=None)
    if last is None:
        raise BadRow("no user turn before the answer")
    earlier = [f"{turn.role}: {turn.content}" for turn in example.messages[: len(turns)]]
    del earlier[last]
    context = "\n".join([*earlier, *([example.context] if example.context else [])]) or None
    question = example.messages[last].content
    return Question(
        example_id=example_id,
        group_id=example.group_id,
        asked=question_group(question, context),
        task=example.task,
        turns=turns,
        question=question,
        context=context,
        references=example.references or ((answer,) if answer else ()),
        tokens=None,
        source=example.source,
        line=example.line,
    )


def prompt_ids(turns: Sequence[Turn], template: ChatTemplate) -> tuple[int, ...]:
    """Token ids of a conversation up to where the answer begins. Raises BadRow if the template does not take it."""
    text = template.render(turns, add_generation_prompt=True)
    return tuple(template.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def plan_questions(
    folder: Path, plan: Path, corpus: Corpus, prompter: Prompter | None, least_rows: int = 32
) -> Questions:
    """Write the questions of `corpus` by batch below `folder`, or open what is there already. Needs a Ray session.

    `prompter` renders and counts; None: a server does. `least_rows` is the size of a batch of small data. Raises
    UserError if two different records carry the same id.
    """
    if not plan.exists() or not (folder / _MARKER).exists():
        prepared = fresh_folder(folder.with_name(f"{folder.name}-prepared"))
        _prepare(prepared, corpus, prompter)
        _write_batches(folder, plan, [prepared / file.name for file in corpus.files], least_rows)
        shutil.rmtree(prepared)
    sizes = batch_sizes(pq.read_table(plan))
    marker = json.loads((folder / _MARKER).read_text("utf-8"))
    quarantined = tuple(Quarantined(**row) for row in marker["quarantined"])
    return Questions(folder, tuple(sizes), marker["dropped"], quarantined)


def read_questions(file: Path) -> list[Question]:
    """The questions of one batch, in their order."""
    rows = pq.read_table(file).to_pylist()
    return [Question(**{**row, "turns": _turns(row["turns"]), "references": tuple(row["references"])}) for row in rows]


def _turns(values: Sequence[Mapping[str, str]]) -> tuple[Turn, ...]:
    return tuple(Turn(value["role"], value["content"]) for value in values)


def _prepare(folder: Path, corpus: Corpus, prompter: Prompter | None) -> None:
    """Render every row, on all CPUs, into a file beside every corpus file."""
    ids = example_ids(corpus)
    items, start = [], 0
    for file in corpus.files:
        rows = pq.read_metadata(file).num_rows
        items.append({"file": str(file), "ids": ids[start : start + rows]})
        start += rows

    def prepare(batch: Mapping[str, Any]) -> dict[str, Any]:
        for file, of_file in zip(batch["file"], batch["ids"], strict=True):
            _prepare_file(Path(file), folder / Path(file).name, list(of_file), prompter)
        return {"file": batch["file"]}

    if len(items) == 1:  # a worker would take longer to start
        prepare({key: [value] for key, value in items[0].items()})
        return
    import ray.data

    ray.data.from_items(items, override_num_blocks=len(items)).map_batches(prepare, batch_size=1).materialize()


def _prepare_file(source: Path, target: Path, ids: Sequence[str], prompter: Prompter | None) -> None:
    names = iter(ids)
    with atomic_path(target) as temporary, pq.ParquetWriter(temporary, _PREPARED_SCHEMA) as writer:
        for batch in pq.ParquetFile(source).iter_batches(_ROWS_A_GROUP):
            rows = [_prepared(row, next(names), prompter) for row in batch.to_pylist()]
            writer.write_table(pa.Table.from_pylist(rows, _PREPARED_SCHEMA), row_group_size=_ROWS_A_GROUP)


def _prepared(row: Mapping[str, Any], example_id: str, prompter: Prompter | None) -> dict[str, Any]:
    example = Example(
        messages=messages_of(dict(row)),
        source=row["source"],
        line=row["line"],
        raw=row["raw"],
        context=row["context"],
        references=tuple(row["references"] or ()),
        task=row["task"],
        own_id=row["own_id"],
    )
    try:
        question = question_of(example, example_id)
        if prompter is not None:
            question = replace(question, tokens=len(prompt_ids(question.turns, prompter.chat_template())))
    except BadRow as error:
        where = {"example_id": example_id, "source": example.source, "line": example.line}
        return {**where, "problem": str(error), "raw": example.raw[:500]}
    return asdict(question)


def _write_batches(folder: Path, plan: Path, prepared: Sequence[Path], least_rows: int) -> None:
    """Join the rows that ask the same, plan the batches and write them; the plan last, for it says that all is there."""
    fresh_folder(folder)
    references: dict[str, dict[str, None]] = {}
    planned: dict[str, Planned] = {}
    quarantined = []
    dropped = 0
    for row in _rows(prepared, ["example_id", "asked", "references", "tokens", "source", "line", "problem", "raw"]):
        if row["problem"] is not None:
            where = (row["source"], row["line"], row["problem"], row["raw"], row["example_id"])
            quarantined.append(Quarantined.of(*where).as_dict())
            continue
        dropped += row["asked"] in planned
        planned.setdefault(row["asked"], Planned(row["example_id"], row["tokens"] or 0))
        references.setdefault(row["asked"], {}).update(dict.fromkeys(row["references"]))
    batches = list(plan_batches(list(planned.values()), least_rows))
    kept = {question.example_id for question in planned.values()}
    rows = (row for row in _rows(prepared, None) if row["problem"] is None and row["example_id"] in kept)
    for number, batch in enumerate(batches):
        values = [next(rows) for _ in batch]
        values = [{**row, "references": list(references[row["asked"]])} for row in values]
        with atomic_path(batch_file(folder, number)) as temporary:
            pq.write_table(pa.Table.from_pylist(values, QUESTION_SCHEMA), temporary)
    write_json(folder / _MARKER, {"dropped": {ASKED_TWICE: dropped}, "quarantined": quarantined})
    with atomic_path(plan) as temporary:
        pq.write_table(plan_table(batches), temporary)


def _rows(files: Sequence[Path], columns: Sequence[str] | None) -> Iterator[dict[str, Any]]:
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(_ROWS_A_GROUP, columns=columns):
            yield from batch.to_pylist()

"""From the files of all tasks to the token data of a run, with Ray Data: read, split, render, tokenise.

Rows stand in the order of (task, content id) and in blocks of a fixed size, so that the files do not depend on the
order, the files or the blocks in which the input arrived.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from stitch_ray.config.finetune import FinetuneConfig, TaskConfig
from stitch_ray.data import readers
from stitch_ray.data.corpus import Corpus, example_ids, load_corpus, messages_of, read_corpus, user_error
from stitch_ray.data.json_stream import is_utf8_text
from stitch_ray.data.quarantine import BadRow, Quarantined
from stitch_ray.data.splits import Split, split_of
from stitch_ray.engines.pretrained import context_length, load_model_config, load_tokenizer
from stitch_ray.errors import UserError
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.records import CORPUS_SCHEMA, Example
from stitch_ray.runs import Progress, Step, atomic_path, fresh_folder, write_json, write_text
from stitch_ray.training.dataset import TokenDataset, read_table, table, write
from stitch_ray.training.encode import Encoded, Overlong, check_template, check_tokenizer, encode
from stitch_ray.training.objectives import Objective, objective

MARKER = "data.json"
_ROWS_A_PIECE = 2048


@dataclass(slots=True)
class TaskCounts:
    """What became of the rows of a task: rows_in = quarantined + dropped + train + validation + test.

    These are input rows; an objective may make several records of one. `dropped`: nothing to learn within max_length.
    `truncated`: rows of train and validation that lost tokens or records to max_length. `tokens` and `loss_tokens` (with
    a weight) are those of the training split, `validation_tokens` those of the other.
    """

    rows_in: int = 0
    quarantined: int = 0
    dropped: int = 0
    truncated: int = 0
    train: int = 0
    validation: int = 0
    test: int = 0
    train_records: int = 0
    validation_records: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    validation_tokens: int = 0

    def add(self, other: TaskCounts) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))


@dataclass(frozen=True, slots=True)
class Prepared:
    """A finished data folder. `tasks` is in the order of task ids; a task may have no validation row."""

    folder: Path
    train: TokenDataset
    validation: TokenDataset
    max_length: int
    tasks: Mapping[str, TaskCounts]
    quarantined: tuple[Quarantined, ...]

    @property
    def test_file(self) -> Path:
        """The records of the test split, one JSON object a line, with the name of the task under `task`."""
        return self.folder / "test.jsonl"


def build(folder: Path, config: FinetuneConfig, model_path: str, progress: Progress = lambda step: None) -> Prepared:
    """Read, split, render and tokenise all tasks with Ray Data, or open what is there already. Needs a Ray session.

    A finished folder is taken as it is: that it belongs to `config` is for the caller to see to. An unfinished one is
    made anew. Records are cut to `max_length` or the model's context, whichever is shorter. The test split is only
    written out, never tokenised. Raises UserError, naming the task, for a template that does not suit training, too
    many unusable rows, or no row to train on.
    """
    if (folder / MARKER).exists():
        return load(folder)
    jobs = _jobs(config, model_path)
    fresh_folder(folder)
    corpora = []
    for job in jobs:
        progress(Step(stage="reading", done=job.task_id, total=len(jobs)))
        with _naming(job.task):
            corpora.append(_read(_corpus_folder(folder, job.task_id, job.task), job))
    progress(Step(stage="tokenising", done=0, total=sum(corpus.num_rows for corpus in corpora)))
    pieces = _encode_all(folder / "pieces", jobs, corpora)
    counts, quarantined = _totals(jobs, corpora, pieces)
    for split in ("train", "validation"):
        write(folder / f"{split}.arrow", (read_table(piece.path / f"{split}.arrow") for piece in pieces))
    write_text(folder / "quarantine.jsonl", _lines([row.as_dict() for row in quarantined]))
    with atomic_path(folder / "test.jsonl") as temporary, temporary.open("w", encoding="utf-8") as stream:
        stream.writelines((piece.path / "test.jsonl").read_text("utf-8") for piece in pieces)
    shutil.rmtree(folder / "pieces")
    tasks = {name: asdict(of_task) for name, of_task in counts.items()}
    write_json(folder / MARKER, {"max_length": jobs[0].max_length, "tasks": tasks})
    return load(folder)


def load(folder: Path) -> Prepared:
    """Open a finished data folder."""
    marker = json.loads((folder / MARKER).read_text("utf-8"))
    lines = (folder / "quarantine.jsonl").read_text("utf-8").split("\n")  # splitlines also splits in text
    return Prepared(
        folder,
        train=TokenDataset.open(folder / "train.arrow"),
        validation=TokenDataset.open(folder / "validation.arrow"),
        max_length=marker["max_length"],
        tasks={name: TaskCounts(**counts) for name, counts in marker["tasks"].items()},
        quarantined=tuple(Quarantined(**json.loads(line)) for line in lines if line),
    )


def validation_examples(prepared: Prepared, config: FinetuneConfig) -> Iterator[tuple[int, Example]]:
    """The examples behind the validation records, each with its task's number, by task and content id."""
    of_task: dict[int, set[str]] = {}
    for task_id, example_id in zip(prepared.validation.task_ids.tolist(), prepared.validation.example_ids, strict=True):
        of_task.setdefault(task_id, set()).add(example_id)
    for number, task in enumerate(config.tasks):
        corpus = load_corpus(_corpus_folder(prepared.folder, number, task))
        wanted = of_task.get(number, set())
        rows = [row for row, example_id in enumerate(example_ids(corpus)) if example_id in wanted]
        for row in corpus.take(rows, CORPUS_SCHEMA.names):
            yield number, _example(row)


def learned_groups(folder: Path, config: FinetuneConfig) -> set[str]:
    """Group ids of all questions in the train and validation splits of a finished data folder."""
    shares, found = config.split, set()
    for number, task in enumerate(config.tasks):
        corpus = load_corpus(_corpus_folder(folder, number, task))
        found |= set(corpus.column_table(["group_id"])["group_id"].to_pylist())
    return {group for group in found if split_of(group, shares.validation, shares.test, shares.salt) != "test"}


@dataclass(frozen=True, slots=True)
class _Job:
    """What a Ray task needs to encode rows of one task. The template travels as text: nodes may not have its file."""

    task_id: int
    config: FinetuneConfig
    model_path: str
    template_text: str
    max_length: int

    @property
    def task(self) -> TaskConfig:
        return self.config.tasks[self.task_id]

    @property
    def objective(self) -> Objective:
        return objective(self.task.objective or self.config.objective)

    @property
    def template(self) -> ChatTemplate:
        tokenizer = _tokenizer(self.model_path, self.config.model.trust_remote_code)
        return ChatTemplate(tokenizer, self.template_text, self.task.template)

    def split_of(self, row: Mapping[str, Any]) -> Split:
        shares = self.config.split
        return split_of(row["group_id"], shares.validation, shares.test, shares.salt)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive rows of one corpus file, and the folder where what they became is put."""

    path: Path
    task_id: int
    file: Path
    start: int
    example_ids: Sequence[str]


@lru_cache(maxsize=2)
def _tokenizer(path: str, trust_remote_code: bool) -> Any:
    return load_tokenizer(path, trust_remote_code=trust_remote_code)


def _jobs(config: FinetuneConfig, model_path: str) -> list[_Job]:
    """One for every task, its objective and template tried out."""
    trust = config.model.trust_remote_code
    context = context_length(load_model_config(model_path, trust_remote_code=trust))
    tokenizer = _tokenizer(model_path, trust)
    check_tokenizer(tokenizer)
    jobs = []
    for number, task in enumerate(config.tasks):
        with _naming(task):
            template = ChatTemplate.resolve(task.template, tokenizer)
            check_template(template)
            jobs.append(_Job(number, config, model_path, template.text, min(config.max_length, context)))
            if jobs[-1].objective.head != "causal_lm":
                raise UserError(
                    f"objective {jobs[-1].objective.name} trains a classifier, and finetune a language model; use "
                    "another objective, or train-scorer"
                )
    return jobs


def _corpus_folder(folder: Path, number: int, task: TaskConfig) -> Path:
    return folder / "corpus" / f"{number:02d}-{task.name}"


def _read(folder: Path, job: _Job) -> Corpus:
    sources = readers.expand(job.task.data)
    corpus = read_corpus(folder, job.task.reading(job.config.limit), sources)
    if not corpus.num_rows:
        raise UserError(f"no usable row in {', '.join(sources)}{_first(corpus.quarantined)}")
    return corpus


def _encode_all(folder: Path, jobs: Sequence[_Job], corpora: Sequence[Corpus]) -> list[_Piece]:
    """Encode all corpora in Ray tasks of some thousand rows; the pieces in the order of task and content id."""
    import ray.data

    pieces: list[_Piece] = []
    for job, corpus in zip(jobs, corpora, strict=True):
        with _naming(job.task):
            ids = example_ids(corpus)
        taken = 0
        for file in corpus.files:
            for start in range(0, pq.read_metadata(file).num_rows, _ROWS_A_PIECE):
                stop = min(start + _ROWS_A_PIECE, pq.read_metadata(file).num_rows)
                of_rows = tuple(ids[taken + start : taken + stop])
                pieces.append(_Piece(folder / f"{len(pieces):06d}", job.task_id, file, start, of_rows))
            taken += pq.read_metadata(file).num_rows

    def run(batch: dict[str, Any]) -> dict[str, Any]:
        for packed in batch["piece"]:
            piece = pickle.loads(packed)
            _encode_piece(piece, jobs[piece.task_id])
        return {"done": np.ones(len(batch["piece"]), dtype=bool)}

    items = [{"piece": pickle.dumps(piece)} for piece in pieces]
    try:
        ray.data.from_items(items, override_num_blocks=len(items)).map_batches(run, batch_size=1).materialize()
    except Exception as error:
        cause = user_error(error)
        if cause is not None:
            raise cause from error
        raise
    return pieces


def _encode_piece(piece: _Piece, job: _Job) -> None:
    """Write what the rows of a piece become: a table a split, the test records, and the counts with the bad rows."""
    template = job.template
    records: dict[Split, list[tuple[Encoded, int, str]]] = {"train": [], "validation": []}
    test: list[dict[str, Any]] = []
    bad: list[Quarantined] = []
    counts = TaskCounts(rows_in=len(piece.example_ids))
    rows = pq.read_table(piece.file).slice(piece.start, len(piece.example_ids)).to_pylist()
    for row, example_id in zip(rows, piece.example_ids, strict=True):
        split = job.split_of(row)
        if split == "test":
            counts.test += 1
            test.append({**json.loads(row["raw"]), "task": job.task.name})
            continue
        try:
            found, cut = _encode_row(row, job, template)
        except Overlong:
            counts.dropped += 1
        except BadRow as error:
            counts.quarantined += 1
            bad.append(Quarantined.of(row["source"], row["line"], str(error), row["raw"], example_id))
        else:
            counts.truncated += cut
            names = (example_id if not number else f"{example_id}#{number + 1}" for number in range(len(found)))
            records[split] += [(encoded, job.task_id, name) for encoded, name in zip(found, names, strict=False)]
            _count(counts, split, found)
    fresh_folder(piece.path)
    for split, of_split in records.items():
        write(piece.path / f"{split}.arrow", [table(of_split)])
    write_text(piece.path / "test.jsonl", _lines(test))
    write_json(piece.path / "counts.json", {"counts": asdict(counts), "bad": [row.as_dict() for row in bad]})


def _encode_row(row: dict[str, Any], job: _Job, template: ChatTemplate) -> tuple[list[Encoded], bool]:
    """The records of a row, and whether the longest sequence cost it anything. Raises Overlong if it cost all."""
    found: list[Encoded] = []
    reason = None
    # Seeded by content: neither the order nor the place in which a row is rendered changes it.
    for rendered in job.objective.render(_example(row), Random(f"{job.config.seed} {row['content_id']}")):
        try:
            found.append(encode(rendered, template.tokenizer, template, job.max_length, job.config.overlong))
        except Overlong as error:
            reason = error
    if not found:
        raise reason or BadRow(f"objective {job.objective.name} makes nothing of the example")
    return found, reason is not None or any(encoded.truncated for encoded in found)


def _example(row: dict[str, Any]) -> Example:
    values = {key: row[key] for key in ("context", "verdict", "weight", "task", "own_id", "source", "line", "raw")}
    references, excluded = tuple(row["references"]), tuple(row["excluded"])
    return Example(messages=messages_of(row), references=references, excluded=excluded, **values)


def _count(counts: TaskCounts, split: Split, found: Sequence[Encoded]) -> None:
    tokens = sum(len(encoded.ids) for encoded in found)
    if split == "validation":
        counts.validation += 1
        counts.validation_records += len(found)
        counts.validation_tokens += tokens
    else:
        counts.train += 1
        counts.train_records += len(found)
        counts.tokens += tokens
        counts.loss_tokens += sum(int(np.count_nonzero(encoded.weights)) for encoded in found)


def _totals(
    jobs: Sequence[_Job], corpora: Sequence[Corpus], pieces: Sequence[_Piece]
) -> tuple[dict[str, TaskCounts], list[Quarantined]]:
    """Counts of every task and all its unusable rows, by source and line. Raises UserError where they are too many."""
    totals, all_bad = {}, []
    for job, corpus in zip(jobs, corpora, strict=True):
        rejected = len(corpus.quarantined)
        counts, bad = TaskCounts(rows_in=rejected, quarantined=rejected), list(corpus.quarantined)
        for piece in (piece for piece in pieces if piece.task_id == job.task_id):
            result = json.loads((piece.path / "counts.json").read_text("utf-8"))
            counts.add(TaskCounts(**result["counts"]))
            bad += [Quarantined(**row) for row in result["bad"]]
        bad.sort(key=lambda row: (row.source, row.line))
        kept = counts.train + counts.validation + counts.test
        assert counts.rows_in == corpus.rows_in == kept + counts.quarantined + counts.dropped
        with _naming(job.task):
            _check_enough(counts, bad, job)
        totals[job.task.name] = counts
        all_bad += bad
    return totals, all_bad


def _check_enough(counts: TaskCounts, bad: Sequence[Quarantined], job: _Job) -> None:
    if counts.quarantined > job.config.max_bad_fraction * counts.rows_in:
        raise UserError(
            f"{counts.quarantined} of {counts.rows_in} rows cannot be used, more than max_bad_fraction "
            f"{job.config.max_bad_fraction:g}{_first(bad)}"
        )
    if not counts.train:
        raise UserError(
            f"no row to train on: of {counts.rows_in} rows {counts.quarantined} cannot be used, {counts.dropped} are "
            f"longer than max_length {job.max_length}, {counts.validation} are for validation and {counts.test} for "
            f"test; give it more data, a larger max_length or smaller split shares{_first(bad)}"
        )


@contextmanager
def _naming(task: TaskConfig) -> Iterator[None]:
    """Errors of the block name the task."""
    try:
        yield
    except UserError as error:
        raise UserError(f"tasks.{task.name}: {error}") from error


def _first(bad: Sequence[Quarantined]) -> str:
    return f"; the first: {bad[0].source}:{bad[0].line}: {bad[0].reason}" if bad else ""


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    """JSON lines; a lone surrogate, which no file in UTF-8 can hold, stays the escape that it was."""
    texts = (json.dumps(row, ensure_ascii=False) for row in rows)
    kept = (text if is_utf8_text(text) else json.dumps(row) for text, row in zip(texts, rows, strict=True))
    return "".join(text + "\n" for text in kept)

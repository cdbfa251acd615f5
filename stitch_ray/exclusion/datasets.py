"""DATASET+: labelled answers, each pair of question and answer once, and what the stages learn from it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from stitch_ray.exclusion.labels import CORRECT, WRONG, Label
from stitch_ray.records import content_hash


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One labelled answer. `human`: what people say, None: nobody asked. `bert_f` None: not computed."""

    question: str
    context: str | None
    group_id: str
    gold: tuple[str, ...]
    prediction: str
    label: Label
    human: Label | None = None
    temperature: float | None = None
    rouge_f: float = 0.0
    bert_f: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Distinct:
    """One answer to one question, however often it was given. `num`: how often; `weight`: in training."""

    answer: Answered
    num: int
    temperatures: tuple[float, ...]
    weight: float = 1.0

    @property
    def answer_id(self) -> str:
        return f"{self.answer.group_id}/{content_hash(self.answer.prediction)}"


Key = Literal["question_answer", "answer"]


def merge(rows: Iterable[Answered], key: Key = "question_answer") -> list[Distinct]:
    """The distinct answers, sorted by question and text; the order of `rows` changes nothing.

    A question that is there with several gold answers has them all, and an answer that agrees with one of them is
    CORRECT. People who disagree about an answer count as nobody asked. `answer`: the published way, by which of equal
    answers to different questions only one survives, that of the highest BERTScore (then the first by question).
    """
    groups: dict[tuple[str, ...], list[Answered]] = {}
    gold: dict[str, dict[str, None]] = {}
    for row in sorted(rows, key=_order):
        gold.setdefault(row.group_id, {}).update(dict.fromkeys(row.gold))
        groups.setdefault((row.group_id, row.prediction) if key == "question_answer" else (row.prediction,), []).append(
            row
        )
    found = [_distinct(same) for same in groups.values()]
    found = [replace(one, answer=replace(one.answer, gold=tuple(gold[one.answer.group_id]))) for one in found]
    return sorted(found, key=lambda one: (one.answer.group_id, one.answer.prediction))


def _order(row: Answered) -> tuple[Any, ...]:
    return row.group_id, row.question, row.prediction, row.gold, -1 if row.temperature is None else row.temperature


def _distinct(same: Sequence[Answered]) -> Distinct:
    best = max(same, key=lambda row: -1.0 if row.bert_f is None else row.bert_f)  # the first of equals: they are sorted
    own = [row for row in same if row.group_id == best.group_id]
    human = {row.human for row in own if row.human is not None}
    return Distinct(
        answer=replace(
            best,
            label=CORRECT if any(row.label == CORRECT for row in own) else WRONG,
            human=human.pop() if len(human) == 1 else None,
            temperature=None,
        ),
        num=len(own),
        temperatures=tuple(sorted({row.temperature for row in own if row.temperature is not None})),
    )


def balanced(rows: Sequence[Distinct], how: Literal["none", "downsample", "weights"], seed: int) -> list[Distinct]:
    """`rows` with as many of each label (the others left out by hash), or with weights that make both labels weigh the
    same and 1 on average. With one label only they stay as they are."""
    by_label = {label: [row for row in rows if row.answer.label == label] for label in (CORRECT, WRONG)}
    least = min(map(len, by_label.values()))
    if how == "none" or not least:
        return list(rows)
    if how == "weights":
        weights = {label: len(rows) / (2 * len(of)) for label, of in by_label.items()}
        return [replace(row, weight=weights[row.answer.label]) for row in rows]
    kept = {
        row.answer_id
        for of in by_label.values()
        for row in sorted(of, key=lambda row: content_hash([seed, row.answer_id]))[:least]
    }
    return [row for row in rows if row.answer_id in kept]


def validator_records(rows: Sequence[Distinct], *, gold: bool) -> list[dict[str, Any]]:
    """Records of format `judged_answer`, the blank answers left out; with `gold` also the gold answers, as CORRECT."""
    records = [_judged(row.answer, row.answer.prediction, row.answer.label, row.weight) for row in rows]
    if gold:
        taken = {(row.answer.group_id, row.answer.prediction.strip()) for row in rows}
        for answer in _questions(rows).values():
            new = [text for text in answer.gold if (answer.group_id, text.strip()) not in taken]
            records += [_judged(answer, text, CORRECT, 1.0) for text in new]
    return [record for record in records if record["answer"].strip()]


def exar_records(rows: Sequence[Distinct]) -> list[dict[str, Any]]:
    """One record of format `question_answer` a question: its gold answers, and its distinct wrong ones as `excluded`."""
    wrong: dict[str, list[str]] = {}
    for row in rows:
        text = row.answer.prediction.strip()
        if row.answer.label == WRONG and text and text not in {gold.strip() for gold in row.answer.gold}:
            wrong.setdefault(row.answer.group_id, []).append(text)
    return [
        {**_question(answer), "answer": list(answer.gold), "excluded": sorted(set(wrong.get(group, [])))}
        for group, answer in _questions(rows).items()
    ]


def _questions(rows: Sequence[Distinct]) -> Mapping[str, Answered]:
    found: dict[str, Answered] = {}
    for row in rows:
        found.setdefault(row.answer.group_id, row.answer)
    return found


def _question(answer: Answered) -> dict[str, Any]:
    return {"question": answer.question, **({"context": answer.context} if answer.context else {})}


def _judged(answer: Answered, text: str, verdict: Label, weight: float) -> dict[str, Any]:
    record = {**_question(answer), "answer": text, "verdict": verdict}
    return {**record, "weight": weight} if weight != 1 else record

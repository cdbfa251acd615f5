"""All signals of a batch of answers, with as few model calls as they take."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from stitch_ray.config.reliability import SignalName
from stitch_ray.engines.base import Engine, EngineError, Ids, Request, TokenStatistics
from stitch_ray.records import Turn
from stitch_ray.reliability.signals.equivalence import Equivalence
from stitch_ray.reliability.signals.prompted import p_true, verbalized_confidence
from stitch_ray.reliability.signals.registry import FROM_SAMPLES, FROM_TOKENS
from stitch_ray.reliability.signals.samples import (
    Answered,
    cluster,
    lexical_similarity,
    self_consistency,
    semantic_entropy,
)
from stitch_ray.reliability.signals.tokens import needed_statistics, token_signals

EngineKind = Literal["transformers", "vllm", "endpoint"]
Values = NDArray[np.float64]

_UNSUPPORTED: dict[EngineKind, frozenset[SignalName]] = {
    "transformers": frozenset(),
    "vllm": frozenset({"mean_token_entropy", "max_token_entropy"}),
    "endpoint": frozenset({"mean_token_entropy", "max_token_entropy", "p_true"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalItem:
    """One answer. `turns`: the conversation it answers, the question last.

    Items of one `question_id` have the same turns; those of kind "sample" are drawn independently of each other and
    are what the others are compared with. `token_ids` and what is known of each token come from the `Generation`;
    None: not known.
    """

    answer_id: str
    question_id: str
    turns: tuple[Turn, ...]
    answer: str
    kind: str
    token_ids: Ids | None = None
    logprobs: Sequence[float] | None = None
    entropies: Sequence[float] | None = None
    margins: Sequence[float] | None = None


def unsupported(names: Sequence[SignalName], kind: EngineKind) -> list[SignalName]:
    """Those of `names` that an engine of this kind cannot give for any answer.

    An endpoint may still leave out log-probabilities, and has none for answers that it did not generate.
    """
    return [name for name in names if name in _UNSUPPORTED[kind]]


def needs_engine(names: Sequence[SignalName], items: Sequence[SignalItem]) -> bool:
    """Whether `compute_signals` would call the engine: not where all token statistics that it takes were kept."""
    return bool({"p_true", "verbalized_confidence"} & set(names)) or bool(_without_statistics(names, items))


def compute_signals(
    names: Sequence[SignalName],
    items: Sequence[SignalItem],
    *,
    engine: Engine | None = None,
    equivalence: Equivalence | None = None,
    problems: Counter[str] | None = None,
) -> dict[SignalName, Values]:
    """Signal -> (items,), NaN where it is not defined or could not be had.

    All answers of a question have to be in one call. Token statistics that are missing come from one forward over
    question and answer, for all signals made of them and only if the engine does that. `engine` may be None where
    `needs_engine` is false, or where no engine can be had and token signals of some answers stay NaN; and `equivalence` if neither self_consistency nor semantic_entropy is asked for.
    `problems` counts reasons for NaN, and texts that an encoder saw in part.
    """
    problems = Counter() if problems is None else problems
    found: dict[SignalName, Values] = {}
    statistics = _statistics(names, items, engine, problems)
    if FROM_TOKENS & set(names):
        rows = [token_signals(*own) for own in statistics]
        found.update({name: np.array([row[name] for row in rows], np.float64) for name in FROM_TOKENS & set(names)})
    if FROM_SAMPLES & set(names):
        found.update(_from_samples(names, items, equivalence, problems))
    asked = [(item.turns, item.answer) for item in items]
    prompted: dict[SignalName, Callable[..., Values]] = {
        "p_true": p_true,
        "verbalized_confidence": verbalized_confidence,
    }
    for name, ask in prompted.items():
        if name in names:
            assert engine is not None, name
            found[name] = ask(engine, asked, problems)
    if "answer_length" in names:
        found["answer_length"] = np.array(
            [_length(item, own) for item, own in zip(items, statistics, strict=True)], np.float64
        )
    return {name: found[name] for name in names}


Statistics = tuple[Sequence[float] | None, Sequence[float] | None, Sequence[float] | None]


def _statistics(
    names: Sequence[SignalName], items: Sequence[SignalItem], engine: Engine | None, problems: Counter[str]
) -> list[Statistics]:
    """(logprobs, entropies, margins) of every item: kept ones, else from one forward a distinct answer."""
    known: list[Statistics] = [_kept(item) for item in items]
    slots: dict[tuple[tuple[Turn, ...], Ids | str], list[int]] = {}
    for slot in _without_statistics(names, items):
        item = items[slot]
        slots.setdefault((item.turns, item.answer if item.token_ids is None else item.token_ids), []).append(slot)
    if not slots:
        return known
    if engine is None or "token_statistics" not in engine.info.methods:
        problems["token signals: the engine tells nothing about answers that it did not generate"] += len(slots)
        return known
    requests = [
        Request(request_id=f"statistics-{number}", prompt=turns, continuation=answer)
        for number, (turns, answer) in enumerate(slots)
    ]
    for own, told in zip(slots.values(), engine.token_statistics(requests), strict=True):
        if isinstance(told, EngineError):
            problems[f"token signals: {told.reason}"] += 1
            continue
        for slot in own:
            known[slot] = _merged(known[slot], told)
    return known


def _merged(kept: Statistics, told: TokenStatistics) -> Statistics:
    """What was recorded while an answer was drawn stays as it is, so that no signal depends on which others there are."""
    logprobs, entropies, margins = kept
    return (
        told.logprobs if logprobs is None else logprobs,
        told.entropies if entropies is None else entropies,
        told.margins if margins is None else margins,
    )


def _without_statistics(names: Sequence[SignalName], items: Sequence[SignalItem]) -> list[int]:
    """Items with tokens of which something is wanted and missing; their number, too, is told by the statistics."""
    needed = needed_statistics(names)
    return [
        slot
        for slot, item in enumerate(items)
        if (bool(item.answer) if item.token_ids is None else bool(item.token_ids))
        and (
            any(getattr(item, part) is None for part in needed)
            or ("answer_length" in names and _num_tokens(item, _kept(item)) is None)
        )
    ]


def _from_samples(
    names: Sequence[SignalName],
    items: Sequence[SignalItem],
    equivalence: Equivalence | None,
    problems: Counter[str],
) -> dict[SignalName, Values]:
    slots: dict[str, tuple[list[int], list[int]]] = {}  # question -> its samples, its other answers
    for slot, item in enumerate(items):
        slots.setdefault(item.question_id, ([], []))[item.kind != "sample"].append(slot)
    answered = [
        Answered(
            question=items[(samples + others)[0]].turns[-1].content,
            samples=[items[slot].answer for slot in samples],
            candidates=[items[slot].answer for slot in others],
        )
        for samples, others in slots.values()
    ]
    found: dict[SignalName, Values] = {
        name: np.full(len(items), math.nan) for name in sorted(FROM_SAMPLES & set(names))
    }
    if "lexical_similarity" in found:
        for (samples, others), one in zip(slots.values(), answered, strict=True):
            found["lexical_similarity"][samples + others] = lexical_similarity(one.samples)
    if {"self_consistency", "semantic_entropy"} & set(found):
        assert equivalence is not None
        truncated = equivalence.truncated
        together = cluster(answered, equivalence)
        if equivalence.truncated > truncated:
            problems["clusters: texts that the encoder saw in part"] += equivalence.truncated - truncated
        for (samples, others), clusters in zip(slots.values(), together, strict=True):
            if "semantic_entropy" in found:
                found["semantic_entropy"][samples + others] = semantic_entropy(clusters.samples)
            if "self_consistency" in found:
                found["self_consistency"][samples], found["self_consistency"][others] = self_consistency(clusters)
    return found


def _kept(item: SignalItem) -> Statistics:
    return item.logprobs, item.entropies, item.margins


def _num_tokens(item: SignalItem, statistics: Statistics) -> int | None:
    known = (item.token_ids, *statistics)
    return next((len(part) for part in known if part is not None), None)


def _length(item: SignalItem, statistics: Statistics) -> float:
    """Tokens, or words where no engine tells the tokens."""
    tokens = _num_tokens(item, statistics)
    return float(len(item.answer.split()) if tokens is None else tokens)

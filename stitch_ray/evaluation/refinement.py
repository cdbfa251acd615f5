"""What a refinement did to answers: what it corrected, what it broke, and what would be claimed with the gold in hand.

Several of these look alike and differ by far. `refined_accuracy` is what a user gets if every answer is refined. The
oracles know the gold: they are upper bounds, never results. `unchanged_rate` says nothing about being right; the
original code of Stitch prints it as an improved exact match.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from stitch_ray.evaluation.answers import normalise_answer

MOST_OPTIONS = 26
_OPTION = re.compile(r"(?:^|\s)\(?([A-Z])[.):]\s+(?=\S)")


@dataclass(frozen=True, slots=True)
class Refinement:
    """Of n questions with a draft and a refined answer. Shares are of n unless they say otherwise; NaN: of nothing.

    oracle_union: the draft or the refined answer is right. oracle_gated: only wrong drafts are refined, so that nothing
    can break; for right and wrong the same number as the union, for graded labels not. corrected: wrong drafts that
    became right; broken: right drafts that became wrong; net: their difference. fix_rate: of the wrong drafts;
    break_rate: of the right ones.
    """

    num: int
    draft_accuracy: float
    refined_accuracy: float
    oracle_union: float
    oracle_gated: float
    unchanged_rate: float
    corrected: int
    broken: int
    net: int
    fix_rate: float
    break_rate: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def refinement(draft_correct: ArrayLike, refined_correct: ArrayLike, unchanged: ArrayLike) -> Refinement:
    """All (n,): whether each answer is right, and whether refining left the answer as it was.

    An answer that was not refined counts as its draft, unchanged. Raises ValueError for other shapes, or for an answer
    that was left as it was and yet changed its correctness.
    """
    draft, refined, same = (_flags(values) for values in (draft_correct, refined_correct, unchanged))
    if not len(draft) == len(refined) == len(same):
        raise ValueError(f"expected rows of one length, got {len(draft)}, {len(refined)} and {len(same)}")
    if (same & (draft != refined)).any():
        raise ValueError("an unchanged answer cannot be right in one place and wrong in the other")
    corrected, broken = int((~draft & refined).sum()), int((draft & ~refined).sum())
    return Refinement(
        num=len(draft),
        draft_accuracy=_share(draft),
        refined_accuracy=_share(refined),
        oracle_union=oracle_union(draft, refined),
        oracle_gated=oracle_gated(draft, refined, draft),
        unchanged_rate=_share(same),
        corrected=corrected,
        broken=broken,
        net=corrected - broken,
        fix_rate=_share(refined[~draft]),
        break_rate=_share(~refined[draft]),
    )


def oracle_union(*labels: ArrayLike) -> float:
    """Mean of the best label that any of the answers to a question has; each (n,) in [0, 1]."""
    return _share(np.max([np.asarray(row, np.float64) for row in labels], axis=0))


def oracle_gated(draft: ArrayLike, refined: ArrayLike, draft_correct: ArrayLike) -> float:
    """Mean label if the gold told which drafts to leave alone: the refined answer counts for wrong drafts only."""
    right = _flags(draft_correct)
    return _share(np.where(right, np.asarray(draft, np.float64), np.asarray(refined, np.float64)))


def unchanged_rate(drafts: Sequence[str], refined: Sequence[str | None]) -> float:
    """Share of answers that are equal after refinement and normalisation. None: not refined, so unchanged."""
    return _share([same_answer(one, other) for one, other in zip(drafts, refined, strict=True)])


def same_answer(draft: str, refined: str | None) -> bool:
    """Whether both say the same after normalisation. Texts of which nothing is left ("A") are compared as they are."""
    if refined is None:
        return True
    ours, theirs = normalise_answer(draft), normalise_answer(refined)
    return ours == theirs if ours or theirs else draft.strip().casefold() == refined.strip().casefold()


def random_reguess(num_options: ArrayLike) -> float:
    """Expected accuracy if every answer is one of its question's options at random. num_options: (n,)."""
    return _share(1 / np.asarray(num_options, np.float64))


def random_fix_rate(num_options: ArrayLike, draft_correct: ArrayLike) -> float:
    """Expected `fix_rate` of whoever takes another option than the draft's at random; both (n,), options >= 2.

    A refinement that fixes fewer is worse than changing one's mind blindly.
    """
    options, wrong = np.asarray(num_options, np.float64), ~_flags(draft_correct)
    return _share(1 / (options[wrong] - 1))


def count_options(questions: Sequence[str], references: Sequence[Sequence[str]]) -> list[int | None]:
    """How many answers each question lets one choose from; None: open.

    Told by options in its text ("A. … B. …", from A on), else by the references of all questions where these are a
    closed set: at most 26 different ones, each asked for at least twice on average.
    """
    gold = {normalise_answer(text) or text.strip() for own in references for text in own}
    closed = len(gold) if 2 <= len(gold) <= MOST_OPTIONS and 2 * len(gold) <= len(questions) else None
    return [_listed(text) or closed for text in questions]


def _listed(question: str) -> int | None:
    """Options that the text lists as A, B, C … in this order."""
    count = 0
    for label in _OPTION.findall(question):
        count = count + 1 if label == chr(ord("A") + count) else 1 if label == "A" else count
    return count if count >= 2 else None


def _flags(values: ArrayLike) -> NDArray[np.bool_]:
    return np.asarray(values, np.bool_)


def _share(values: ArrayLike) -> float:
    row = np.asarray(values, np.float64)
    return float(row.mean()) if len(row) else float("nan")

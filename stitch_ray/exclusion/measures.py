"""What a refinement is worth beside what the same number of calls could have bought. Pure: arrays in, figures out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import matthews_corrcoef

from stitch_ray.evaluation.answers import normalise_answer
from stitch_ray.reliability import metrics
from stitch_ray.reliability.bootstrap import percentile_interval, resample
from stitch_ray.reliability.metacognition import Metacognition, metacognition

Flags = NDArray[np.bool_]
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """One way to answer n questions. `right`: answered, and rightly; all (n,). Cost is of models' calls, verdicts too."""

    name: str
    right: Flags
    answered: Flags
    calls: Floats
    tokens: Floats


@dataclass(frozen=True, slots=True)
class System:
    """`accuracy`: right answers of all questions, with its 95 % interval; `selective`: of those answered, None: of none.

    `difference`: of accuracy to the first answer, over the same resamples. `calls`, `tokens`: a question.
    """

    name: str
    accuracy: float
    low: float | None
    high: float | None
    coverage: float
    selective: float | None
    difference: float
    difference_low: float | None
    difference_high: float | None
    calls: float
    tokens: float


def systems(ways: Sequence[Answering], *, bootstrap: int = 1000, seed: int = 0) -> list[System]:
    """Figures of every way; differences are to the first of them. Questions are resampled."""
    shares = [_resampled(way.right, bootstrap, seed) for way in ways]
    found = []
    for way, own in zip(ways, shares, strict=True):
        low, high = percentile_interval(own) if bootstrap else (None, None)
        below, above = percentile_interval(own - shares[0]) if bootstrap else (None, None)
        found.append(
            System(
                way.name,
                float(way.right.mean()),
                low,
                high,
                float(way.answered.mean()),
                float(way.right.sum() / way.answered.sum()) if way.answered.any() else None,
                float(way.right.mean() - ways[0].right.mean()),
                below,
                above,
                float(way.calls.mean()),
                float(way.tokens.mean()),
            )
        )
    return found


def _resampled(right: Flags, bootstrap: int, seed: int) -> Floats:
    if not bootstrap:
        return np.zeros(0)
    parts = [counts @ right / counts.sum(1) for counts in resample(np.arange(len(right)), bootstrap, seed)]
    return np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class Samples:
    """Answers drawn independently to one question, in their order. `logprobs`: of the whole answer, in nats.

    `prompt_tokens`: read for each of them; `tokens`: written.
    """

    texts: tuple[str, ...]
    logprobs: tuple[float, ...]
    correct: tuple[bool, ...]
    tokens: tuple[int, ...]
    prompt_tokens: int


def majority(samples: Samples, k: int) -> int:
    """Which of the first k answers the vote gives: the first of those that are given most often, after normalisation."""
    keys = _keys(samples, k)
    return keys.index(Counter(keys).most_common(1)[0][0])


def votes(samples: Samples, k: int) -> float:
    """How sure the vote among the first k answers is: its share, in (0, 1]; self-consistency (Wang et al. 2023)."""
    return Counter(_keys(samples, k)).most_common(1)[0][1] / k


def _keys(samples: Samples, k: int) -> list[str]:
    return [normalise_answer(text) or text.strip() for text in samples.texts[:k]]


def likeliest(samples: Samples, k: int) -> int:
    """Which of the first k answers has the highest probability as a sequence; of equals the first."""
    return int(np.argmax(samples.logprobs[:k]))


def voted(name: str, everyone: Sequence[Samples], k: int, choose: Callable[[Samples, int], int]) -> Answering:
    """The answers that `choose` takes from the first k samples of every question."""
    places = [choose(one, k) for one in everyone]
    return Answering(
        name=name,
        right=np.array([one.correct[place] for one, place in zip(everyone, places, strict=True)], bool),
        answered=np.ones(len(everyone), bool),
        calls=np.full(len(everyone), float(k)),
        tokens=np.array([k * one.prompt_tokens + sum(one.tokens[:k]) for one in everyone], np.float64),
    )


def surest(way: Answering, confidence: Floats, share: float) -> Answering:
    """`way` with abstentions: only the share of the questions with the highest confidence (n,) is answered, of equals
    the first. What abstains has to be compared with something that abstains as often."""
    kept = np.zeros(len(confidence), bool)
    kept[np.argsort(-confidence, kind="stable")[: round(share * len(confidence))]] = True
    return replace(way, name=f"{way.name}, surest {share:.0%}", right=way.right & kept, answered=way.answered & kept)


@dataclass(frozen=True, slots=True)
class Changes:
    """From the first answer to the last. An abstention is neither right nor wrong. `repeat_rate`: attempts after the
    first that gave an answer which had been turned down."""

    wrong_to_right: int
    right_to_wrong: int
    right_to_abstention: int
    wrong_to_abstention: int
    kept: int
    repeat_rate: float | None


def changes(first: Flags, right: Flags, answered: Flags, attempts: Floats, repeats: Floats) -> Changes:
    """All (n,): first answer right, final answer right, answered at all, attempts made, attempts that repeated."""
    again = float((attempts - 1).sum())
    return Changes(
        wrong_to_right=int((~first & right).sum()),
        right_to_wrong=int((first & answered & ~right).sum()),
        right_to_abstention=int((first & ~answered).sum()),
        wrong_to_abstention=int((~first & ~answered).sum()),
        kept=int((answered & (first == right)).sum()),
        repeat_rate=float(repeats.sum() / again) if again else None,
    )


@dataclass(frozen=True, slots=True)
class Verdicts:
    """How well P(CORRECT) tells right answers from wrong ones. `majority`: accuracy of always saying the commoner one.

    CORRECT is the positive class; None where a figure is not defined. `metacognition`: see that module.
    """

    num: int
    majority: float
    accuracy: float
    balanced_accuracy: float | None
    mcc: float | None
    auroc: float | None
    brier: float
    ece: float
    tp: int
    fp: int
    fn: int
    tn: int
    metacognition: Metacognition | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def verdicts(probability: Floats, correct: Flags, *, threshold: float = 0.5, ece_bins: int = 15) -> Verdicts:
    """Over n judged answers, both (n,). Raises ValueError without any."""
    if not len(probability):
        raise ValueError("nothing was judged")
    says = probability >= threshold
    both = bool(correct.any() and (~correct).any())
    right = correct.astype(np.float64)
    return Verdicts(
        num=len(probability),
        majority=max(float(right.mean()), 1 - float(right.mean())),
        accuracy=float((says == correct).mean()),
        balanced_accuracy=float((says[correct].mean() + (~says[~correct]).mean()) / 2) if both else None,
        mcc=float(matthews_corrcoef(correct, says)) if both and says.any() and (~says).any() else None,
        auroc=metrics.auroc(probability, 1 - right) if both else None,
        brier=metrics.brier(probability, right),
        ece=metrics.ece(probability, right, ece_bins),
        tp=int((says & correct).sum()),
        fp=int((says & ~correct).sum()),
        fn=int((~says & correct).sum()),
        tn=int((~says & ~correct).sum()),
        metacognition=metacognition(probability, correct, threshold=threshold),
    )


@dataclass(frozen=True, slots=True)
class Within:
    """How well P(CORRECT) tells right from wrong answers to the same question: the mean of the AUROC within each of the
    `questions` that have both, None without any. A validator that only tells questions apart has .5 here, whatever its
    AUROC is; what turns wrong answers into right ones is this."""

    auroc: float | None
    questions: int


def within_questions(probability: Floats, correct: Flags, groups: NDArray[np.int64]) -> Within:
    """Over n judged answers, all (n,); `groups` numbers their questions."""
    found = [
        metrics.auroc(probability[own], 1.0 - correct[own])
        for own in (np.flatnonzero(groups == group) for group in np.unique(groups))
        if correct[own].any() and not correct[own].all()
    ]
    return Within(float(np.mean(found)) if found else None, len(found))


def table(rows: Sequence[System]) -> str:
    """The systems as aligned text."""
    width = max(len(row.name) for row in rows)
    lines = [f"{'':<{width}}  right [95 %]            of answered  answered  change             calls  tokens"]
    for row in rows:
        interval = "" if row.low is None else f" [{row.low:.1%}, {row.high:.1%}]"
        change = "" if row.difference_low is None else f" [{row.difference_low:+.1%}, {row.difference_high:+.1%}]"
        selective = "-" if row.selective is None else f"{row.selective:.1%}"
        lines.append(
            f"{row.name:<{width}}  {f'{row.accuracy:.1%}{interval}':<23} {selective:>11}  {row.coverage:>8.1%}  "
            f"{f'{row.difference:+.1%}{change}':<24} {row.calls:>5.2f}  {row.tokens:>6,.0f}"
        )
    return "\n".join(lines)


def verdict_text(found: Verdicts, within: Within) -> str:
    """The verdicts as one line, the majority baseline beside them."""

    def shown(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    meta = found.metacognition
    signal = "" if meta is None else f", d' {meta.d_prime:.2f}, meta-d' {meta.meta_d_prime:.2f}"
    return (
        f"validator on {found.num} first answers: accuracy {found.accuracy:.3f} (always the commoner verdict: "
        f"{found.majority:.3f}), balanced {shown(found.balanced_accuracy)}, MCC {shown(found.mcc)}, AUROC "
        f"{shown(found.auroc)}, Brier {found.brier:.3f}, ECE {found.ece:.3f}{signal}; AUROC within "
        f"{within.questions} questions {shown(within.auroc)}"
    )

"""Generate, validate, exclude, generate again (EXAR): what is to be done next for one question. Pure.

The published loop excludes only the last wrong answer, gives the last attempt without judging it, and does not notice
an answer that comes again; `Rules` has all three, and does none of them unless told to.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from stitch_ray.evaluation.answers import normalise_answer

Checked = Literal["judged", "judge_failed", "repeated", "empty", "unjudged", "draft"]
Reason = Literal["accepted", "unjudged", "exhausted", "cycle"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """See `AttemptsConfig`. `threshold`: least P(CORRECT) of an answer that is accepted."""

    max_attempts: int = 6
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.3, 0.4, 0.5, 0.6)
    exclude: Literal["all", "last", "none"] = "all"
    last: Literal["validate", "accept"] = "validate"
    on_cycle: Literal["retry", "stop"] = "retry"
    threshold: float = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One answer. `probability`: P(CORRECT), None unless `checked` is "judged". An answer that was turned down before, is
    blank, or cannot be judged is turned down; "draft": somebody else turned it down, before the first attempt. `tokens`
    and `validator_tokens`: read and written."""

    answer: str
    temperature: float
    checked: Checked
    probability: float | None = None
    logprob: float | None = None
    tokens: int = 0
    validator_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """`answer` None: abstained. `confidence`: P(CORRECT) of the answer; None: nobody judged it, or there is none."""

    answer: str | None
    confidence: float | None
    reason: Reason


@dataclass(frozen=True, slots=True)
class Refinement:
    """The attempts at one question so far."""

    rules: Rules
    attempts: tuple[Attempt, ...] = ()

    @property
    def temperature(self) -> float:
        """Of the next attempt."""
        schedule = self.rules.temperatures
        return schedule[min(len(self.attempts), len(schedule) - 1)]

    @property
    def excluded(self) -> tuple[str, ...]:
        """What the next prompt excludes: the distinct answers that were turned down, blank ones left out."""
        if self.rules.exclude == "none":
            return ()
        wrong: dict[str, str] = {}
        for attempt in self.attempts:
            if attempt.answer.strip():
                wrong.setdefault(_key(attempt.answer), attempt.answer.strip())
        found = tuple(wrong.values())
        if self.rules.exclude == "last":
            last = self.attempts[-1].answer.strip() if self.attempts else ""
            return (last,) if last else ()
        return found

    @property
    def is_last(self) -> bool:
        """Whether the next attempt is the last one."""
        return len(self.attempts) + 1 == self.rules.max_attempts

    def check(self, answer: str) -> Checked:
        """What becomes of the next answer before anybody is asked: "judged" means that the validator is."""
        if not answer.strip():
            return "empty"
        if self.is_last and self.rules.last == "accept" and self.attempts:
            return "unjudged"
        return "repeated" if _key(answer) in {_key(one.answer) for one in self.attempts} else "judged"

    def add(self, attempt: Attempt) -> Refinement:
        """Raises ValueError if the question needs no further attempt."""
        if self.outcome is not None:
            raise ValueError("the question is settled")
        return replace(self, attempts=(*self.attempts, attempt))

    @property
    def repeats(self) -> int:
        """How many attempts gave an answer that had been turned down before."""
        return sum(attempt.checked == "repeated" for attempt in self.attempts)

    @property
    def calls(self) -> int:
        """Calls of models: an answer is one, a verdict is one."""
        return len(self.attempts) + sum(attempt.checked in ("judged", "judge_failed") for attempt in self.attempts)

    @property
    def tokens(self) -> int:
        return sum(attempt.tokens + attempt.validator_tokens for attempt in self.attempts)

    @property
    def outcome(self) -> Outcome | None:
        """None: another attempt is to be made."""
        if not self.attempts:
            return None
        last = self.attempts[-1]
        if last.checked == "unjudged":
            return Outcome(last.answer, None, "unjudged")
        if last.probability is not None and last.probability >= self.rules.threshold:
            return Outcome(last.answer, last.probability, "accepted")
        if last.checked == "repeated" and self.rules.on_cycle == "stop":
            return Outcome(None, None, "cycle")
        if len(self.attempts) >= self.rules.max_attempts:
            return Outcome(None, None, "exhausted")
        return None

    def trace(self) -> list[dict[str, Any]]:
        """The attempts as JSON values."""
        return [asdict(attempt) for attempt in self.attempts]


def expected(p: float, tpr: float, tnr: float, retries: int) -> tuple[float, float]:
    """Accuracy and mean attempts if attempts were independent, the last one being given unjudged.

    p: probability that an answer is right; tpr, tnr: rates at which the validator accepts right and turns down wrong
    answers; retries: attempts that are judged. A ceiling: real attempts at one question are far from independent.
    """
    stop = p * tpr + (1 - p) * (1 - tnr)
    left = (1 - stop) ** retries
    judged = p * tpr * (1 - left) / stop if stop else 0.0
    return judged + p * left, 1 + sum((1 - stop) ** k for k in range(1, retries + 1))


def any_right(right: Sequence[Sequence[bool]], k: int) -> float:
    """acc@k: share of the questions of which one of the first k attempts is right. Raises ValueError without any."""
    if not right:
        raise ValueError("there is no question")
    return sum(any(of_one[:k]) for of_one in right) / len(right)


def _key(answer: str) -> str:
    """Answers that differ in case, articles or punctuation only are the same; option "A" is no article."""
    return normalise_answer(answer) or answer.strip().strip(string.punctuation).casefold() or answer.strip()

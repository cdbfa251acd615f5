"""What a scripted ensemble owes for a question, and what was made of it. No network in here."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.serving.scripted import directive

FAULTS = frozenset({"scorer_unavailable", "route_failed", "deadline", "budget"})
"""Reasons of abstentions that tell of a fault."""

RIGHT, WRONG, WITHHELD = "right", "wrong", "withheld"
WINDOW_S, STEP_S = 2.0, 0.25


@dataclass(frozen=True, slots=True)
class Asked:
    """One request. verdict: right; wrong; withheld: abstained for a fault where the models would have answered; or the
    status or exception that came in place of a response. at: seconds on the monotonic clock when it was sent."""

    question: str
    at: float
    seconds: float
    verdict: str
    response: Mapping[str, Any] | None = None

    @property
    def failed(self) -> bool:
        return self.verdict not in (RIGHT, WRONG)


def question(number: int, drawn: random.Random) -> str:
    """A question whose one answer no other question has; a third each is sure at once, refined, and refined in vain."""
    kind = number % 3
    draft = drawn.uniform(0.72, 0.99) if kind == 0 else drawn.uniform(0.05, 0.66)
    final = drawn.uniform(0.05, 0.66) if kind == 2 else drawn.uniform(0.72, 0.99)
    return f"question {number} draft={draft:.6f} final={final:.6f}"


def judge(text: str, response: Mapping[str, Any], thresholds: Mapping[str, float]) -> str:
    """thresholds: by version of the policies of which one may have decided.

    A question may order a fault of a member. If that member has a say in it an abstention that tells why is right, and
    nothing else.
    """
    threshold = thresholds.get(response["policy_version"])
    if threshold is None:
        return WRONG
    draft, final = directive(text, "draft", "0.9"), directive(text, "final", "0.9")
    refined = float(draft) < threshold
    ordered = directive(text, "scorer") or (refined and directive(text, "auxiliary"))
    given = tuple(response[key] for key in ("decision", "answer", "confidence"))
    if response["decision"] == "abstain" and response["reason"] in FAULTS:
        if given != ("abstain", None, None):
            return WRONG
        return RIGHT if ordered else WITHHELD
    if ordered:
        return WRONG
    if not refined:
        due: tuple[Any, ...] = ("answer", f"draft {draft}", float(draft))
    elif float(final) >= threshold:
        due = ("answer", f"refined {final}", float(final))
    else:
        due = ("abstain", None, float(final))
    return RIGHT if given == due else WRONG


@dataclass(frozen=True, slots=True)
class Report:
    """What became of all requests; see `Asked`."""

    asked: Sequence[Asked]

    @property
    def verdicts(self) -> Counter[str]:
        return Counter(one.verdict for one in self.asked)

    @property
    def failures(self) -> int:
        return sum(one.failed for one in self.asked)

    @property
    def wrong(self) -> int:
        return self.verdicts[WRONG]

    @property
    def worst(self) -> list[Any]:
        """Some of those that were not right, with what came back."""
        return [(one.verdict, one.question, one.response) for one in self.asked if one.verdict != RIGHT][:5]

    def between(self, begins: float, ends: float = float("inf")) -> Report:
        """Of the requests that were sent in that time."""
        return Report([one for one in self.asked if begins <= one.at < ends])

    def quantile(self, share: float) -> float:
        """Of the seconds that a response took."""
        ordered = sorted(one.seconds for one in self.asked)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def recovery_s(self, fault_at: float) -> float:
        """Seconds from the fault until two seconds begin in which nothing failed and p99 was what it had been before.

        As before: at most double, and 0.1 s for the machine's own noise. Infinite if that never came.
        """
        before = self.between(float("-inf"), fault_at)
        bound = 2 * before.quantile(0.99) + 0.1
        ends = max(one.at for one in self.asked) - WINDOW_S
        begins = fault_at
        while begins <= ends:
            window = self.between(begins, begins + WINDOW_S)
            if window.asked and not window.failures and window.quantile(0.99) <= bound:
                return begins - fault_at
            begins += STEP_S
        return float("inf")

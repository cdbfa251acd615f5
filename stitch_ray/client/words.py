"""What a reply means, in words, and what changed between two answers. Used by `ask` and by the page."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

Change = Literal["same", "removed", "added"]

_ABSTENTIONS = {
    "unsure": "no answer was sure enough",
    "scorer_unavailable": "the answer could not be checked",
    "route_failed": "the answer was not sure enough, and refining it failed",
    "deadline": "time ran out before an answer could be checked",
    "budget": "an answer would have cost more than it may",
}


def abstention(reason: str | None) -> str:
    """Why there is no answer."""
    return _ABSTENTIONS.get(reason or "", reason or "no reason given")


def percent(share: float) -> str:
    """`83.2 %`; near 0 and 1 with more digits, and never rounded to a certainty that is none."""
    value = 100 * share
    if 0 < value < 0.01:
        return "below 0.01 %"
    if 99.99 < value < 100:
        return "above 99.99 %"
    text = f"{value:.2f}" if value < 1 or value > 99 else f"{value:.1f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def find_target(policy: Mapping[str, Any], task: str | None, target_risk: float | None) -> Mapping[str, Any] | None:
    """Of the targets of `GET /v1/policy` the one of a question: of its task if that has some, else of those for all."""
    targets: Sequence[Mapping[str, Any]] = policy.get("targets") or []
    whose = task if any(task is not None and target["task"] == task for target in targets) else None
    mine = [target for target in targets if target["task"] == whose]
    if target_risk is None:
        return mine[0] if mine else None
    return next((target for target in mine if math.isclose(target["target_risk"], target_risk)), None)


def promise(target: Mapping[str, Any]) -> str:
    """What is promised about the answers that are given."""
    of = f" to questions of task {target['task']!r}" if target["task"] else ""
    said = f"at most {percent(target['target_risk'])} of the answers given{of} are wrong"
    return f"{said}, with probability {percent(1 - target['delta'])} over the {target['n_calibration']:,} calibration answers"


def word_diff(before: str, after: str) -> Iterator[tuple[Change, str]]:
    """Runs of equal, removed and added text; those that are not removed make up `after`. White space sticks to words."""
    old, new = (re.findall(r"\S+\s*|^\s+", text) for text in (before, after))
    matcher = difflib.SequenceMatcher(
        None, [word.strip() for word in old], [word.strip() for word in new], autojunk=False
    )
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            yield "same", "".join(new[c:d])
            continue
        if a < b:
            # the last word of `after` has no white space behind it, though something stood there before
            apart = " " if a and c == len(new) and c and not new[-1][-1].isspace() else ""
            yield "removed", apart + "".join(old[a:b])
        if c < d:
            yield "added", "".join(new[c:d])

"""Labels that came back from use, as rows that say under which promise an answer was given or withheld."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stitch_ray.data import readers
from stitch_ray.data.quarantine import BadRow, Quarantined
from stitch_ray.reliability.policy import Policy, Target, UnknownTarget
from stitch_ray.reliability.risk.rows import check_share, confidence_of, loss_of


@dataclass(frozen=True, slots=True)
class Label:
    """One answer that somebody judged. `target`: the promise of the policy that decided about it."""

    target: Target
    confidence: float
    loss: float
    answered: bool


@dataclass(frozen=True, slots=True)
class Feedback:
    """Labels in the order of the files. `repeats`: rows that say again what one with the same id said."""

    labels: tuple[Label, ...]
    rows_in: int
    repeats: int
    quarantined: tuple[Quarantined, ...]


def read(paths: Sequence[str], policy: Policy) -> Feedback:
    """Rows {confidence, correct or label, decision?, task?, target_risk?, id?, policy_version?}, in the order of time.

    `decision` is `answer` (default) or `abstain`. Quarantined are rows of another policy version, of a promise that the
    policy does not make, whose confidence contradicts the decision, and that label one id in two ways. Raises UserError
    if less than half of the rows, or none, can be used.
    """
    labels: list[Label] = []
    bad: list[Quarantined] = []
    told: dict[str, Label] = {}
    rows = repeats = 0
    for source in readers.expand(paths):
        for row in readers.iter_rows(source):
            rows += 1
            try:
                if row.record is None:
                    raise BadRow(row.error or "row could not be read")
                label = _label(row.record, policy)
                name = row.record.get("id")
                if name is not None and str(name) in told:
                    if told[str(name)] != label:
                        raise BadRow(f"id {name} was labelled in another way before")
                    repeats += 1
                    continue
                labels.append(label)
                if name is not None:
                    told[str(name)] = label
            except BadRow as error:
                bad.append(Quarantined.of(row.source, row.line, str(error), row.raw))
    check_share("feedback", rows - len(bad), bad, paths)
    return Feedback(tuple(labels), rows, repeats, tuple(bad))


def _label(record: Mapping[str, Any], policy: Policy) -> Label:
    version = record.get("policy_version")
    if version is not None and version != policy.version:
        raise BadRow(f"decided by policy version {version}, not {policy.version}")
    loss = loss_of(record.get("correct"), record.get("label"), policy.created_from.get("loss", "error"))
    if math.isnan(loss):
        raise BadRow("neither correct nor label is given")
    decision = record.get("decision", "answer")
    if decision not in ("answer", "abstain"):
        raise BadRow(f"decision is {decision!r}, expected answer or abstain")
    task = None if record.get("task") is None else str(record["task"])
    try:
        target = policy.target(task, record.get("target_risk"))
    except (UnknownTarget, TypeError) as error:
        raise BadRow(str(error)) from error
    confidence = confidence_of(record, "confidence")
    accepted = target.threshold is not None and confidence >= target.threshold
    if accepted != (decision == "answer"):
        threshold = "none" if target.threshold is None else f"{target.threshold:g}"
        raise BadRow(f"decision {decision} contradicts confidence {confidence:g} and threshold {threshold}")
    return Label(target, confidence, loss, accepted)

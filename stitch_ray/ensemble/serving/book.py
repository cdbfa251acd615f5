"""Which answers were given, so that labels can come back for them. Numbers only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stitch_ray.ensemble.types import Action, Prediction, Reason
from stitch_ray.reliability.monitor import RiskMonitor


class UnknownAnswer(LookupError):
    """No answer with this id is remembered."""


class LabelledOtherwise(ValueError):
    """The answer was said to be right before, and wrong now, or the other way round."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One answer or abstention."""

    id: str
    confidence: float | None
    decision: Action
    reason: Reason
    task: str | None
    target_risk: float | None
    policy_version: str

    @classmethod
    def of(cls, prediction: Prediction) -> Entry:
        assert prediction.decision is not None
        assert prediction.reason is not None
        assert prediction.policy_version is not None
        return cls(
            id=prediction.example_id,
            confidence=prediction.confidence,
            decision=prediction.decision,
            reason=prediction.reason,
            task=prediction.task,
            target_risk=prediction.target_risk,
            policy_version=prediction.policy_version,
        )

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


class Book:
    """The last `remember` answers, the labels that came for them, and a monitor for every promise.

    A monitor bets on the losses of answers given under one policy version; another version starts new ones.
    """

    def __init__(self, remember: int) -> None:
        self._remember = remember
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._labels: OrderedDict[str, bool] = OrderedDict()
        self.monitors: dict[tuple[str, str | None, float], RiskMonitor] = {}
        """By policy version, task and target risk."""

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        """Remember an answer. One with an id that is known already takes its place, and its label is forgotten."""
        if self._entries.pop(entry.id, None) is not None:
            self._labels.pop(entry.id, None)
        self._entries[entry.id] = entry
        while len(self._entries) > self._remember:
            forgotten, _ = self._entries.popitem(last=False)
            self._labels.pop(forgotten, None)

    def label(self, answer_id: str, correct: bool) -> dict[str, Any] | None:
        """The row for `feedback.jsonl`, as `calibrate` reads it; None: the same was said before.

        Raises UnknownAnswer and LabelledOtherwise.
        """
        entry = self._entries.get(answer_id)
        if entry is None:
            raise UnknownAnswer(f"no answer with id {answer_id} is remembered")
        before = self._labels.get(answer_id)
        if before is not None:
            if before != correct:
                raise LabelledOtherwise(f"answer {answer_id} was labelled {'right' if before else 'wrong'} before")
            return None
        self._labels[answer_id] = correct
        if entry.decision == "answer" and entry.target_risk is not None:
            self._watch((entry.policy_version, entry.task, entry.target_risk), correct)
        return {**entry.to_dict(), "correct": correct}

    def restore(self, label: Mapping[str, Any]) -> None:
        """Take up a row of `feedback.jsonl` again, of an answer that may be forgotten itself."""
        self._labels[str(label["id"])] = bool(label["correct"])
        while len(self._labels) > self._remember:
            self._labels.popitem(last=False)
        if label["decision"] == "answer" and label["target_risk"] is not None:
            self._watch((label["policy_version"], label["task"], float(label["target_risk"])), bool(label["correct"]))

    def _watch(self, promise: tuple[str, str | None, float], correct: bool) -> None:
        monitor = self.monitors.get(promise) or RiskMonitor(promise[2])
        self.monitors[promise] = monitor.update(0.0 if correct else 1.0)

"""Is the promise still plausible? A bet against it, label by label, that may be looked at after every one of them.

Under "the risk of the answers given is at most r" no way of betting on the next loss makes the expected wealth grow, so
wealth reaches 1 / alpha with probability at most alpha, at any time (Ville). A wealth that does is evidence against the
promise, however often one looks. Bets as in Waudby-Smith and Ramdas 2024 (approximate GRAPA, hedged).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

MEMORIES = (math.inf, 200.0, 50.0)
"""Labels that each of the bettors remembers: all for a small excess that lasts, few for a change in service."""

_PRIOR_LABELS = 4.0
_MOST_LOG_WEALTH = 709.0  # exp of more is no float
_BOLDEST = 0.75
"""Share of the wealth that may be lost on one right answer."""


@dataclass(frozen=True, slots=True)
class Bettor:
    """One way of betting: its wealth, and what it remembers of the losses (discounted count, sum, sum of squares)."""

    memory: float
    log_wealth: float = 0.0
    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def bet(self, risk: float) -> float:
        """Stake on the next loss exceeding `risk`, from past losses alone; 0 while they are no higher than promised."""
        count = self.count + _PRIOR_LABELS
        mean = (self.total + _PRIOR_LABELS * risk) / count
        square = (self.squares + _PRIOR_LABELS * risk) / count  # of a loss of 0 or 1, the widest there is
        excess = mean - risk
        if excess <= 0:
            return 0.0
        return min(excess / (square - mean**2 + excess**2), _BOLDEST / risk)

    def after(self, loss: float, risk: float) -> Bettor:
        kept = 1 - 1 / self.memory if math.isfinite(self.memory) else 1.0
        return Bettor(
            memory=self.memory,
            log_wealth=self.log_wealth + math.log1p(self.bet(risk) * (loss - risk)),
            count=kept * self.count + 1,
            total=kept * self.total + loss,
            squares=kept * self.squares + loss**2,
        )


@dataclass(frozen=True, slots=True)
class RiskMonitor:
    """Evidence against `risk` after `labels` losses. Immutable: `update` returns the next state."""

    risk: float
    alpha: float = 0.05
    labels: int = 0
    total: float = 0.0
    alarm_at: int | None = None
    """The label, counted from 1, at which the wealth first reached 1 / alpha."""
    bettors: tuple[Bettor, ...] = tuple(Bettor(memory) for memory in MEMORIES)

    def __post_init__(self) -> None:
        if not 0 < self.risk < 1 or not 0 < self.alpha < 1:
            raise ValueError(f"risk and alpha must lie between 0 and 1, got {self.risk} and {self.alpha}")

    @property
    def wealth(self) -> float:
        """Mean wealth of the bettors, who start with 1; at most the largest float."""
        return _mean_wealth(self.bettors)

    @property
    def alarm(self) -> bool:
        """Whether the promise is no longer plausible. Once raised it stays."""
        return self.alarm_at is not None

    def update(self, loss: float) -> RiskMonitor:
        """The state after the next answer that was given, in the order of time; loss in [0, 1], else ValueError."""
        if not 0 <= loss <= 1:
            raise ValueError(f"a loss must lie in [0, 1], got {loss}")
        bettors = tuple(bettor.after(loss, self.risk) for bettor in self.bettors)
        labels, alarm_at = self.labels + 1, self.alarm_at
        if alarm_at is None and _mean_wealth(bettors) >= 1 / self.alpha:
            alarm_at = labels
        return RiskMonitor(self.risk, self.alpha, labels, self.total + loss, alarm_at, bettors)

    def follow(self, losses: Iterable[float]) -> tuple[RiskMonitor, list[float]]:
        """The state after all `losses`, and the wealth after each."""
        monitor, wealth = self, []
        for loss in losses:
            monitor = monitor.update(loss)
            wealth.append(monitor.wealth)
        return monitor, wealth

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe: a bettor that forgets nothing has memory null."""
        bettors = [asdict(b) | {"memory": b.memory if math.isfinite(b.memory) else None} for b in self.bettors]
        return {**self._fields(), "bettors": bettors}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RiskMonitor:
        bettors = (
            Bettor(**{**b, "memory": math.inf if b["memory"] is None else b["memory"]}) for b in values["bettors"]
        )
        return cls(**{**values, "bettors": tuple(bettors)})

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def _mean_wealth(bettors: Sequence[Bettor]) -> float:
    top = max(bettor.log_wealth for bettor in bettors)
    mean = sum(math.exp(bettor.log_wealth - top) for bettor in bettors) / len(bettors)
    return math.exp(min(top + math.log(mean), _MOST_LOG_WEALTH))

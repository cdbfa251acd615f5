"""`policy.json`: from which confidence on an answer is given, what that promises, and for which models it holds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from stitch_ray.errors import UserError
from stitch_ray.records import content_hash
from stitch_ray.reliability.calibration import Threshold
from stitch_ray.reliability.stage_scale import Stage, StageScale
from stitch_ray.runs import write_json

POLICY = "policy.json"
NO_ROUTE = "none"


class UnknownTarget(ValueError):
    """A promise was asked for that was not calibrated. The message lists those that were."""


@dataclass(frozen=True, slots=True)
class Target:
    """One promise: of the answers given at `threshold`, a share of at most `target_risk` is wrong, with probability
    1 - `delta` over the calibration answers. `task` None: for tasks without a promise of their own.

    threshold None: abstain on everything, for the `reason` given. `coverage` and `empirical_risk` are those of the
    calibration answers, `coverage` None where only answered questions are known.
    """

    task: str | None
    target_risk: float
    delta: float
    threshold: float | None
    n_calibration: int
    num_accepted: int
    empirical_risk: float | None
    coverage: float | None
    p_value: float | None
    method: str
    reason: str | None

    @classmethod
    def of(cls, task: str | None, found: Threshold) -> Target:
        return cls(
            task=task,
            target_risk=found.risk,
            delta=found.delta,
            threshold=found.value,
            n_calibration=found.num_calibration,
            num_accepted=found.num_accepted,
            empirical_risk=found.empirical_risk,
            coverage=found.coverage,
            p_value=found.p_value,
            method=found.method,
            reason=found.reason,
        )


@dataclass(frozen=True, slots=True)
class Fingerprints:
    """What the promise was made for. None: the calibration answers did not tell, so it cannot be checked.

    `route` is the name of the second stage, `none` without one, and where it is known its fingerprint: `name:hash`.
    """

    primary: str | None = None
    auxiliaries: tuple[str, ...] | None = None
    scorer: str | None = None
    route: str = NO_ROUTE


@dataclass(frozen=True)
class Policy:
    """Thresholds by task and target risk; the first target is the default.

    A policy with a route has one threshold for both stages: it takes the draft from that confidence on, else the
    refined answer from that confidence on. `scale` makes confidences of the scorer's scores, by stage; None: they are
    the scores themselves.
    """

    targets: tuple[Target, ...]
    fingerprints: Fingerprints
    created_from: Mapping[str, Any]
    scale: StageScale | None = None

    @cached_property
    def version(self) -> str:
        """Hash of everything else in the file. Stands in every answer, so it is taken once."""
        return content_hash(self._content())

    @property
    def has_route(self) -> bool:
        return self.fingerprints.route != NO_ROUTE

    @property
    def joint_delta(self) -> float:
        """All promises hold at once with probability 1 minus this: the sum of their deltas (union bound).

        Whoever wants m of them to hold together with probability 1 - delta calibrates each with delta / m.
        """
        return min(1.0, math.fsum(target.delta for target in self.targets))

    def target(self, task: str | None = None, target_risk: float | None = None) -> Target:
        """The promise for a question: of its task where that has some, else of those for all; by default the first.

        Raises UnknownTarget if there is none, or none for `target_risk`.
        """
        whose_task = task if task is not None and any(target.task == task for target in self.targets) else None
        mine = [target for target in self.targets if target.task == whose_task]
        for target in mine:
            if target_risk is None or math.isclose(target.target_risk, target_risk, rel_tol=1e-9):
                return target
        what = "any risk" if target_risk is None else f"a risk of {target_risk:g}"
        whose = "a question without task" if task is None else f"task {task!r}"
        known = ", ".join(f"{t.target_risk:g}{f' for task {t.task!r}' if t.task else ''}" for t in mine or self.targets)
        raise UnknownTarget(f"no threshold was calibrated for {whose} and {what}; calibrated are {known}")

    def confidence(self, score: float | None, stage: Stage) -> float | None:
        """What the thresholds are compared with, of what the scorer says of an answer. None: unscored."""
        return score if self.scale is None else self.scale.confidence(score, stage)

    def accepts(
        self, confidence: float | None, *, stage: Stage, task: str | None = None, target_risk: float | None = None
    ) -> bool:
        """Whether an answer of this confidence is given. An unscored answer (None, NaN) never is.

        Raises UnknownTarget, and ValueError for a stage that the policy was not calibrated for.
        """
        if stage == "refined" and not self.has_route:
            raise ValueError("the policy has one stage: its threshold says nothing about refined answers")
        threshold = self.target(task, target_risk).threshold
        return threshold is not None and confidence is not None and confidence >= threshold  # NaN compares false

    def check_fingerprints(
        self,
        *,
        primary: str | None,
        auxiliaries: Sequence[str] | None,
        scorer: str | None,
        route: str = NO_ROUTE,
    ) -> list[str]:
        """Refuse models, a scorer or a route that the promise was not made for, with a UserError naming what changed.

        Returns the names of what cannot be checked, since the calibration answers did not tell it.
        """
        used = Fingerprints(primary, None if auxiliaries is None else tuple(auxiliaries), scorer, route)
        changed, unknown = [], []
        for name, was in asdict(self.fingerprints).items():
            now = asdict(used)[name]
            if was is None:
                unknown.append(name)
            elif name == "route" and ":" not in was:
                if now.partition(":")[0] != was:
                    changed.append(f"route is {now}, was {was}")
                elif ":" in now:
                    unknown.append(name)
            elif now != was:
                changed.append(f"{name} is {_shown(now)}, was {_shown(was)}")
        if changed:
            raise UserError(
                f"the policy was calibrated for something else and its promise does not hold here: {'; '.join(changed)}. "
                "Calibrate again, or use what it was calibrated for"
            )
        return unknown

    def save(self, path: Path) -> None:
        write_json(path, {"version": self.version, **self._content()})

    @classmethod
    def load(cls, path: Path | str) -> Policy:
        """The policy of a file, or of the run folder it is in. Raises UserError if it is none or was edited."""
        file = Path(path) / POLICY if Path(path).is_dir() else Path(path)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            targets = tuple(Target(**target) for target in values["targets"])
            marks = values["fingerprints"]
            auxiliaries = marks["auxiliaries"]
            fingerprints = Fingerprints(**{**marks, "auxiliaries": None if auxiliaries is None else tuple(auxiliaries)})
            scale = StageScale.from_dict(values["scale"]) if "scale" in values else None
            policy = cls(targets, fingerprints, values["default"]["created_from"], scale)
            version = values["version"]
        except OSError as error:
            raise UserError(f"policy: cannot read {file}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"policy: {file} is no policy.json of calibrate ({type(error).__name__}: {error}); calibrate again"
            ) from error
        if not targets or version != policy.version or values != {"version": version, **policy._content()}:
            raise UserError(f"policy: {file} was changed after it was calibrated; restore it or calibrate again")
        return policy

    def _content(self) -> dict[str, Any]:
        first = self.targets[0]
        default = {
            "threshold": first.threshold,
            "target_risk": first.target_risk,
            "delta": first.delta,
            "n_calibration": first.n_calibration,
            "empirical_risk": first.empirical_risk,
            "coverage": first.coverage,
            "scorer": self.fingerprints.scorer,
            "created_from": dict(self.created_from),
        }
        marks = asdict(self.fingerprints)
        auxiliaries = self.fingerprints.auxiliaries
        return {
            **default,
            "default": default,
            "targets": [asdict(target) for target in self.targets],
            "fingerprints": {**marks, "auxiliaries": None if auxiliaries is None else list(auxiliaries)},
            "joint_delta": self.joint_delta,
            **({} if self.scale is None else {"scale": self.scale.to_dict()}),
        }


def _shown(value: Any) -> str:
    return "not given" if value is None else ", ".join(value) or "none" if isinstance(value, tuple) else str(value)

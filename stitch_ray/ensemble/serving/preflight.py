"""Everything that can be known wrong before a replica is started."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stitch_ray.config.serve import ServeConfig
from stitch_ray.ensemble.checking import check_ensemble
from stitch_ray.errors import UserError
from stitch_ray.records import content_hash
from stitch_ray.reliability.policy import Fingerprints, Policy, UnknownTarget
from stitch_ray.reliability.scorer.file import ScorerFile


@dataclass(frozen=True, slots=True)
class Ready:
    """A configuration that was checked against the files it names; `config` has absolute paths.

    fingerprints: of the members, told without loading them. signals: what the primary must give with an answer.
    unchecked: what the policy does not tell of what it was made for.
    """

    config: ServeConfig
    fingerprints: Fingerprints
    signals: frozenset[str]
    policy: Policy
    unchecked: tuple[str, ...]

    @property
    def work(self) -> dict[str, Any]:
        """What the answers depend on."""
        marks = asdict(self.fingerprints)
        return {**marks, "auxiliaries": list(marks["auxiliaries"]), "policy": self.policy.version}

    @property
    def work_hash(self) -> str:
        return content_hash(self.work)


def check(config: ServeConfig) -> Ready:
    """Raises UserError for missing models, scorer or policy, and for a policy that was made for other members."""
    scorer = ScorerFile.load(config.scorer)
    fingerprints = check_ensemble(config.ensemble, scorer)
    policy = Policy.load(config.policy)
    unchecked = policy.check_fingerprints(**asdict(fingerprints))
    _check_risk(config, policy)
    if config.ui:
        _check_page()
    return Ready(_absolute(config), fingerprints, scorer.needed, policy, tuple(unchecked))


def _check_risk(config: ServeConfig, policy: Policy) -> None:
    tasks = {target.task for target in policy.targets}
    problems = []
    for task in tasks:
        try:
            policy.target(task, config.target_risk)
        except UnknownTarget as error:
            problems.append(str(error))
    if len(problems) == len(tasks):
        raise UserError(f"target_risk: {problems[0]}")


def _check_page() -> None:
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise UserError("ui: the page needs gradio: pip install 'stitch-ray[ui]', or write ui: false")


def _absolute(config: ServeConfig) -> ServeConfig:
    """Replicas work in other directories. What does not exist yet (feedback.folder) is made absolute too."""
    from stitch_ray.config.loading import absolute_paths

    values = absolute_paths(config, Path.cwd())
    folder = config.feedback.folder
    if folder is not None:
        values["feedback"]["folder"] = str(Path(folder).absolute())
    return ServeConfig.model_validate(values)

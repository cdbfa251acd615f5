"""Everything that can be known wrong before a policy's folder is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stitch_ray.config.calibrate import CalibrateConfig
from stitch_ray.data import readers
from stitch_ray.data.corpus import inputs_hash
from stitch_ray.data.trained_on import read_trained_on
from stitch_ray.errors import UserError
from stitch_ray.records import content_hash
from stitch_ray.reliability.policy import NO_ROUTE, Policy
from stitch_ray.reliability.risk import feedback, predictions
from stitch_ray.reliability.risk.questions import Material
from stitch_ray.reliability.risk.single import Chosen, choose
from stitch_ray.reliability.tables import answers_hash, read_answers, sources_of
from stitch_ray.runs import read_manifest

_PROMISING = ("calibrate", "test")


@dataclass(frozen=True, slots=True)
class Update:
    """A policy and the labels that came back."""

    policy: Policy
    labels: feedback.Feedback


@dataclass(frozen=True, slots=True)
class Ready:
    """A configuration that was checked against the files it names. `work` is what the policy depends on.

    `given`: answers that still need confidences, or predictions with both stages, or a policy with labels. `scorer`:
    fingerprint of the scorer that gives the confidences.
    """

    config: CalibrateConfig
    sources: tuple[str, ...]
    given: Chosen | Material | Update
    scorer: str | None
    work: dict[str, Any]

    @property
    def work_hash(self) -> str:
        return content_hash(self.work)


def check(config: CalibrateConfig) -> Ready:
    """Raises UserError for missing or unusable files, an unfinished scorer or one for another model, settings without
    effect, and questions that scorer or model have learned from."""
    if not config.scorer:
        _refuse(config, {"batch_tokens", "replicas"}, "confidences that are in the files already")
    if config.feedback:
        return _check_update(config)
    if config.predictions:
        return _check_cascade(config)
    _refuse(config, {"scale"}, "answers, which are all of one stage")
    answers = read_answers(config.answers, config.split)
    _check_model(config)
    chosen = choose(answers, config)
    scorer = _check_scorer(config.scorer, chosen) if config.scorer else None
    if config.method == "sgr" and config.loss != "error":
        raise UserError("method: sgr needs loss: error; for quality use learn_then_test")
    work = _work(config, answers_hash(config.answers), scorer)
    return Ready(config, tuple(sources_of(config.answers)), chosen, scorer, work)


def _check_cascade(config: CalibrateConfig) -> Ready:
    if config.route == NO_ROUTE:
        raise UserError("route: predictions have two stages; name the second one, such as route: dialogue")
    if config.method != "learn_then_test":
        raise UserError(f"method: {config.method} knows one stage; a cascade needs learn_then_test")
    _refuse(config, {"serve_kind"}, "predictions")
    sources = predictions.sources(config.predictions)
    return Ready(config, tuple(sources), predictions.read(config), None, _work(config, inputs_hash(sources), None))


def _check_update(config: CalibrateConfig) -> Ready:
    without_effect = {"targets", "scorer", "route", "split", "serve_kind", "method", "scale", "loss", "evaluation"}
    _refuse(config, without_effect, "feedback, which updates the promises of the policy")
    assert config.policy is not None
    policy = Policy.load(config.policy)
    sources = readers.expand(config.feedback)
    work = {**_work(config, inputs_hash(sources), None), "policy": policy.version}
    return Ready(config, tuple(sources), Update(policy, feedback.read(config.feedback, policy)), None, work)


def _refuse(config: CalibrateConfig, names: set[str], why: str) -> None:
    """Raises UserError for settings that would silently do nothing."""
    fields = CalibrateConfig.model_fields
    idle = [name for name in fields if name in names and getattr(config, name) != fields[name].default]
    if idle:
        raise UserError(f"{', '.join(idle)}: no effect with {why}; remove it")


def _check_scorer(path: str, chosen: Chosen) -> str:
    """Its fingerprint."""
    from stitch_ray.reliability.scorer.file import ScorerFile
    from stitch_ray.reliability.scorer.scoring import check_answers_from

    manifest = read_manifest(Path(path))
    if manifest is None or manifest["job"] != "train-scorer" or manifest.get("status") != "done":
        raise UserError(f"scorer: {path} is no finished run of train-scorer; run that command, or again")
    scorer = ScorerFile.load(path)
    check_answers_from(scorer, chosen.answers)
    missing = sorted(name for name in scorer.needed if name not in chosen.answers.signals)
    if missing:
        raise UserError(
            f"answers: the scorer needs {', '.join(missing)}, which none of them has; name it in signals of sample-answers"
        )
    learned = read_trained_on(Path(path))
    groups, splits = chosen.answers.column("group_id"), chosen.answers.column("split")
    counts = {
        name: sum(group in learned for group in groups[splits == name]) for name in _PROMISING if (splits == name).any()
    }
    _refuse_learned("scorer", path, counts)
    return scorer.fingerprint


def _check_model(config: CalibrateConfig) -> None:
    """Refuse answers of a model that has learned from the questions it is measured on."""
    for source in sources_of(config.answers):
        counts = (read_manifest(Path(source)) or {}).get("trained_on") or {}
        _refuse_learned("answers", f"the model of {source}", {name: counts.get(name, 0) for name in _PROMISING})


def _refuse_learned(key: str, who: str, counts: Mapping[str, int]) -> None:
    found = ", ".join(f"{count} questions of the {name} split" for name, count in counts.items() if count)
    if found:
        raise UserError(
            f"{key}: {who} has learned from {found}: it looks better there than it is, and no promise can be made. Use "
            "one split.salt in all jobs and a split.test of finetune that covers these splits, or give other questions"
        )


def _work(config: CalibrateConfig, inputs: str, scorer: str | None) -> dict[str, Any]:
    values = config.model_dump(mode="json")
    names = ("targets", "method", "loss", "grid", "route", "serve_kind", "split")
    return {"inputs": inputs, "scorer": scorer, "policy": None, **{name: values[name] for name in names}}

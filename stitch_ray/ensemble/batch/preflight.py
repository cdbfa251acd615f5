"""Everything that can be known wrong before a folder is made or a question is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stitch_ray.config.base import ModelConfig
from stitch_ray.config.ensemble import EnsembleConfig
from stitch_ray.config.predict import PredictConfig, ServedConfig
from stitch_ray.data import formats, readers
from stitch_ray.data.corpus import data_work
from stitch_ray.engines.endpoint import check_endpoint, endpoint_fingerprint
from stitch_ray.engines.fingerprint import model_fingerprint, model_folder
from stitch_ray.ensemble.checking import check_ensemble
from stitch_ray.ensemble.fingerprints import local_member
from stitch_ray.errors import UserError
from stitch_ray.records import content_hash
from stitch_ray.reliability.answers.labels import judge_prompt
from stitch_ray.reliability.answers.questions import Prompter
from stitch_ray.reliability.policy import Fingerprints, Policy, UnknownTarget
from stitch_ray.reliability.scorer.file import ScorerFile

_SERVED_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Ready:
    """A configuration that was checked against the files and servers it names. `work`: what predictions depend on.

    `prompter` is None where a server answers. `policy` is None with a served ensemble, which has its own, and may be for
    calibration. `signals`: what the scorer needs. `labels_key` changes with what labels depend on beside the answers.
    """

    config: PredictConfig
    sources: tuple[str, ...]
    prompter: Prompter | None
    policy: Policy | None
    fingerprints: Fingerprints
    signals: frozenset[str]
    labels_key: str
    notes: tuple[str, ...]
    work: dict[str, Any]

    @property
    def work_hash(self) -> str:
        return content_hash(self.work)

    @property
    def name(self) -> str:
        """Who answers, in files and messages."""
        if self.config.target is not None:
            return self.config.target.url
        assert self.config.ensemble is not None
        return self.config.ensemble.primary.name


def check(config: PredictConfig) -> Ready:
    """Raises UserError for a missing input, model or server, a scorer or policy that was made for something else, and
    signals that nobody would compute."""
    known = ("auto", formats.BARE, *sorted(formats.FORMATS))
    if config.data.format not in known:
        raise UserError(f"data.format: {config.data.format!r} is not one of {', '.join(known)}")
    sources = tuple(readers.expand(config.data.paths))
    labels = content_hash(_check_labels(config))
    if config.target is not None:
        return _check_served(config, config.target, sources, labels)
    ensemble = config.ensemble
    assert ensemble is not None
    for key, member in (("primary", ensemble.primary), *_auxiliaries(ensemble)):
        if member.endpoint is not None:
            try:
                check_endpoint(member.endpoint)
            except UserError as error:
                raise UserError(str(error).replace("endpoint.", f"ensemble.{key}.endpoint.", 1)) from error
    assert config.scorer is not None
    scorer = ScorerFile.load(config.scorer)
    fingerprints = check_ensemble(ensemble, scorer)
    prompter = local_member(ensemble.primary).prompter if ensemble.primary.model else None
    policy, notes = _check_policy(config, fingerprints)
    work = {
        **_data(config, sources),
        "fingerprints": {**asdict(fingerprints), "auxiliaries": list(fingerprints.auxiliaries or ())},
        "policy": None if policy is None else policy.version,
        "scale": None if policy is None or policy.scale is None else policy.scale.to_dict(),
        "calibration": config.calibration,
        "ensemble": _ensemble(ensemble),
        "seed": config.seed,
        "target": None,
    }
    return Ready(config, sources, prompter, policy, fingerprints, scorer.needed, labels, tuple(notes), work)


def _check_served(config: PredictConfig, target: ServedConfig, sources: tuple[str, ...], labels: str) -> Ready:
    """The served policy is part of the work: predictions under another one do not belong into the same folder."""
    served = asyncio.run(_served_policy(target))
    risks = [one["target_risk"] for one in served["targets"]]
    if config.target_risk is not None and config.target_risk not in risks:
        raise UserError(
            f"target_risk: {config.target_risk:g} was not calibrated for {target.url}; calibrated are "
            f"{', '.join(f'{risk:g}' for risk in dict.fromkeys(risks))}"
        )
    marks = served["fingerprints"]
    auxiliaries = marks.get("auxiliaries")
    fingerprints = Fingerprints(
        marks.get("primary"), None if auxiliaries is None else tuple(auxiliaries), marks.get("scorer"), marks["route"]
    )
    work = {
        **_data(config, sources),
        "target": {"url": target.url, "model_version": served.get("model_version")},
        "policy": served["version"],
        "scale": served.get("scale"),
    }
    return Ready(config, sources, None, None, fingerprints, frozenset(), labels, (), work)


async def _served_policy(target: ServedConfig) -> dict[str, Any]:
    from stitch_ray.client import ApiError, AsyncClient, ClientError

    try:
        async with AsyncClient(
            target.url, token_env=target.token_env, timeout_s=_SERVED_TIMEOUT_S, max_retries=0
        ) as client:
            health = await client.health()
            if not health.get("ready", True):
                raise UserError(f"target.url: the ensemble at {target.url} is not ready yet; wait for it")
            return await client.policy()
    except ApiError as error:
        hint = "; name the variable that holds its token in target.token_env" if error.status == 401 else ""
        raise UserError(f"target.url: {target.url} refuses: {error}{hint}") from error
    except ClientError as error:
        raise UserError(
            f"target.url: no ensemble answers at {target.url} ({error}); start one with stitch-ray serve"
        ) from error
    except UserError as error:
        raise UserError(f"target.{error}" if str(error).startswith("token_env") else str(error)) from error


def _check_policy(config: PredictConfig, fingerprints: Fingerprints) -> tuple[Policy | None, list[str]]:
    if config.policy is None:
        return None, []
    policy = Policy.load(config.policy)
    unknown = policy.check_fingerprints(
        primary=fingerprints.primary,
        auxiliaries=fingerprints.auxiliaries,
        scorer=fingerprints.scorer,
        route=fingerprints.route,
    )
    tasks = {target.task for target in policy.targets}
    problems = []
    for task in tasks:
        try:
            policy.target(task, config.target_risk)
        except UnknownTarget as error:
            problems.append(str(error))
    if len(problems) == len(tasks):
        raise UserError(f"target_risk: {problems[0]}")
    notes = [f"The policy does not tell for which {', '.join(unknown)} it was made; nobody checked that."]
    return policy, notes if unknown else []


def _auxiliaries(ensemble: EnsembleConfig) -> list[tuple[str, Any]]:
    return [(f"auxiliaries.{number}", member) for number, member in enumerate(ensemble.auxiliaries)]


def _data(config: PredictConfig, sources: Sequence[str]) -> dict[str, Any]:
    return {
        "data": {
            **data_work(config.data, sources),
            "splits": list(config.splits),
            "split": config.split.model_dump(mode="json"),
        },
        "target_risk": config.target_risk,
    }


def _ensemble(ensemble: EnsembleConfig) -> dict[str, Any]:
    """What answers depend on beside the fingerprints: not where models run, nor how many."""
    primary = ensemble.primary
    return {
        "members": [_arithmetic(member.model) for member in ensemble.members],
        "max_tokens": primary.max_tokens,
        "stop": list(primary.stop),
        "signals": ensemble.signals.model_dump(mode="json"),
        "max_calls": ensemble.limits.max_calls,
        "max_total_tokens": ensemble.limits.max_tokens,
        "on_failure": ensemble.on_failure,
    }


def _arithmetic(model: ModelConfig | None) -> dict[str, Any] | None:
    if model is None:
        return None
    return {"max_tokens": model.max_tokens, "batch_tokens": model.batch_tokens, "num_threads": model.num_threads}


def _check_labels(config: PredictConfig) -> dict[str, Any]:
    """What labels depend on beside the answers; not the threshold, which is applied when results are put together."""
    labels = config.labels
    found: dict[str, Any] = {"metric": labels.metric, "baselines": config.baselines}
    if labels.metric == "rouge_l":
        found["convention"] = labels.convention
    if labels.encoder:
        if model_folder(labels.encoder) is None:
            raise UserError(f"labels.encoder: {labels.encoder}: no such folder, and no such model in the local cache")
        found["encoder"] = model_fingerprint(labels.encoder)
    if labels.judge:
        try:
            check_endpoint(labels.judge)
        except UserError as error:
            raise UserError(str(error).replace("endpoint.", "labels.judge.", 1)) from error
        found["judge"] = [endpoint_fingerprint(labels.judge), content_hash(judge_prompt().template)]
    return found

"""What a promise is tied to, told from a configuration without loading a weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from stitch_ray.config.base import ModelConfig
from stitch_ray.config.ensemble import EnsembleConfig, MemberConfig, PrimaryConfig
from stitch_ray.engines.endpoint import endpoint_fingerprint
from stitch_ray.engines.fingerprint import model_fingerprint
from stitch_ray.engines.hf_adapters import check_base
from stitch_ray.engines.pretrained import load_tokenizer
from stitch_ray.ensemble.dialogue_route import dialogue_fingerprint
from stitch_ray.ensemble.exclude_route import exclude_fingerprint
from stitch_ray.errors import UserError
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.records import content_hash
from stitch_ray.reliability.answering import answering, differences
from stitch_ray.reliability.answers.preflight import model_answers_from, model_identity
from stitch_ray.reliability.answers.questions import Prompter
from stitch_ray.reliability.policy import NO_ROUTE, Fingerprints
from stitch_ray.reliability.scorer.file import ScorerFile

_KEYS = {
    "max_tokens": "ensemble.primary.max_tokens",
    "stop": "ensemble.primary.stop",
    **{
        name: f"ensemble.signals.{name}"
        for name in ("samples", "temperature", "top_p", "similarity", "encoder", "min_cosine")
    },
}
"""Setting of an answer -> its key in the configurations of predict and serve."""


@dataclass(frozen=True, slots=True)
class LocalMember:
    """A local model as far as it is known unloaded. `context`: longest sequence in tokens."""

    fingerprint: str
    prompter: Prompter
    context: int


def local_member(member: MemberConfig, key: str = "primary") -> LocalMember:
    """Of a member that is a local model. Raises UserError, beginning with `key`, for a wrong path or template."""
    model: ModelConfig | None = member.model
    assert model is not None
    try:
        fingerprint, tokenizer_at, context = model_identity(model)
        tokenizer = load_tokenizer(tokenizer_at, trust_remote_code=model.trust_remote_code)
        template = ChatTemplate.resolve(member.template, tokenizer).text
    except UserError as error:
        raise UserError(f"{key}.{str(error).replace('tasks[].template', 'template', 1)}") from error
    prompter = Prompter(tokenizer_at, template, member.template, model.trust_remote_code)
    return LocalMember(model_answers_from(fingerprint, template, model.engine, model.dtype), prompter, context)


def member_fingerprint(member: MemberConfig, key: str = "primary") -> str:
    """That of the answers of the model behind `member`, as `sample-answers` would give it; adapters apart."""
    if member.endpoint is not None:
        return endpoint_fingerprint(member.endpoint)
    return local_member(member, key).fingerprint


def adapter_members(primary: PrimaryConfig) -> dict[str, LocalMember]:
    """Task -> its adapter as a model of its own, as `sample-answers` would take it. Raises UserError."""
    if not primary.adapters:
        return {}
    assert primary.model is not None
    found = {}
    for task, path in primary.adapters.items():
        alone = MemberConfig.model_validate(
            {"model": {**primary.model.model_dump(), "path": path}, "template": primary.template}
        )
        try:
            check_base(path, primary.model.path)
            found[task] = local_member(alone, "model")
        except UserError as error:
            raise UserError(f"primary.adapters.{task}: {error}") from error
    return found


def primary_fingerprint(primary: PrimaryConfig) -> str:
    """That of its answers; with adapters it is of all that may answer."""
    own = member_fingerprint(primary)
    if not primary.adapters:
        return own
    adapters = {task: member.fingerprint for task, member in adapter_members(primary).items()}
    return content_hash({"primary": own, "adapters": adapters})


def answer_versions(primary: PrimaryConfig) -> frozenset[str]:
    """What `sample-answers` calls the answers of the model alone, and of each adapter: what a scorer may be trained on."""
    return frozenset({member_fingerprint(primary), *(one.fingerprint for one in adapter_members(primary).values())})


def check_scorer(config: EnsembleConfig, scorer: ScorerFile) -> None:
    """Raises UserError if `scorer` was trained for answers of another model, or made in another way than here."""
    if scorer.answers_from is not None and scorer.answers_from not in answer_versions(config.primary):
        raise UserError(
            f"scorer: it was trained for answers of model version {scorer.answers_from}, and the primary's are "
            f"{member_fingerprint(config.primary)}; what it says of them means nothing. Train a scorer on these"
        )
    changed = differences(scorer.answering, answering_of(config), scorer.needed)
    if changed:
        told = "; ".join(f"{_KEYS[name]} is {now}, was {was}" for name, (was, now) in changed.items())
        raise UserError(
            f"scorer: it was trained on answers that sample-answers made otherwise: {told}. Make them alike"
        )


def answering_of(config: EnsembleConfig) -> dict[str, Any]:
    """How the primary's answers are drawn and compared here."""
    signals = config.signals
    return answering(
        max_tokens=config.primary.max_tokens,
        stop=config.primary.stop,
        samples=signals.samples,
        temperature=signals.temperature,
        top_p=signals.top_p,
        similarity=signals.similarity,
        encoder=None if signals.encoder is None else model_fingerprint(signals.encoder),
        min_cosine=signals.min_cosine,
    )


def route_fingerprint(config: EnsembleConfig) -> str:
    if config.route == "none":
        return NO_ROUTE
    names = [member.name for member in config.auxiliaries]
    if config.route == "exclude":
        return exclude_fingerprint(config.exclude, names)
    return dialogue_fingerprint(config.dialogue, names)


def ensemble_fingerprints(config: EnsembleConfig, scorer: str) -> Fingerprints:
    """What a policy for this ensemble is tied to; equal to what its predictor says. `scorer`: the scorer's own."""
    auxiliaries = [
        member_fingerprint(member, f"auxiliaries.{number}") for number, member in enumerate(config.auxiliaries)
    ]
    return Fingerprints(primary_fingerprint(config.primary), tuple(auxiliaries), scorer, route_fingerprint(config))

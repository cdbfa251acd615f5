"""The ensemble as a Serve application: `build` for Python, `app_builder` for Serve's own YAML.

applications:
  - name: stitch
    route_prefix: /
    import_path: serve_apps.ensemble:app_builder
    args: {ensemble: {...}, scorer: ..., policy: ...}        # the keys of jobs/configs/serve.yaml
    deployments:
      - {name: Gateway, user_config: {policy: NEW, target_risk: 0.1}}      # changes without any restart
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from typing import Any

from ray.serve import Application
from ray.serve.deployment import Deployment

from serve_apps.gateway import Gateway
from serve_apps.members import Auxiliary, Primary
from serve_apps.recorder import Recorder
from serve_apps.scorer import ScorerDeployment
from serve_apps.tokens import digests, read_tokens
from stitch_ray.config.ensemble import AutoscalingConfig, MemberConfig
from stitch_ray.config.loading import validate
from stitch_ray.config.serve import ServeConfig
from stitch_ray.ensemble.serving.preflight import Ready, check
from stitch_ray.records import content_hash
from stitch_ray.reliability.policy import Fingerprints, Policy

_CHANGES_LIVE: Any = {"policy": True, "target_risk": True, "ensemble": {"limits"}}
"""What `user_config` holds, and a gateway's constructor therefore must not."""

_LONGEST_DRAIN_S = 60.0

_WHEN_FULL = {"status_code": 503, "retry_after_s": 1}
"""What the proxy tells a client for whom there is no place in the queue before the gateways."""

ROUTING = {"initial_backoff_s": 0.01, "max_backoff_s": 0.05}
"""How soon a caller looks again when every replica is full. Serve's half a second leaves freed places empty for longer
than many an answer takes."""

QUIET = {"enable_access_log": False}
"""Logging of the replicas: a line for every call of every member would cost more than it tells beside the metrics."""


def app_builder(args: dict[str, Any]) -> Application:
    """The application that Serve's YAML names. Raises UserError for wrong keys, and for what they name and is not there.

    Serve would make a configuration of `args` by itself only if this module evaluated its annotations.
    """
    return build(validate(ServeConfig, args, "args"))


def build(config: ServeConfig | Ready) -> Application:
    """The application without the page, which is one of its own. Raises UserError."""
    ready = check(config) if isinstance(config, ServeConfig) else config
    config = ready.config
    ensemble = config.ensemble
    values = config.model_dump(mode="json")
    names = sorted(ready.signals)
    primary = _member(
        Primary,
        "Primary",
        ensemble.primary,
        _primary_values(values["ensemble"]),
        names,
        0,
        ensemble.primary.max_adapters,
    )
    auxiliaries = [
        _member(Auxiliary, f"Auxiliary{number}", member, member.model_dump(mode="json", exclude={"autoscaling"}))
        for number, member in enumerate(ensemble.auxiliaries, start=1)
    ]
    scorer = _deployment(
        ScorerDeployment,
        "ReliabilityScorer",
        config.scoring,
        {"num_cpus": config.scorer_threads, "num_gpus": config.scorer_gpus},
        config.scorer,
        None,
        config.scorer_threads,
        version=ready.fingerprints.scorer,
    )
    return assemble(config, ready.fingerprints, primary, auxiliaries, scorer)


def assemble(
    config: ServeConfig,
    fingerprints: Fingerprints,
    primary: Application,
    auxiliaries: Sequence[Application],
    scorer: Application,
) -> Application:
    """Recorder and gateway around members that are there; `fingerprints`: what they describe themselves as."""
    recorder = _deployment(
        Recorder,
        "Recorder",
        AutoscalingConfig(max_ongoing_requests=64, max_queued_requests=1024),  # type: ignore[call-arg]
        {"num_cpus": 0},
        config.feedback.folder,
        config.feedback.remember,
        # Two at a time would each miss what the other is told; gateways keep what they have to tell meanwhile.
        surge=False,
    )
    fixed = config.model_dump(mode="json", exclude=_CHANGES_LIVE)
    tokens = read_tokens(config.http)
    return _deployment(
        Gateway,
        "Gateway",
        config.gateway,
        {"num_cpus": 0},
        {**fixed, "policy": "", "target_risk": None},
        asdict(fingerprints),
        digests(tokens),
        primary,
        list(auxiliaries),
        scorer,
        recorder,
        user_config=user_config(config),
        drain_s=min(_LONGEST_DRAIN_S, config.ensemble.limits.deadline_s + 5),
    )


def user_config(config: ServeConfig) -> dict[str, Any]:
    """What may change while gateways run."""
    return {
        "policy": config.policy,
        "version": Policy.load(config.policy).version,
        "target_risk": config.target_risk,
        "limits": config.ensemble.limits.model_dump(mode="json"),
    }


def _primary_values(ensemble: Mapping[str, Any]) -> dict[str, Any]:
    """What the primary's host reads: limits and the dialogue are the gateway's, and must not reload the model."""
    without_replicas = {key: value for key, value in ensemble["primary"].items() if key != "autoscaling"}
    return {"primary": without_replicas, "signals": ensemble["signals"]}


def _member(deployment: Deployment, name: str, member: MemberConfig, *args: Any) -> Application:
    model = member.model
    resources = (
        {"num_cpus": 0, "num_gpus": 0} if model is None else {"num_cpus": model.num_threads, "num_gpus": model.num_gpus}
    )
    return _deployment(deployment, name, member.autoscaling, resources, *args)


def _deployment(
    deployment: Deployment,
    name: str,
    scale: AutoscalingConfig,
    resources: Mapping[str, float],
    *args: Any,
    version: str | None = None,
    user_config: Mapping[str, Any] | None = None,
    drain_s: float = 20.0,
    surge: bool = True,
) -> Application:
    """A node of the application. A single replica is replaced by starting the new one first: a model takes long to load."""
    single = scale.max_replicas == 1
    replicas: dict[str, Any] = {"num_replicas": 1}
    if not single:
        replicas = {
            "autoscaling_config": {
                "min_replicas": scale.min_replicas,
                "max_replicas": scale.max_replicas,
                "target_ongoing_requests": scale.target_ongoing_requests,
                "upscale_delay_s": scale.upscale_delay_s,
                "downscale_delay_s": scale.downscale_delay_s,
            }
        }
    elif scale.min_replicas == 0:
        replicas = {"autoscaling_config": {"min_replicas": 0, "max_replicas": 1}}
    options = deployment.options(
        name=name,
        max_ongoing_requests=scale.max_ongoing_requests,
        max_queued_requests=scale.max_queued_requests,
        backpressure_config=_WHEN_FULL,
        max_surge_percent=100 if single and surge else 0,
        ray_actor_options=dict(resources),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=drain_s,
        health_check_period_s=5,
        health_check_timeout_s=30,
        logging_config=QUIET,
        request_router_config=ROUTING,
        **({} if user_config is None else {"user_config": dict(user_config)}),
        **replicas,
    )
    # A replica restarts when the version does. By default that is with every deployment; this one changes with what the
    # constructor is given, so that another threshold reaches the gateways that run, and models stay loaded.
    plain = [arg for arg in args if not _is_handle(arg)]
    options._version = content_hash([metadata.version("stitch-ray"), name, version, plain])
    return options.bind(*args)


def _is_handle(arg: Any) -> bool:
    return isinstance(arg, Application) or (isinstance(arg, list) and bool(arg) and isinstance(arg[0], Application))

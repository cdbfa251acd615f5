"""The deployment that clients reach. Stateless: any number of replicas give the same answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from serve_apps.agents import Agents
from serve_apps.calls import ServeCall
from serve_apps.health import Health
from serve_apps.meters import GatewayMeters
from serve_apps.notebook import EVERY_S, Notebook
from serve_apps.web.app import Frame, build_app
from serve_apps.web.guard import Guard
from serve_apps.web.service import Active, PrimaryRater, Service
from stitch_ray.config.serve import ServeConfig
from stitch_ray.ensemble.predictor import Predictor, build_predictor
from stitch_ray.ensemble.remote import RemoteAuxiliary, RemotePrimary, RemoteScorer
from stitch_ray.ensemble.types import Limits
from stitch_ray.errors import UserError
from stitch_ray.reliability.policy import Fingerprints, Policy, UnknownTarget

logger = logging.getLogger("ray.serve")

_MEMBERS_WITHIN_S = 600.0
_LOOK_AGAIN_S = 0.2


@serve.deployment
@serve.ingress()
class Gateway:
    """Checks requests, asks the predictor, and lets nothing else out.

    config: a `ServeConfig` without what `user_config` holds: {policy, target_risk, limits}, which may change while the
    replica runs. fingerprints: those of the members that the configuration names; a replica starts when it has met them,
    so that during an update no new gateway works with old models. digests: SHA-256 of the tokens.
    """

    async def __init__(  # type: ignore[misc]
        self,
        config: Mapping[str, Any],
        fingerprints: Mapping[str, Any],
        digests: Sequence[str],
        primary: DeploymentHandle,
        auxiliaries: Sequence[DeploymentHandle],
        scorer: DeploymentHandle,
        recorder: DeploymentHandle,
    ) -> None:
        self._config = ServeConfig.model_validate(config)
        self._digests = tuple(digests)
        self._meters = GatewayMeters()
        self._refused: str | None = None
        names = [member.name for member in self._config.ensemble.members]
        self._calls = {
            name: self._call(handle, name) for name, handle in zip(names, [primary, *auxiliaries], strict=True)
        }
        self._calls["scorer"] = self._call(scorer, "scorer")
        feedback = self._config.feedback
        keeper = self._call(recorder, "recorder")
        self._notebook = Notebook(keeper, self._meters, review_texts=feedback.review_texts)
        expected = Fingerprints(**{**fingerprints, "auxiliaries": tuple(fingerprints["auxiliaries"] or ())})
        await self._meet(expected)
        self._agents = Agents()
        self._health = Health(self._calls)
        self._background = asyncio.create_task(self._keep_books())

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Take another policy, target risk or limits from the next request on.

        One that does not fit the models is refused: the one before stays in force, and /healthz tells why. Raises
        UserError where there is none before.
        """
        try:
            active = await asyncio.to_thread(read_active, user_config, self._predictor)
        except UserError as error:
            if not hasattr(self._service, "active"):
                raise
            self._refused = str(error)
            logger.error("the new policy is refused, the one before stays in force: %s", error)
            return
        self._refused = None
        self._service.active = active
        self._notebook.use(active)
        logger.info("policy %s is in force", active.policy.version)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        http, ensemble = self._config.http, self._config.ensemble
        frame = Frame(
            name=self._config.name,
            longest_answer=ensemble.primary.max_tokens,
            ui=self._config.ui,
            health=self._healthz,
            metrics=self._agents.scrape,
        )
        self._guard = Guard(
            build_app(self._service, frame),
            digests=self._digests,
            max_body_bytes=http.max_body_bytes,
            max_in_flight=http.max_in_flight,
            behind_serve=True,
            on_done=self._meters.request,
        )
        return self._guard

    def _call(self, handle: DeploymentHandle, member: str) -> ServeCall:
        return ServeCall(handle, member, retry=self._config.fault_tolerance, on_retry=self._meters.retry)

    async def _meet(self, expected: Fingerprints) -> None:
        """Wait for the members, and make the predictor of them. Raises UserError if they do not come."""
        ensemble = self._config.ensemble
        try:
            async with asyncio.timeout(_MEMBERS_WITHIN_S):
                while True:
                    described = {name: await call("describe") for name, call in self._calls.items()}
                    calls = [(self._calls[member.name], described[member.name]) for member in ensemble.members]
                    primary = RemotePrimary(*calls[0])
                    scorer = RemoteScorer(self._calls["scorer"], described["scorer"])
                    auxiliaries = [RemoteAuxiliary(*pair) for pair in calls[1:]]
                    predictor = build_predictor(ensemble, primary, auxiliaries, scorer)
                    if predictor.fingerprints == expected:
                        break
                    await asyncio.sleep(_LOOK_AGAIN_S)
        except TimeoutError:
            raise UserError(f"the members of the ensemble did not come within {_MEMBERS_WITHIN_S:g} s") from None
        for name, call in self._calls.items():
            call.version = described[name]["fingerprint"]
        self._predictor: Predictor = predictor
        http = self._config.http
        self._service = Service(
            predictor,
            PrimaryRater(primary, scorer),
            self._notebook,
            max_characters=http.max_characters,
            max_batch=http.max_batch,
            outdated=lambda: any(call.outdated for call in self._calls.values()),
        )

    async def _healthz(self) -> tuple[bool, dict[str, Any]]:
        members, ready = await self._health.look()
        health: dict[str, Any] = {
            "status": "unavailable"
            if not ready
            else "degraded"
            if self._refused or not all(members.values())
            else "ok",
            "ready": ready,
            "policy_version": self._service.active.policy.version,
            "model_version": self._predictor.model_version,
            "members": {name: "ok" if answers else "unavailable" for name, answers in members.items()},
        }
        if self._refused:
            health["refused_policy"] = self._refused
        return ready, health

    async def _keep_books(self) -> None:
        while True:
            self._meters.levels(self._guard.in_flight if hasattr(self, "_guard") else 0, self._notebook.unsent)
            await asyncio.sleep(EVERY_S)
            await self._notebook.send()

    async def __del__(self) -> None:
        self._background.cancel()
        with contextlib.suppress(Exception):
            async with asyncio.timeout(2):
                await self._notebook.send()


def read_active(user_config: Mapping[str, Any], predictor: Predictor) -> Active:
    """What is in force from now on. Raises UserError for a policy that is none, that does not fit, or lacks the risk."""
    unknown = user_config.keys() - {"policy", "version", "target_risk", "limits"}
    if unknown:
        raise UserError(
            f"user_config: unknown key {', '.join(sorted(unknown))}; known are policy, target_risk and limits"
        )
    policy = Policy.load(user_config["policy"])
    version = user_config.get("version")
    if version is not None and version != policy.version:
        raise UserError(
            f"policy: {user_config['policy']} is version {policy.version} here, and {version} where it was deployed; "
            "all nodes must see the same file"
        )
    unchecked = predictor.check(policy)
    if unchecked:
        logger.warning("the policy does not say for which %s it was made", ", ".join(unchecked))
    risk = user_config.get("target_risk")
    try:
        policy.target(None, risk)
    except UnknownTarget as error:
        if not any(target.target_risk == risk or risk is None for target in policy.targets):
            raise UserError(f"target_risk: {error}") from error
    try:
        limits = Limits(**{**asdict(Limits()), **(user_config.get("limits") or {})})
    except TypeError as error:
        raise UserError(f"user_config.limits: {error}") from error
    return Active(policy, user_config["policy"], risk, limits)

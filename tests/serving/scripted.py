"""Members whose latency, confidence and failures are written in the question, behind the real gateway.

A question is words and directives: `draft=0.9` and `final=0.4` are the confidences of the two answers, `sleep=0.5` the
seconds that the primary takes, `primary=` `auxiliary=` `scorer=` one of error, slow, garbage, none, nan.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve
from ray.serve import Application

from serve_apps.calls import WrongVersion
from stitch_ray.config.serve import ServeConfig
from stitch_ray.engines.base import EngineError, Generation, Request
from stitch_ray.ensemble.types import Answer, Question

if TYPE_CHECKING:  # every replica imports this module, and most have no use for what these bring along
    from stitch_ray.reliability.policy import Fingerprints, Policy, Target

SLOW_S = 30.0
THRESHOLDS = {0.1: 0.7, 0.2: 0.5, 0.01: None}
"""Target risk -> threshold of `policy`; the first is the default."""


def directive(text: str, name: str, default: str = "") -> str:
    found = re.findall(rf"\b{name}=([\w.]+)", text)
    return str(found[-1]) if found else default


def cannot_start(log: str | Path) -> Path:
    """File beside `log` with the versions that do not start."""
    return Path(log).with_suffix(".cannot_start")


class Scripted:
    """One replica. `log`: a file to which every call and every cancellation is added, a line each; where `cannot_start`
    lists the version, no replica of it starts."""

    def __init__(self, version: str, latency_s: float = 0.0, log: str | None = None) -> None:
        if log and cannot_start(log).exists() and version in cannot_start(log).read_text().split():
            raise RuntimeError("scripted failure to start")
        self._version = version
        self._latency_s = latency_s
        self._log = log

    async def call(self, version: str | None, method: str, args: Sequence[Any]) -> Any:
        if version is not None and version != self._version:
            raise WrongVersion(f"{version} asked, {self._version} held")
        if method == "describe":
            return {"fingerprint": self._version, "pid": os.getpid(), **self.described()}
        self._note(f"{method} {args[0].example_id if hasattr(args[0], 'example_id') else ''}")
        try:
            if self._latency_s:
                await asyncio.sleep(self._latency_s)
            return await getattr(self, method)(*args)
        except asyncio.CancelledError:
            self._note(f"cancelled {method}")
            raise

    def described(self) -> dict[str, Any]:
        return {}

    def _note(self, line: str) -> None:
        if self._log:
            with Path(self._log).open("a") as stream:
                stream.write(f"{type(self).__name__} {os.getpid()} {line}\n")


async def _act(kind: str, who: str) -> None:
    if kind == "error":
        raise EngineError(who, "scripted failure")
    if kind == "slow":
        await asyncio.sleep(SLOW_S)


@serve.deployment
class ScriptedPrimary(Scripted):
    def described(self) -> dict[str, Any]:
        return {"name": "primary", "signals": ["perplexity"], "adapters": ["math"]}

    async def answer(self, question: Question, *_: Any) -> Answer:
        text = question.question
        await _act(directive(text, "primary"), "primary")
        await asyncio.sleep(float(directive(text, "sleep", "0")))
        return Answer(text=f"draft {directive(text, 'draft', '0.9')}", signals={"perplexity": 1.5}, tokens=7)

    async def signals(self, question: Question, text: str, samples: Sequence[str], *_: Any) -> Answer:
        return Answer(text=text, signals={"perplexity": 1.2}, tokens=5)


@serve.deployment
class ScriptedAuxiliary(Scripted):
    def described(self) -> dict[str, Any]:
        methods = ["generate", "json_schema"]
        return {"name": "auxiliary", "dtype": "none", "max_context": 4096, "num_parameters": 1, "methods": methods}

    async def generate(self, request: Request) -> list[Generation]:
        shown = request.prompt if isinstance(request.prompt, str) else " ".join(turn.content for turn in request.prompt)
        kind = directive(shown, "auxiliary")
        await _act(kind, "auxiliary")
        turn = json.dumps({"comment": "I looked at it.", "answer": f"refined {directive(shown, 'final', '0.9')}"})
        text = "no object at all" if kind == "garbage" else turn
        return [Generation(text=text, token_ids=(1, 2, 3), finish_reason="stop", prompt_tokens=11)]


@serve.deployment
class ScriptedScorer(Scripted):
    def described(self) -> dict[str, Any]:
        return {"signals": ["perplexity"]}

    async def score(self, request: dict[str, Any]) -> dict[str, Any]:
        kind = directive(request["question"], "scorer")
        if kind == "error":
            raise RuntimeError("scripted failure")
        await _act("slow" if kind == "slow" else "", "scorer")
        number = re.findall(r"(?:draft|refined) ([\d.]+)", request["answer"])
        confidence = float(number[-1]) if number and kind != "none" else None
        if kind == "nan":
            confidence = float("nan")
        return {"confidence": confidence, "stack": None, "encoder": None, "reason": None}


def scripted_config(folder: Path, **changes: Any) -> ServeConfig:
    """Of members at addresses that nobody asks. `policy.json` is written into `folder`."""
    endpoint = {"url": "http://127.0.0.1:9/v1", "model": "scripted"}
    values: dict[str, Any] = {
        "ensemble": {
            "primary": {"endpoint": {**endpoint, "name": "primary"}, "max_tokens": 16},
            "auxiliaries": [{"endpoint": {**endpoint, "name": name}} for name in ("first", "second")],
            "route": "dialogue",
            "limits": {"deadline_s": 5.0},
        },
        "scorer": "none",
        "policy": str(folder / "policy.json"),
        "http": {"port": 0},
        "ui": False,
        "profile": "default",
    }
    for key, value in changes.items():
        section = values.get(key)
        values[key] = {**section, **value} if isinstance(section, dict) and isinstance(value, dict) else value
    config = ServeConfig.model_validate(values)
    if not (folder / "policy.json").exists():
        scripted_policy(config).save(folder / "policy.json")
    return config


def scripted_fingerprints(config: ServeConfig, version: str = "1") -> Fingerprints:
    from stitch_ray.ensemble.fingerprints import route_fingerprint
    from stitch_ray.reliability.policy import Fingerprints

    return Fingerprints(f"primary-{version}", ("first-1", "second-1"), "scorer-1", route_fingerprint(config.ensemble))


def scripted_policy(
    config: ServeConfig, thresholds: dict[float, float | None] | None = None, version: str = "1"
) -> Policy:
    """One promise a target risk, and one for task math."""
    from stitch_ray.reliability.policy import Policy

    targets = [_target(None, risk, value) for risk, value in (thresholds or THRESHOLDS).items()]
    fingerprints = scripted_fingerprints(config, version)
    return Policy((*targets, _target("math", 0.1, 0.8)), fingerprints, {"loss": "error"})


def scripted_application(
    config: ServeConfig,
    *,
    version: str = "1",
    latency_s: float = 0.0,
    log: str | None = None,
    replicas: int | Mapping[str, int] = 1,
    builds: Mapping[str, str] | None = None,
) -> Application:
    """The real gateway and recorder around scripted members.

    replicas: of each member, or by deployment, else one. builds: deployment -> anything; another one replaces its replicas
    by new ones of the same model.
    """
    from serve_apps import ensemble

    def member(deployment: Any, name: str, fingerprint: str) -> Application:
        number = replicas if isinstance(replicas, int) else replicas.get(name, 1)
        options = deployment.options(
            name=name,
            num_replicas=number,
            max_surge_percent=100 if number == 1 else 0,  # as in ensemble.build
            max_ongoing_requests=64,
            max_queued_requests=256,
            graceful_shutdown_wait_loop_s=0.5,
            ray_actor_options={"num_cpus": 0},
            logging_config=ensemble.QUIET,
        )
        options._version = fingerprint + (builds or {}).get(name, "")
        return options.bind(fingerprint, latency_s, log)

    return ensemble.assemble(
        config,
        scripted_fingerprints(config, version),
        member(ScriptedPrimary, "Primary", f"primary-{version}"),
        [member(ScriptedAuxiliary, f"Auxiliary{n}", f"{name}-1") for n, name in enumerate(("first", "second"), 1)],
        member(ScriptedScorer, "ReliabilityScorer", "scorer-1"),
    )


def _target(task: str | None, risk: float, threshold: float | None) -> Target:
    from stitch_ray.reliability.policy import Target

    return Target(
        task=task,
        target_risk=risk,
        delta=0.1,
        threshold=threshold,
        n_calibration=200,
        num_accepted=0 if threshold is None else 80,
        empirical_risk=None if threshold is None else risk / 2,
        coverage=0.4,
        p_value=0.01,
        method="learn_then_test",
        reason="no threshold passes" if threshold is None else None,
    )

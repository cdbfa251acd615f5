"""An ensemble of servers: structured output, faults on the way, and what cannot be had from a server."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

from stitch_ray.config.ensemble import EnsembleConfig, MemberConfig
from stitch_ray.ensemble.fingerprints import ensemble_fingerprints
from stitch_ray.ensemble.members import load_auxiliary, load_primary
from stitch_ray.ensemble.predictor import Predictor, build_predictor
from stitch_ray.ensemble.types import Limits, Prediction, Question
from tests.fake_endpoint import FakeEndpoint, Fault, serving
from tests.scripted import ScriptedScorer, policy_for, said

QUESTION = Question(example_id="q1", question="Capital of Italy?")
BUSY, BROKEN = Fault(status=429), Fault(truncated=True)


def config(primary: FakeEndpoint, auxiliary: FakeEndpoint, **more: Any) -> EnsembleConfig:
    def server(endpoint: FakeEndpoint, name: str) -> dict[str, Any]:
        return {"endpoint": {"url": endpoint.url, "model": "fake", "name": name, "max_retries": 0, "timeout_s": 5}}

    return EnsembleConfig.model_validate(
        {
            "primary": server(primary, "primary"),
            "auxiliaries": [server(auxiliary, name) for name in ("Ada", "Bo")],
            "route": "dialogue",
            "signals": {"prompted": True},
            **more,
        }
    )


def waiting(member: MemberConfig, timeout_s: float) -> MemberConfig:
    """The same server, given this long for an answer."""
    return member.model_copy(update={"endpoint": member.endpoint.model_copy(update={"timeout_s": timeout_s})})


async def predicted(settings: EnsembleConfig, confidences: dict[str, Any], limits: Limits = Limits()) -> Prediction:
    scorer = ScriptedScorer(confidences)
    scorer.signals = frozenset({"verbalized_confidence"})
    primary = load_primary(settings, scorer.signals)
    auxiliaries = [load_auxiliary(member) for member in settings.auxiliaries]
    predictor: Predictor = build_predictor(settings, primary, auxiliaries, scorer)
    assert predictor.fingerprints == ensemble_fingerprints(settings, "scorer")
    policy = replace(policy_for(0.7, route="dialogue"), fingerprints=predictor.fingerprints)
    try:
        return await predictor.predict(QUESTION, policy=policy, limits=limits)
    finally:
        for member in (primary, *auxiliaries):
            await member.close()


def primary_says(prompt: str) -> str:
    return "85" if "proposed answer" in prompt.lower() or "confiden" in prompt.lower() else "Rome"


def test_servers_refine_in_json_and_their_faults_cost_attempts() -> None:
    with serving(primary_says) as primary, serving(said("Milan"), faults=[BUSY, BROKEN]) as auxiliary:
        found = asyncio.run(predicted(config(primary, auxiliary), {"Rome": 0.4, "Milan": 0.9}))
    assert (found.decision, found.answer, found.reason) == ("answer", "Milan", "refined")
    turns = [entry for entry in found.trace if entry["stage"] == "turn"]
    assert [turn["attempts"] for turn in turns] == [3, 1]
    formats = [seen["body"]["response_format"]["type"] for seen in auxiliary.seen]
    assert formats == ["json_schema"] * 4
    draft = found.trace[0]
    assert draft["signals"] == {"verbalized_confidence": 0.85}
    assert found.calls == 2 + 4 + 1  # draft and its confidence, turns, confidence of the refined answer
    assert found.tokens == 10 * (2 + 2 + 1)  # as the servers count them, of the replies that could be read


def test_a_server_that_stalls_is_left_at_the_deadline() -> None:
    """Before its own time is up, after which it would be asked again."""
    with serving(primary_says) as primary, serving(said("Milan"), faults=[Fault(stall_s=600)] * 9) as auxiliary:
        settings = config(primary, auxiliary)
        patient = settings.model_copy(update={"auxiliaries": [waiting(one, 300) for one in settings.auxiliaries]})
        found = asyncio.run(predicted(patient, {"Rome": 0.4, "Milan": 0.9}, Limits(deadline_s=2.0)))
        while not auxiliary.abandoned:
            time.sleep(0.01)
    assert (found.decision, found.reason, found.answer) == ("abstain", "deadline", None)
    assert (len(auxiliary.seen), auxiliary.abandoned) == (1, 1)


def test_servers_that_say_nothing_readable_fail_the_answer() -> None:
    with serving(primary_says) as primary, serving("I would rather not.") as auxiliary:
        found = asyncio.run(predicted(config(primary, auxiliary), {"Rome": 0.4}))
    assert (found.decision, found.reason, found.answer) == ("abstain", "route_failed", None)
    assert len(auxiliary.seen) == 3

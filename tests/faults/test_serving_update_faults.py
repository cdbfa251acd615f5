"""Changes under load: thresholds, versions, versions that do not start, more and fewer replicas."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from stitch_ray.reliability.policy import Policy
from tests.faults.fault_table import FaultTable
from tests.faults.judged_load import asking
from tests.faults.judging import RIGHT
from tests.faults.served import MEMBERS, Served
from tests.serving.scripted import scripted_policy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TWO: dict[str, Any] = {"gateway": {"min_replicas": 2, "max_replicas": 2}, "ensemble": {"limits": {"deadline_s": 30.0}}}
APPLICATION: dict[str, Any] = {"latency_s": 0.1, "replicas": 2}
ALL = (*MEMBERS, "Gateway")


def pids(ensemble: Served) -> dict[str, list[int]]:
    return {deployment: ensemble.pids(deployment) for deployment in ALL}


def saved(ensemble: Served, name: str, threshold: float, version: str = "1") -> tuple[str, Policy]:
    """A policy with this threshold for members of `version`, and its file."""
    policy = scripted_policy(ensemble.config(), {0.1: threshold}, version=version)
    policy.save(ensemble.folder / name / "policy.json")
    return str(ensemble.folder / name / "policy.json"), policy


def test_a_new_threshold_restarts_nothing_and_every_answer_has_one_policy(
    ensemble: Served, thresholds: dict[str, float], fault_table: FaultTable
) -> None:
    assert ensemble.deploy(TWO, **APPLICATION) is None
    before = pids(ensemble)
    path, stricter = saved(ensemble, "stricter", 0.85)
    both = {**thresholds, stricter.version: 0.85}
    with asking(ensemble.url, both) as clients:
        clients.for_s(3)
        changed_at = clients.now
        assert ensemble.deploy({**TWO, "policy": path}, **APPLICATION) is None
        deployed_at = clients.now
        clients.for_s(3)
    report = clients.report()
    versions = [one.response["policy_version"] for one in report.between(deployed_at).asked if one.response]
    note = (
        f"two versions, every response of exactly one; {deployed_at - changed_at:.1f} s until in force; no new process"
    )
    fault_table.add("new threshold through user_config", report, recovery_s=report.recovery_s(changed_at), note=note)
    assert report.verdicts.keys() == {RIGHT}, report.worst
    assert set(versions) == {stricter.version}
    assert pids(ensemble) == before

    foreign, _ = saved(ensemble, "foreign", 0.1, version="2")
    with asking(ensemble.url, {stricter.version: 0.85}) as clients:
        clients.for_s(2)
        assert ensemble.deploy({**TWO, "policy": foreign}, **APPLICATION) is None
        clients.for_s(3)
        health = httpx.get(f"{ensemble.url}/healthz", trust_env=False).json()
    report = clients.report()
    fault_table.add("policy that was made for other models", report, note="refused; the one before stays in force")
    assert report.verdicts.keys() == {RIGHT}, report.worst
    assert (health["status"], "calibrated for something else" in health["refused_policy"]) == ("degraded", True)
    assert pids(ensemble) == before


@pytest.mark.parametrize("replicas", [2, 1])
def test_a_new_version_of_every_deployment(
    ensemble: Served, thresholds: dict[str, float], fault_table: FaultTable, replicas: int
) -> None:
    """Two replicas: one after the other. One: the new one starts first."""
    config = {**TWO, "gateway": {"min_replicas": replicas, "max_replicas": replicas}}
    application = {**APPLICATION, "replicas": replicas}
    assert ensemble.deploy(config, **application) is None
    before = pids(ensemble)
    renewed = {**config, "http": {"max_characters": 30_000}}  # a gateway restarts with what its constructor is given
    with asking(ensemble.url, thresholds) as clients:
        clients.for_s(3)
        changed_at = clients.now
        assert ensemble.deploy(renewed, **application, builds=dict.fromkeys(MEMBERS, "-new")) is None
        seconds = clients.now - changed_at
        clients.for_s(4)
    report = clients.report()
    kind = "rolling" if replicas == 2 else "surge"
    fault_table.add(
        f"{kind} update of every deployment, {replicas} replica{'s' if replicas > 1 else ''}",
        report,
        recovery_s=report.recovery_s(changed_at),
        note=f"took {seconds:.0f} s",
    )
    assert report.verdicts.keys() == {RIGHT}, report.worst
    after = pids(ensemble)
    assert not any(set(before[name]) & set(after[name]) for name in ALL)


@pytest.mark.parametrize("replicas", [2, 1])
def test_another_model_with_its_policy(
    ensemble: Served, thresholds: dict[str, float], fault_table: FaultTable, replicas: int
) -> None:
    """Gateways that were made for the old model answer with it alone, new ones with the new."""
    config = {**TWO, "gateway": {"min_replicas": replicas, "max_replicas": replicas}}
    application = {**APPLICATION, "replicas": replicas}
    assert ensemble.deploy(config, **application) is None
    path, policy = saved(ensemble, "second", 0.6, version="2")
    both = {**thresholds, policy.version: 0.6}
    with asking(ensemble.url, both) as raw, asking(ensemble.url, both, through_client=True) as clients:
        clients.for_s(3)
        changed_at = clients.now
        assert ensemble.deploy({**config, "policy": path}, **application, version="2") is None
        seconds = clients.now - changed_at
        clients.for_s(4)
    report, bare = clients.report(), raw.report()
    fault_table.add(
        f"another model and its policy, {replicas} replica{'s' if replicas > 1 else ''}, stitch_ray.client",
        report,
        recovery_s=report.recovery_s(changed_at),
        control=f"bare HTTP: {bare.failures} of {len(bare.asked)} failed",
        note=f"took {seconds:.0f} s",
    )
    pairs = {
        (one.response["policy_version"], one.response["model_version"]) for one in bare.asked if one.verdict == RIGHT
    }  # type: ignore[index]
    assert len(pairs) == 2
    assert not bare.wrong, bare.worst
    assert report.verdicts.keys() == {RIGHT}, report.worst


@pytest.mark.parametrize("replicas", [2, 1])
def test_a_new_version_that_does_not_start(
    ensemble: Served, thresholds: dict[str, float], fault_table: FaultTable, replicas: int
) -> None:
    application = {**APPLICATION, "replicas": replicas}
    assert ensemble.deploy(TWO, **application) is None
    with asking(ensemble.url, thresholds) as clients:
        clients.for_s(3)
        ensemble.cannot_start("primary-1")
        error = ensemble.deploy(TWO, **application, builds={"Primary": "-broken"})
        clients.for_s(3)
        ensemble.cannot_start()
        assert ensemble.deploy(TWO, **application) is None
        clients.for_s(2)
    report = clients.report()
    note = "the command says so; the old version answers on"
    fault = f"new version whose constructor raises, {replicas} replica{'s' if replicas > 1 else ''}"
    fault_table.add(fault, report, control="deploy failed" if error else "", note=note)
    assert error is not None
    assert "did not start" in error
    assert report.verdicts.keys() == {RIGHT}, report.worst


def test_more_and_fewer_replicas(ensemble: Served, thresholds: dict[str, float], fault_table: FaultTable) -> None:
    one = {**TWO, "gateway": {"min_replicas": 1, "max_replicas": 1}}
    three = {**TWO, "gateway": {"min_replicas": 3, "max_replicas": 3}}
    assert ensemble.deploy(one, latency_s=0.1) is None
    with asking(ensemble.url, thresholds) as clients:
        clients.for_s(2)
        assert ensemble.deploy(three, latency_s=0.1, replicas=3) is None
        assert {ensemble.running()[name] for name in ALL} == {3}
        clients.for_s(3)
        assert ensemble.deploy(one, latency_s=0.1) is None
        clients.for_s(4)
    report = clients.report()
    fault_table.add("every deployment from 1 to 3 replicas and back", report)
    assert report.verdicts.keys() == {RIGHT}, report.worst

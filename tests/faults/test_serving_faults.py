"""The served ensemble under SIGKILL: replicas die, and no client sees it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.faults.fault_table import FaultTable
from tests.faults.judged_load import CLIENTS, Clients, asking
from tests.faults.killing import kill
from tests.faults.served import MEMBERS, Served
from tests.serving.scripted import scripted_policy

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TWO: dict[str, Any] = {"gateway": {"min_replicas": 2, "max_replicas": 2}, "ensemble": {"limits": {"deadline_s": 30.0}}}
APPLICATION: dict[str, Any] = {"latency_s": 0.1, "replicas": 2}
KILLS, MANY = 4, 24
"""Of one kind while nothing is protected, and clients then: a kill may meet a replica that had nothing to do."""


def kill_one(ensemble: Served, deployment: str) -> None:
    """And wait until another one has taken its place."""
    pids = ensemble.pids(deployment)
    kill(pids[0])
    ensemble.until_replaced(deployment, pids[:1], len(pids))


def kill_until_seen(ensemble: Served, clients: Clients, deployment: str) -> int:
    """Failures that killing replicas cost; 0 if nobody saw any."""
    before = clients.report().failures
    for _ in range(KILLS):
        kill_one(ensemble, deployment)
        clients.for_s(1)
        if failures := clients.report().failures - before:
            return failures
    return 0


@pytest.fixture(scope="module")
def unprotected(ensemble: Served) -> dict[str, int]:
    """Failures that a kill costs where calls, and turns of a dialogue, are made once."""
    limits: dict[str, Any] = {**TWO["ensemble"], "dialogue": {"attempts": 1}}
    policy = scripted_policy(ensemble.config(ensemble=limits), {0.1: 0.7})
    path = ensemble.folder / "unprotected" / "policy.json"
    policy.save(path)
    once = {**TWO, "ensemble": limits, "fault_tolerance": False, "policy": str(path)}
    assert ensemble.deploy(once, **APPLICATION) is None
    found = {}
    for deployment in (*MEMBERS, "Recorder"):
        feedback = deployment == "Recorder"
        with asking(ensemble.url, {policy.version: 0.7}, clients=MANY, feedback=feedback) as clients:
            clients.for_s(1)
            found[deployment] = kill_until_seen(ensemble, clients, deployment)
        assert not clients.report().wrong
    return found


@pytest.mark.parametrize("deployment", [*MEMBERS, "Recorder"])
def test_a_killed_replica_is_not_noticed(
    ensemble: Served,
    thresholds: dict[str, float],
    unprotected: dict[str, int],
    fault_table: FaultTable,
    deployment: str,
) -> None:
    assert unprotected[deployment], "without protection nobody saw it either"
    kept = {"feedback": {"folder": str(ensemble.folder / "feedback")}}  # a recorder without one forgets when it dies
    assert ensemble.deploy({**TWO, **kept}, **APPLICATION) is None
    with asking(ensemble.url, thresholds, feedback=deployment == "Recorder") as clients:
        clients.for_s(4)
        killed_at = clients.now
        kill_one(ensemble, deployment)
        clients.for_s(3)
        kill_one(ensemble, deployment)
        clients.for_s(3)
    report = clients.report()
    recovery_s = report.recovery_s(killed_at)
    shown = f"{unprotected[deployment]} failed without retries"
    replicas = 1 if deployment == "Recorder" else 2
    fault = f"SIGKILL {deployment}, {replicas} replica{'s' if replicas > 1 else ''}, twice"
    fault_table.add(fault, report, recovery_s=recovery_s, control=shown)
    assert report.verdicts.keys() == {"right"}, report.worst
    assert report.between(killed_at).asked, "nobody asked after the kill"


def test_a_killed_gateway_costs_what_it_was_working_on_and_our_client_nothing(
    ensemble: Served, thresholds: dict[str, float], fault_table: FaultTable
) -> None:
    assert ensemble.deploy(TWO, **APPLICATION) is None
    with asking(ensemble.url, thresholds) as raw:
        raw.for_s(3)
        failures = kill_until_seen(ensemble, raw, "Gateway")
    report = raw.report()
    shown = ", ".join(f"{verdict}: {count}" for verdict, count in report.verdicts.items() if verdict != "right")
    fault_table.add("SIGKILL Gateway, 2 replicas, bare HTTP", report, note=shown)
    assert 0 < failures <= CLIENTS
    assert not report.wrong

    with asking(ensemble.url, thresholds, through_client=True) as clients:
        clients.for_s(4)
        killed_at = clients.now
        for _ in range(3):
            kill_one(ensemble, "Gateway")
            clients.for_s(3)
    report = clients.report()
    recovery_s = report.recovery_s(killed_at)
    fault = "SIGKILL Gateway, 2 replicas, three times, stitch_ray.client"
    fault_table.add(fault, report, recovery_s=recovery_s, control=f"{failures} failed with bare HTTP")
    assert report.verdicts.keys() == {"right"}, report.worst
    assert report.between(killed_at).asked, "nobody asked after the first kill"

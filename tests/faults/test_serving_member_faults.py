"""Members that are away, late or talk nonsense: abstentions that say so, and nothing else changes."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.faults.fault_table import FaultTable
from tests.faults.judged_load import asking, cycle
from tests.faults.judging import RIGHT, WITHHELD, Report
from tests.faults.killing import kill
from tests.faults.served import Served

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HASTY: dict[str, Any] = {
    "gateway": {"min_replicas": 2, "max_replicas": 2},
    "ensemble": {"limits": {"deadline_s": 2.0}},
}
APPLICATION: dict[str, Any] = {"latency_s": 0.03, "replicas": 2}
ASKED_S = 8.0
FAULTS = {
    "auxiliary fails": ("draft=0.3 auxiliary=error", "route_failed"),
    "auxiliary beyond the deadline": ("draft=0.3 auxiliary=slow", "deadline"),
    "auxiliary talks nonsense": ("draft=0.3 auxiliary=garbage", "route_failed"),
    "scorer fails": ("draft=0.9 scorer=error", "scorer_unavailable"),
    "scorer beyond the deadline": ("draft=0.9 scorer=slow", "deadline"),
    "scorer says NaN": ("draft=0.9 scorer=nan", "scorer_unavailable"),
    "scorer says nothing": ("draft=0.9 scorer=none", "scorer_unavailable"),
}


def test_a_fault_of_one_question_is_told_and_harms_no_other(
    ensemble: Served, thresholds: dict[str, float], fault_table: FaultTable
) -> None:
    assert ensemble.deploy(HASTY, **APPLICATION) is None
    with asking(ensemble.url, thresholds) as alone:
        alone.for_s(4)
    for fault, (text, reason) in FAULTS.items():
        with asking(ensemble.url, thresholds, ask=cycle(text)) as clients:
            clients.for_s(ASKED_S)
        report = clients.report()
        told = [one for one in report.asked if one.question.startswith(text)]
        others = Report([one for one in report.asked if not one.question.startswith(text)])
        reasons = {one.response["reason"] for one in told if one.response is not None}
        note = (
            f"median of the others {others.quantile(0.5):.2f} s, {alone.report().quantile(0.5):.2f} s without the fault"
        )
        control = f"{len(told)} abstained: {reason}"
        fault_table.add(f"{fault} (every second question)", report, control=control, note=note)
        assert report.verdicts.keys() == {RIGHT}, report.worst
        assert told
        assert reasons == {reason}
        assert others.asked


@pytest.mark.parametrize(
    ("deployment", "version", "withheld"),
    [("Auxiliary1", "first-1", "refined"), ("ReliabilityScorer", "scorer-1", "all")],
)
def test_all_replicas_of_a_member_are_down(
    ensemble: Served,
    thresholds: dict[str, float],
    fault_table: FaultTable,
    deployment: str,
    version: str,
    withheld: str,
) -> None:
    """They are killed, and cannot start until they can: it comes back by itself."""
    assert ensemble.deploy(HASTY, **APPLICATION) is None
    with asking(ensemble.url, thresholds) as clients:
        clients.for_s(3)
        ensemble.cannot_start(version)
        killed_at = clients.now
        victims = ensemble.pids(deployment)
        for pid in victims:
            kill(pid)
        clients.for_s(8)
        mended_at = clients.now
        ensemble.cannot_start()
        ensemble.until_replaced(deployment, victims, 2)
        back_at = clients.now
        clients.for_s(6)
    report = clients.report()
    during, after = report.between(killed_at, mended_at), report.between(back_at + 2)
    sure = Report([one for one in report.asked if int(one.question.split()[1]) % 3 == 0])
    fault = f"all replicas of {deployment} down, cannot start for 8 s"
    note = f"{during.verdicts[WITHHELD]} abstained while down; back {back_at - mended_at:.1f} s after it could start"
    fault_table.add(fault, report, failures=report.failures - report.verdicts[WITHHELD], note=note)
    assert report.verdicts.keys() == {RIGHT, WITHHELD}, report.worst
    assert during.verdicts[WITHHELD]
    assert after.verdicts.keys() == {RIGHT}, after.worst
    if withheld == "refined":
        assert sure.verdicts.keys() == {RIGHT}, sure.worst


def test_errors_in_place_of_abstentions_where_they_are_asked_for(
    ensemble: Served, thresholds: dict[str, float], fault_table: FaultTable
) -> None:
    errors = {**HASTY, "ensemble": {**HASTY["ensemble"], "on_failure": "error"}}
    assert ensemble.deploy(errors, **APPLICATION) is None
    told = {
        "deadline": (504, "deadline"),
        "route_failed": (503, "unavailable"),
        "scorer_unavailable": (503, "unavailable"),
    }
    for fault, (text, reason) in FAULTS.items():
        response = httpx.post(f"{ensemble.url}/v1/predict", json={"question": text}, timeout=60, trust_env=False)
        if fault in (
            "scorer says NaN",
            "scorer says nothing",
        ):  # it answered that it cannot tell: no failure of its own
            assert response.status_code == 200, (fault, response.text)
            body = response.json()
            assert (body["answer"], body["decision"], body["reason"]) == (None, "abstain", reason), fault
        else:
            assert (response.status_code, response.json()["error"]["type"]) == told[reason], (fault, response.text)
    with asking(ensemble.url, thresholds, ask=cycle(*(text for text, _ in FAULTS.values()))) as clients:
        clients.for_s(ASKED_S)
    report = clients.report()
    failed = {verdict for verdict in report.verdicts if verdict != RIGHT}
    asked_for = sum(one.failed for one in report.asked if not one.question.startswith("question"))
    fault_table.add(
        "the same with on_failure: error", report, failures=report.failures - asked_for, note=f"{asked_for} 503 and 504"
    )
    assert failed == {"503", "504"}, report.worst
    assert asked_for == report.failures

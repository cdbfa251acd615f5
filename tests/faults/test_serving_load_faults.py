"""Clients that ask too much, leave early, or send what nobody should."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from tests.faults.fault_table import FaultTable
from tests.faults.judged_load import asking
from tests.faults.judging import RIGHT, Report
from tests.faults.served import Served
from tests.serving.hostile import check_hostile

pytestmark = [pytest.mark.ray, pytest.mark.slow]

AT_ONCE, SLEEP_S = 16, 0.3
"""Requests that the gateway works on, and the seconds of each."""

OVERLOAD = 10
LEAVE = 200
LARGEST_GROWTH = 64 * 1024 * 1024


def resident(pids: list[int]) -> int:
    """Bytes of memory, all together."""
    pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
    return sum(pages) * 4096


@pytest.mark.parametrize("refused_by", ["gateway", "proxy"])
def test_ten_times_as_much_as_can_be_done(
    ensemble: Served, thresholds: dict[str, float], fault_table: FaultTable, refused_by: str
) -> None:
    """The gateway refuses at once what it has no room for; where it is not asked at all, Serve does."""
    narrow = {"max_ongoing_requests": AT_ONCE, "target_ongoing_requests": 8, "max_queued_requests": 8}
    changes: dict[str, Any] = {"http": {"max_in_flight": AT_ONCE}} if refused_by == "gateway" else {"gateway": narrow}
    assert ensemble.deploy(changes) is None

    def ask(number: int, _: Any) -> str:
        return f"question {number} sleep={SLEEP_S} draft=0.9"

    with asking(ensemble.url, thresholds, ask=ask, clients=OVERLOAD * AT_ONCE, pause_s=0.2) as clients:
        clients.for_s(4)
        before, sizes = resident(ensemble.pids("Gateway")), []
        for _ in range(10):
            clients.for_s(1)
            sizes.append(resident(ensemble.pids("Gateway")))
    report = clients.report()
    admitted = Report([one for one in report.asked if one.verdict == RIGHT])
    refused = report.failures
    note = (
        f"{refused} told to come back, {clients.retry_after} with Retry-After; p99 of the others "
        f"{1000 * admitted.quantile(0.99):.0f} ms; memory of the gateway {(max(sizes) - before) / 2**20:+.0f} MiB"
    )
    fault_table.add(
        f"{OVERLOAD} x as many clients as there is room for, refused by the {refused_by}", report, failures=0, note=note
    )
    assert report.verdicts.keys() <= {RIGHT, "429", "503"}, report.verdicts
    assert refused
    assert clients.retry_after == refused
    assert admitted.asked
    assert max(sizes) - before <= LARGEST_GROWTH
    with asking(ensemble.url, thresholds) as clients:
        clients.for_s(2)
    assert clients.report().verdicts.keys() == {RIGHT}


def test_clients_that_leave_take_their_work_with_them(
    ensemble: Served, thresholds: dict[str, float], fault_table: FaultTable
) -> None:
    assert ensemble.deploy({"http": {"max_in_flight": LEAVE}, "ensemble": {"limits": {"deadline_s": 60.0}}}) is None
    started, cancelled = (ensemble.calls(what) for what in ("ScriptedPrimary", "cancelled answer"))

    async def leave() -> int:
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:

            async def one(number: int) -> None:
                body = {"question": f"question {number} sleep=50 draft=0.9", "stream": number % 2 == 0}
                async with session.post(f"{ensemble.url}/v1/predict", json=body) as reply:
                    await reply.read()

            asking = [asyncio.ensure_future(one(number)) for number in range(LEAVE)]
            while ensemble.calls("ScriptedPrimary") - started < AT_ONCE:  # many are at work, the others wait
                await asyncio.sleep(0.05)
            for task in asking:
                task.cancel()
            return len(await asyncio.gather(*asking, return_exceptions=True))

    assert asyncio.run(leave()) == LEAVE
    left_at = time.monotonic()

    def all_cancelled() -> bool:
        mine = ensemble.calls("cancelled answer") - cancelled
        return mine > 0 and ensemble.calls("ScriptedPrimary") - started == 2 * mine

    seconds = ensemble.until(all_cancelled, "the work of those who left is over")
    begun = ensemble.calls("cancelled answer") - cancelled

    # As many as may be under way: one place that is still held would have one of them refused.
    def ask(number: int, _: Any) -> str:
        return f"question {number} sleep=0.5 draft=0.9"

    with asking(ensemble.url, thresholds, ask=ask, clients=LEAVE) as clients:
        clients.for_s(4)
    report = clients.report()
    note = f"{LEAVE} left; {begun} had begun, all cancelled after {seconds:.1f} s; then {LEAVE} at a time are let in"
    fault_table.add(
        f"{LEAVE} clients leave", report, recovery_s=time.monotonic() - left_at if seconds > 5 else seconds, note=note
    )
    assert report.verdicts.keys() == {RIGHT}, report.worst
    ensemble.until(lambda: in_flight(ensemble) == 0, "the gauge is back at 0")


def in_flight(ensemble: Served) -> float:
    """As /metrics shows it, all gateways together."""
    text = httpx.get(f"{ensemble.url}/metrics", trust_env=False).text
    values = [line.rsplit(" ", 1)[1] for line in text.splitlines() if line.startswith("ray_stitch_in_flight{")]
    return sum(map(float, values)) if values else float("nan")


def test_hostile_requests_are_refused_and_harm_nobody(
    ensemble: Served, thresholds: dict[str, float], fault_table: FaultTable
) -> None:
    assert ensemble.deploy({"http": {"max_body_bytes": 1_000_000}}) is None
    with asking(ensemble.url, thresholds) as clients:
        sent = check_hostile(ensemble.url, behind_serve=True)
        clients.for_s(1)
    report = clients.report()
    fault_table.add(
        "hostile requests beside the clients", report, note=f"{sent} kinds; a 5xx for one, from Serve itself"
    )
    assert report.verdicts.keys() == {RIGHT}, report.worst

"""What the gateway costs when models cost nothing: tokens, validation, decisions, metrics and calls of members are real."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from benchmarks.harness import median, table
from benchmarks.served import bare, controller
from benchmarks.served.load import Load, measure
from benchmarks.served.session import AUTHORIZED, CONFIDENT, DIALOGUE, served

PROFILES = ("throughput", "default")
BARE = "hand-written graph"
"""Under the throughput profile as well."""

SIDES = (*PROFILES, BARE)
MANY = 16
Routes = Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]

ROUTES: Routes = {
    "confident": (CONFIDENT, {"reason": "confident", "answer": "draft 0.9"}),
    "dialogue": (DIALOGUE, {"reason": "refined", "answer": "refined 0.8", "calls": 4}),
}
"""Route -> the question, and what its response must hold. The dialogue has two turns: draft, 2 turns, signals, 2 scores."""

BARE_ROUTES = {"confident": (bare.CONFIDENT, bare.CONFIDENT), "dialogue": (bare.DIALOGUE, bare.DIALOGUE)}

BARS_MS = {"confident": 4.5, "dialogue": 10.0}
BAR_RATE = 3.5

Rounds = dict[tuple[str, str, int], list[Load]]


def compare(rounds: int, requests: int) -> tuple[str, dict[str, Any]]:
    """Both profiles, in sessions that take turns: each has two, which share the rounds."""
    found: Rounds = defaultdict(list)
    for part in ((rounds + 1) // 2, rounds // 2):
        for profile in PROFILES if part else ():
            with served(profile) as child:
                child.deploy()
                if child.profile != profile:
                    raise RuntimeError(f"the session has profile {child.profile}, and {profile} was asked for")
                sides: dict[str, tuple[str, Routes]] = {profile: (f"{child.url}/v1/predict", ROUTES)}
                if profile == "throughput":
                    sides[BARE] = (child.deploy_bare(), BARE_ROUTES)
                _rounds(found, sides, part, requests)
    lines = [_line(side, route, found) for side in SIDES for route in ROUTES]
    return f"{table(lines)}\n\n{_note(found, rounds, requests)}", {
        f"{side} {route} c={clients}": [load.facts() for load in loads]
        for (side, route, clients), loads in found.items()
    }


def _rounds(found: Rounds, sides: Mapping[str, tuple[str, Routes]], rounds: int, requests: int) -> None:
    """The sides take turns within a round, so that all meet the machine in the same mood."""
    for number in range(-1, rounds):  # the first warms up
        for route in ROUTES:
            for clients, num in ((1, requests), (MANY, 2 * requests)):
                for side, (url, routes) in sides.items():
                    body, due = routes[route]
                    sent = num if number >= 0 else num // 2
                    load = measure(url, [body], clients=clients, requests=sent, headers=AUTHORIZED, due=due).check()
                    if number < 0:
                        continue
                    found[side, route, clients].append(load)
                    shown = (
                        f"p50 {load.quantile_ms(0.5):.2f} ms, p99 {load.quantile_ms(0.99):.2f} ms, {load.rate:.0f}/s"
                    )
                    print(f"  {side} {route} c={clients}: {shown}", file=sys.stderr, flush=True)


def _line(side: str, route: str, found: Rounds) -> dict[str, str]:
    one, many = found[side, route, 1], found[side, route, MANY]
    rates = [load.rate for load in many]
    return {
        "profile": side,
        "route": route,
        "c=1 p50 ms, every round": " ".join(f"{load.quantile_ms(0.5):.2f}" for load in one),
        "median p50": f"{_p50(one):.2f}",
        "median p99": f"{median([load.quantile_ms(0.99) for load in one]):.2f}",
        f"c={MANY} requests/s, every round": " ".join(f"{rate:.0f}" for rate in rates),
        "median requests/s": f"{median(rates):.0f}",
        f"c={MANY} p99 ms": f"{median([load.quantile_ms(0.99) for load in many]):.0f}",
    }


def _note(found: Rounds, rounds: int, requests: int) -> str:
    verdicts = []
    for route, bar in BARS_MS.items():
        p50 = _p50(found["throughput", route, 1])
        verdicts.append(f"{route} p50 {p50:.2f} ms (bar {bar:g}: {'met' if p50 <= bar else 'MISSED'})")
    for route in ROUTES:
        tuned, plain = (median([load.rate for load in found[profile, route, MANY]]) for profile in PROFILES)
        times = tuned / plain
        verdicts.append(
            f"{route} {times:.2f} x the requests/s of Serve's defaults (bar {BAR_RATE:g}: "
            f"{'met' if times >= BAR_RATE else 'MISSED'})"
        )
    for route in ROUTES:
        times = _p50(found["throughput", route, 1]) / _p50(found[BARE, route, 1])
        verdicts.append(f"{route} p50 {times:.2f} x that of the hand-written graph")
    return (
        f"Scripted members that answer at once, one replica of each and of the gateway; clients on the same machine. "
        f"{rounds} rounds of {requests} requests (c=1) and {2 * requests} (c={MANY}) after one to warm up, the profiles' "
        f"sessions in turn; every response was checked. The hand-written graph makes the same calls one after the other and "
        f"does nothing else; it runs beside the ensemble and takes turns with it, so that the throughput sessions carry its five idle replicas "
        f"and the default ones do not. {'; '.join(verdicts)}."
    )


def _p50(loads: list[Load]) -> float:
    return median([load.quantile_ms(0.5) for load in loads])


def against_controller(rounds: int, requests: int) -> tuple[str, dict[str, Any]]:
    """The same load on a bare controller with a worker."""
    loads: dict[int, list[Load]] = {1: [], MANY: []}
    with controller.running() as url:
        for number in range(-1, rounds):
            for clients, num in ((1, requests), (MANY, 2 * requests)):
                load = measure(url, [CONFIDENT], clients=clients, requests=num).check()
                if number >= 0:
                    loads[clients].append(load)
    line = {
        "side": "front -> controller, front -> worker",
        "c=1 p50 ms, every round": " ".join(f"{load.quantile_ms(0.5):.2f}" for load in loads[1]),
        "median p50": f"{_p50(loads[1]):.2f}",
        "median p99": f"{median([load.quantile_ms(0.99) for load in loads[1]]):.2f}",
        f"c={MANY} requests/s, every round": " ".join(f"{load.rate:.0f}" for load in loads[MANY]),
        "median requests/s": f"{median([load.rate for load in loads[MANY]]):.0f}",
    }
    note = (
        "A minimal server of our own in the shape of FastChat (not FastChat itself): three FastAPI processes on loopback, "
        "no-op model. It has two inner calls, as our confident route has (primary, scorer), and none of: tokens, "
        "validated bodies, confidence, decision, trace, metrics, retries, replicas, deadlines, feedback."
    )
    return f"{table([line])}\n\n{note}", {str(clients): [load.facts() for load in of] for clients, of in loads.items()}

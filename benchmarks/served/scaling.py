"""More replicas, more requests: set by hand, and by Serve under a load that comes and goes."""

from __future__ import annotations

import asyncio
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import median, table
from benchmarks.served.load import Load, ask_all, measure
from benchmarks.served.session import AUTHORIZED, CONFIDENT, Child, served

REPLICAS = (1, 2, 4)
LATENCY_S = 0.05
AT_ONCE = 4
CLIENTS = 32

PHASES = (1, CLIENTS, 1)
TRACE_LATENCY_S = 0.1
TRACE_AT_ONCE = 8
_DUE = {"reason": "confident"}  # and not that time was up
AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 4,
    "target_ongoing_requests": 4,
    "upscale_delay_s": 2,
    "downscale_delay_s": 4,
    "look_back_period_s": 2,
}
PUSH = {"RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1"}
_LOOK_S = 0.5


def by_hand(rounds: int, requests: int) -> tuple[str, dict[str, Any]]:
    """Requests a second with 1, 2 and 4 replicas of a primary that takes its time."""
    found: dict[int, list[Load]] = {}
    with served("throughput") as child:
        for replicas in REPLICAS:
            options = {
                "num_replicas": replicas,
                "max_ongoing_requests": AT_ONCE,
                "ray_actor_options": {"num_cpus": 0.1},
            }
            child.deploy(latency_s=LATENCY_S, primary=options)
            num = requests * replicas
            loads = [_load(child, CLIENTS, num) for _ in range(rounds + 1)]
            found[replicas] = loads[1:]
    one = median([load.rate for load in found[1]])
    lines = []
    for replicas, loads in found.items():
        rate, most = median([load.rate for load in loads]), replicas * AT_ONCE / LATENCY_S
        lines.append(
            {
                "replicas": replicas,
                "requests/s, every round": " ".join(f"{load.rate:.0f}" for load in loads),
                "median": f"{rate:.0f}",
                "x one": f"{rate / one:.2f}",
                "most possible": f"{most:.0f}",
                "share of it": f"{rate / most:.0%}",
                "p50 ms": f"{median([load.quantile_ms(0.5) for load in loads]):.0f}",
            }
        )
    note = (
        f"A primary that takes {LATENCY_S * 1000:g} ms and works on {AT_ONCE} requests a replica at a time, {CLIENTS} "
        "clients, confident route; most possible: replicas x requests at a time / seconds. All replicas share one machine."
    )
    return f"{table(lines)}\n\n{note}", {str(key): [load.facts() for load in loads] for key, loads in found.items()}


@dataclass(frozen=True, slots=True)
class Trace:
    """replicas: (seconds, number) whenever it was looked; phases: (begins, ends, clients, its load)."""

    replicas: list[tuple[float, int]]
    phases: list[tuple[float, float, int, Load]]


def by_serve(seconds: tuple[float, float, float], figure: Path | None) -> tuple[str, dict[str, Any]]:
    """1 client, then 32, then 1 again, for so many seconds each; the figure is written to `figure`."""
    with served("throughput", **PUSH) as child:
        options = {
            "max_ongoing_requests": TRACE_AT_ONCE,
            "autoscaling_config": AUTOSCALING,
            "ray_actor_options": {"num_cpus": 0.1},
        }
        child.deploy(latency_s=TRACE_LATENCY_S, primary=options)
        _load(child, 1, 20)
        trace = asyncio.run(_watched(child, seconds))
    if figure is not None:
        _draw(trace, figure)
    lines = []
    for begins, ends, clients, load in trace.phases:
        numbers = [number for at, number in trace.replicas if begins <= at < ends]
        settled = next((at - begins for at, number in trace.replicas if at >= begins and number == numbers[-1]), 0.0)
        lines.append(
            {
                "clients": clients,
                "seconds": f"{ends - begins:.0f}",
                "replicas at its start, end": f"{numbers[0]}, {numbers[-1]}",
                "reached after s": f"{settled:.1f}",
                "requests/s": f"{load.rate:.0f}",
                "p50 ms": f"{load.quantile_ms(0.5):.0f}",
                "p99 ms": f"{load.quantile_ms(0.99):.0f}",
                "failures": len(load.seconds) - load.statuses[200] + load.wrong,
            }
        )
    shown = f"\n\n![replicas over time]({figure.name})" if figure is not None else ""
    note = (
        f"A primary that takes {TRACE_LATENCY_S * 1000:g} ms, {TRACE_AT_ONCE} requests a replica at a time; "
        f"{', '.join(f'{key} {value}' for key, value in AUTOSCALING.items())}; gateways report their load every "
        f"{PUSH['RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S']} s."
    )
    facts = {
        "replicas": trace.replicas,
        "phases": [
            {"begins": begins, "ends": ends, "clients": clients, **load.facts()}
            for begins, ends, clients, load in trace.phases
        ],
    }
    return f"{table(lines)}{shown}\n\n{note}", facts


async def _watched(child: Child, seconds: tuple[float, float, float]) -> Trace:
    trace = Trace([], [])
    began = time.monotonic()

    async def look() -> None:
        while True:
            found = await asyncio.to_thread(child.replicas)
            trace.replicas.append((time.monotonic() - began, found["Primary"]))
            await asyncio.sleep(_LOOK_S)

    watch = asyncio.create_task(look())
    for clients, length in zip(PHASES, seconds, strict=True):
        begins = time.monotonic() - began
        load = await ask_all(
            f"{child.url}/v1/predict", [CONFIDENT], clients=clients, seconds=length, headers=AUTHORIZED, due=_DUE
        )
        trace.phases.append((begins, time.monotonic() - began, clients, load))
        print(f"  {clients} clients: {trace.replicas[-1][1]} replicas", file=sys.stderr, flush=True)
    watch.cancel()
    await asyncio.wait([watch])
    return trace


def _load(child: Child, clients: int, requests: int) -> Load:
    url = f"{child.url}/v1/predict"
    return measure(url, [CONFIDENT], clients=clients, requests=requests, headers=AUTHORIZED, due=_DUE).check()


def _draw(trace: Trace, figure: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 4.5), height_ratios=(1, 1))
    at, number = zip(*trace.replicas, strict=True)
    above.step(at, number, where="post", color="tab:blue")
    above.set_ylabel("replicas of the primary")
    above.set_ylim(0, AUTOSCALING["max_replicas"] + 0.5)
    for begins, ends, clients, load in trace.phases:
        for axes in (above, below):
            axes.axvspan(begins, ends, color="tab:orange" if clients > 1 else "tab:gray", alpha=0.12)
        above.text((begins + ends) / 2, 0.2, f"{clients} client{'s' if clients > 1 else ''}", ha="center")
        per_second: dict[int, int] = {}
        for done in load.done_at:
            per_second[int(done)] = per_second.get(int(done), 0) + 1
        whole = range(int(ends - begins))
        below.plot([begins + s for s in whole], [per_second.get(s, 0) for s in whole], color="tab:blue")
    below.set_ylabel("requests/s")
    below.set_xlabel("seconds")
    drawn.tight_layout()
    drawn.savefig(figure, dpi=110)
    pyplot.close(drawn)

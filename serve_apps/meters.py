"""Metrics of the ensemble, by Ray: every node's agent exports them under `ray_stitch_...`."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from stitch_ray.ensemble.serving.drift import Drift
from stitch_ray.ensemble.types import Prediction
from stitch_ray.reliability.monitor import RiskMonitor

_SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60]
_CONFIDENCES = [tick / 20 for tick in range(1, 20)]
_CALLS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
_TOKENS = [16, 64, 256, 1024, 4096, 16384]
_STAGES = frozenset({"draft", "score", "refine", "turn", "rescore", "decision"})
_ROUTES = frozenset(
    {
        "/v1/predict",
        "/v1/predict/batch",
        "/v1/score",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/policy",
        "/v1/policy/curve",
        "/v1/feedback",
        "/healthz",
        "/metrics",
        "/openapi.json",
        "/",
    }
)


class GatewayMeters:
    """Of one gateway; Ray adds them up over all."""

    def __init__(self) -> None:
        self._requests = Counter("stitch_requests", "requests", ("path", "status"))
        self._request_seconds = Histogram("stitch_request_seconds", "seconds a request", _SECONDS, ("path",))
        self._answers = Counter("stitch_answers", "questions decided", ("route", "decision", "reason", "task"))
        self._abstentions = Counter("stitch_abstentions", "questions not answered", ("reason",))
        self._confidence = Histogram("stitch_confidence", "confidence decided on", _CONFIDENCES, ("decision",))
        self._calls = Histogram("stitch_calls", "calls of models an answer", _CALLS, ("route",))
        self._tokens = Histogram("stitch_tokens", "tokens read and written an answer", _TOKENS, ("route",))
        self._stage_seconds = Histogram("stitch_stage_seconds", "seconds a stage of an answer", _SECONDS, ("stage",))
        self._retries = Counter("stitch_retries", "calls of members made again", ("member", "cause"))
        self._in_flight = Gauge("stitch_in_flight", "requests under way in a gateway", ())
        self._unsent = Gauge("stitch_unrecorded", "answers not yet told to the recorder", ())

    def request(self, path: str, status: int, seconds: float) -> None:
        """`path`: as it was asked for; unknown ones are counted together, for anybody can ask for anything."""
        known = path if path in _ROUTES else "/v1/models" if path.startswith("/v1/models/") else "other"
        self._requests.inc(1, {"path": known, "status": str(status)})
        self._request_seconds.observe(seconds, {"path": known})

    def answer(self, prediction: Prediction, tasks: frozenset[str]) -> None:
        """`tasks`: those whose names may stand in a metric; all others are counted as one."""
        decision, reason = str(prediction.decision), str(prediction.reason)
        task = prediction.task if prediction.task in tasks else ""
        self._answers.inc(1, {"route": prediction.route, "decision": decision, "reason": reason, "task": task or ""})
        if decision == "abstain":
            self._abstentions.inc(1, {"reason": reason})
        if prediction.confidence is not None:
            self._confidence.observe(prediction.confidence, {"decision": decision})
        self._calls.observe(prediction.calls, {"route": prediction.route})
        self._tokens.observe(prediction.tokens, {"route": prediction.route})
        for entry in prediction.trace:
            stage, seconds = entry.get("stage"), entry.get("seconds")
            if stage in _STAGES and isinstance(seconds, int | float):
                self._stage_seconds.observe(seconds, {"stage": stage})

    def retry(self, member: str, cause: str) -> None:
        self._retries.inc(1, {"member": member, "cause": cause})

    def levels(self, in_flight: int, unsent: int) -> None:
        self._in_flight.set(in_flight)
        self._unsent.set(unsent)


class RecorderMeters:
    """Of the recorder, of which there is one."""

    def __init__(self) -> None:
        promise = ("task", "target_risk")
        self._labels = Gauge("stitch_labelled_answers", "answers given that were labelled", promise)
        self._risk = Gauge("stitch_labelled_risk", "share of them that was wrong", promise)
        self._alarm = Gauge("stitch_promise_alarm", "1: the promise is no longer plausible", promise)
        self._drift = Gauge("stitch_drift_distance", "distance of live confidences from calibration", ())
        self._drift_alarm = Gauge("stitch_drift_alarm", "1: more than chance", ())

    def promise(self, task: str | None, target_risk: float, monitor: RiskMonitor) -> None:
        tags = {"task": task or "", "target_risk": f"{target_risk:g}"}
        self._labels.set(monitor.labels, tags)
        self._risk.set(monitor.total / monitor.labels, tags)
        self._alarm.set(float(monitor.alarm), tags)

    def drift(self, drift: Drift) -> None:
        self._drift.set(drift.distance)
        self._drift_alarm.set(float(drift.found))

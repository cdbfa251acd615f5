"""Configuration of `serve`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stitch_ray.config.base import Name, Strict
from stitch_ray.config.ensemble import AutoscalingConfig, EnsembleConfig


class HttpConfig(Strict):
    """Where the ensemble listens and what it takes."""

    host: str = Field("127.0.0.1", description="address to bind; anything but loopback needs a token")
    port: int = Field(8000, ge=0, le=65535, description="port")
    token_env: str | None = Field(None, description="environment variable with the bearer token")
    token_file: str | None = Field(None, description="or a file with one token a line")
    request_timeout_s: float = Field(120.0, gt=0, description="seconds after which the proxy gives up")
    max_body_bytes: int = Field(1_000_000, ge=1024, description="largest request body")
    max_characters: int = Field(32_768, ge=1, description="longest question or context")
    max_batch: int = Field(256, ge=1, description="most questions of one batch request")
    max_in_flight: int = Field(256, ge=1, description="requests a gateway works on; more are answered 429")


class FeedbackConfig(Strict):
    """What is kept of answers: numbers only, unless texts are asked for."""

    folder: str | None = Field(None, description="folder for feedback.jsonl and abstained.jsonl; default: not kept")
    remember: int = Field(100_000, ge=1, description="answers whose labels are still accepted")
    review_texts: bool = Field(False, description="abstained.jsonl holds question and draft, for people to look at")


class ServeConfig(Strict):
    """Serve the ensemble: HTTP, OpenAI-compatible, with a page."""

    PATHS = (
        *(f"ensemble.{key}" for key in EnsembleConfig.PATHS),
        "scorer",
        "policy",
        "http.token_file",
        "feedback.folder",
    )

    ensemble: EnsembleConfig = Field(description="the models")
    scorer: str = Field(description="run folder of train-scorer")
    policy: str = Field(description="policy.json or run folder of calibrate")
    name: Name = Field("stitch", description="name of the model in the OpenAI API, and of the Serve application")
    target_risk: float | None = Field(None, gt=0, lt=1, description="one of the policy's; default: its first")
    http: HttpConfig = Field(HttpConfig(), description="HTTP")  # type: ignore[call-arg]
    gateway: AutoscalingConfig = Field(
        AutoscalingConfig(max_ongoing_requests=512, target_ongoing_requests=64, max_queued_requests=256),  # type: ignore[call-arg]
        description="replicas of the gateway",
    )
    scoring: AutoscalingConfig = Field(
        AutoscalingConfig(max_ongoing_requests=128, target_ongoing_requests=32, max_queued_requests=1024),  # type: ignore[call-arg]
        description="replicas of the scorer",
    )
    scorer_gpus: float = Field(0, ge=0, description="GPUs a replica of the scorer")
    scorer_threads: int = Field(1, ge=1, description="torch threads a replica of the scorer (CPU)")
    ui: bool = Field(True, description="the page at /ui")
    feedback: FeedbackConfig = Field(FeedbackConfig(), description="labels that come back")  # type: ignore[call-arg]
    profile: Literal["throughput", "default"] = Field(
        "throughput", description="throughput: HAProxy and one event loop a replica; read before Ray starts"
    )
    fault_tolerance: bool = Field(True, description="repeat a call whose replica died, within the deadline")

    @model_validator(mode="after")
    def _safe(self) -> ServeConfig:
        if self.http.token_env and self.http.token_file:
            raise ValueError("give http.token_env or http.token_file, not both")
        exposed = self.http.host not in ("127.0.0.1", "localhost", "::1")
        if exposed and not (self.http.token_env or self.http.token_file):
            raise ValueError(
                f"http.host: {self.http.host} can be reached from other machines and needs http.token_env or token_file"
            )
        return self

"""Ray Serve: a scorer that gathers the requests of the moment into one forward. Used through a handle.

handle = serve.run(build("runs/train-scorer-1a2b3c4d"), name="scorer", route_prefix=None)
found = await handle.score.remote({"question": "...", "answer": "...", "signals": {"perplexity": 1.3}})
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Application

from serve_apps.calls import WrongVersion
from stitch_ray.reliability.scorer.batched import ScoreRequest, score_requests
from stitch_ray.reliability.scorer.combined import ReliabilityScorer

LARGEST_BATCH = 32


@serve.deployment(max_ongoing_requests=4 * LARGEST_BATCH, max_queued_requests=1024)
class ScorerDeployment:
    """One replica holds the whole scorer. While one batch is read, the next gathers."""

    def __init__(self, folder: str, batch_tokens: int | None, num_threads: int) -> None:
        self._scorer = ReliabilityScorer.load(folder, batch_tokens=batch_tokens, num_threads=num_threads)

    async def score(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """{question, answer, context?, signals?} -> {confidence, stack, encoder, reason}.

        `confidence` is null, with the reason, where the answer cannot be scored. Raises ValueError for a request that is
        none.
        """
        found: dict[str, Any] = await self._score_batch(ScoreRequest.parse(request))
        return found

    # Waiting for a batch to fill costs every lone request that wait; the forward under way gathers batches enough.
    @serve.batch(max_batch_size=LARGEST_BATCH, batch_wait_timeout_s=0)
    async def _score_batch(self, requests: list[ScoreRequest]) -> list[dict[str, Any]]:
        # In a thread: with Serve's throughput profile this event loop answers health checks too.
        return await asyncio.to_thread(score_requests, self._scorer, requests)

    async def call(self, version: str | None, method: str, args: Sequence[Any]) -> Any:
        """`score` or `describe`, as the other members of an ensemble are called. Raises WrongVersion."""
        if version is not None and version != self._scorer.fingerprint:
            raise WrongVersion(f"asked for version {version}, and this replica holds {self._scorer.fingerprint}")
        return self.describe() if method == "describe" else await self.score(*args)

    def describe(self) -> dict[str, Any]:
        """The scorer's fingerprint, and the signals that a request must bring."""
        return {"fingerprint": self._scorer.fingerprint, "signals": sorted(self._scorer.signals)}


def build(
    folder: str | Path,
    replicas: int = 1,
    *,
    batch_tokens: int | None = None,
    num_threads: int = 1,
    num_gpus: float = 0.0,
) -> Application:
    """The application for the scorer in a run folder of `train-scorer`, which all nodes must see.

    Raises UserError if the folder holds no usable scorer, before any replica starts.
    """
    from stitch_ray.reliability.scorer.file import ScorerFile

    ScorerFile.load(folder)
    deployment = ScorerDeployment.options(  # type: ignore[attr-defined]
        num_replicas=replicas, ray_actor_options={"num_cpus": num_threads, "num_gpus": num_gpus}
    )
    return deployment.bind(str(Path(folder).absolute()), batch_tokens, num_threads)

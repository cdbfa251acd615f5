"""Who answers: a local model through the template of the job, or a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stitch_ray.config.sample_answers import SampleAnswersConfig
from stitch_ray.engines.base import Engine, EngineError, Generation, RatingBatch, Request, TokenStatistics
from stitch_ray.errors import UserError
from stitch_ray.reliability.answers.questions import Prompter

_NOTHING_ELSE = "endpoint: a server of the chat API only answers; name signals and options that need no more"
"""Pre-flight refuses what would come here."""


@dataclass(frozen=True, slots=True)
class Respondent:
    """`together`: all samples of a question are asked for in one request."""

    engine: Engine
    together: bool


def respondent(config: SampleAnswersConfig, prompter: Prompter | None) -> Respondent:
    """Load the model that `config` names, or set up the client of its server."""
    if config.endpoint is not None:
        from stitch_ray.engines.openai_api import OpenAIEngine

        return Respondent(Server(OpenAIEngine(config.endpoint)), together=True)
    from stitch_ray.engines.registry import load_engine
    from stitch_ray.reliability.answers.templated import TemplatedEngine

    assert config.model is not None
    assert prompter is not None
    return Respondent(TemplatedEngine(load_engine(config.model), prompter.chat_template()), together=False)


class Server:
    """A server in the form of a synchronous engine: it answers, and that is all."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self.info = client.info

    def generate(self, requests: Sequence[Request]) -> list[list[Generation] | EngineError]:
        found: list[list[Generation] | EngineError] = self._client.generate_many(requests)
        return found

    def rate(self, batch: RatingBatch) -> NDArray[np.float32]:
        raise UserError(_NOTHING_ELSE)

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool] | EngineError]:
        raise UserError(_NOTHING_ELSE)

    def token_statistics(self, requests: Sequence[Request]) -> list[TokenStatistics | EngineError]:
        raise UserError(_NOTHING_ELSE)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        raise UserError(_NOTHING_ELSE)

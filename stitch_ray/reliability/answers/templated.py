"""An engine whose conversations go through the template of the job instead of the tokenizer's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from stitch_ray.data.quarantine import BadRow
from stitch_ray.engines.base import Engine, EngineError, Generation, RatingBatch, Request, TokenStatistics
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.records import Turn
from stitch_ray.reliability.answers.questions import prompt_ids

Answer = TypeVar("Answer")


class TemplatedEngine:
    """`engine` with every prompt of turns rendered by `template`: questions, and questions about answers, look alike.

    A conversation that the template does not take is an EngineError in its slot.
    """

    def __init__(self, engine: Engine, template: ChatTemplate) -> None:
        self._engine = engine
        self._template = template
        self.info = engine.info

    def rate(self, batch: RatingBatch) -> NDArray[np.float32]:
        return self._engine.rate(batch)

    def generate(self, requests: Sequence[Request]) -> list[list[Generation] | EngineError]:
        return self._each(requests, self._engine.generate)

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool] | EngineError]:
        return self._each(requests, self._engine.loglikelihood)

    def token_statistics(self, requests: Sequence[Request]) -> list[TokenStatistics | EngineError]:
        return self._each(requests, self._engine.token_statistics)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._engine.embed(texts)

    def _each(
        self, requests: Sequence[Request], call: Callable[[Sequence[Request]], list[Answer | EngineError]]
    ) -> list[Answer | EngineError]:
        rendered: list[Request] = []
        refused: dict[int, EngineError] = {}
        for slot, request in enumerate(requests):
            try:
                rendered.append(self._rendered(request))
            except BadRow as error:
                refused[slot] = EngineError(request.request_id, str(error))
        answers = iter(call(rendered))
        return [refused[slot] if slot in refused else next(answers) for slot in range(len(requests))]

    def _rendered(self, request: Request) -> Request:
        prompt = request.prompt
        if isinstance(prompt, str) or not prompt or not isinstance(prompt[0], Turn):
            return request
        turns = tuple(turn for turn in prompt if isinstance(turn, Turn))
        return replace(request, prompt=prompt_ids(turns, self._template))

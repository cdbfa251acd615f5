"""The route "exclude" (EXAR): the question again with the answers that were turned down excluded, each new one judged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from stitch_ray.config.ensemble import ExcludeConfig
from stitch_ray.engines.base import AsyncEngine, EngineError, EngineInfo, Request, Sampling
from stitch_ray.ensemble.asking import Asked, asked, seed_for
from stitch_ray.ensemble.budget import Budget
from stitch_ray.ensemble.cost import tokens_of
from stitch_ray.ensemble.rendering import RenderedEngine
from stitch_ray.ensemble.types import Answer, Event, Question, Refined, RouteFailed
from stitch_ray.exclusion.labels import CORRECT, WRONG
from stitch_ray.exclusion.prompts import exclusion_prompt, prompts_hash, validator_prompt
from stitch_ray.exclusion.refinement import Attempt, Refinement, Rules
from stitch_ray.records import content_hash
from stitch_ray.reliability.signals.prompted import from_likelihoods, reply_forms


class Validator(Protocol):
    """Who judges: an engine that tells which of two replies is the likelier."""

    @property
    def info(self) -> EngineInfo: ...

    async def compare(self, request: Request, word: str, other: str) -> tuple[float, int]:
        """P(word) / (P(word) + P(other)) as the reply, and the tokens that were read. Raises EngineError."""
        ...


async def compare(engine: RenderedEngine, request: Request, word: str, other: str) -> tuple[float, int]:
    """As `Validator.compare`, with a local model: see `probability_of`. A prompt counts once. Raises EngineError."""
    rendered = engine.rendered(request)
    forms = [
        Request(request_id=request.request_id, prompt=rendered.prompt, continuation=text)
        for text in reply_forms(word, other)
    ]
    lots = await asyncio.gather(*(engine.loglikelihood(form) for form in forms), return_exceptions=True)
    found: list[tuple[float, bool] | EngineError] = []
    for one in lots:
        if isinstance(one, BaseException) and not isinstance(one, EngineError):
            raise one
        found.append(one)
    probability = from_likelihoods(found)
    if isinstance(probability, EngineError):
        raise probability
    return probability, len(rendered.prompt) + 1


def exclude_fingerprint(config: ExcludeConfig, names: Sequence[str]) -> str:
    """`exclude:` and a hash of all that changes what is answered, the models' weights apart. `names`: of the members."""
    identity = {"prompts": prompts_hash(), "settings": config.model_dump(mode="json"), "members": list(names)}
    return f"exclude:{content_hash(identity)}"


class ExcludeRoute:
    """`answering` gives further answers, `validator` judges them; the draft counts as turned down.

    The first answer that the validator accepts is the refined one. If there is none, the refinement has failed: no
    answer that was turned down takes its place. Every answer and every verdict counts against the budget.
    """

    name = "exclude"

    def __init__(
        self,
        config: ExcludeConfig,
        answering: AsyncEngine,
        validator: Validator,
        names: Sequence[str],
        *,
        seed: int = 0,
    ) -> None:
        self._config = config
        self._answering = answering
        self._validator = validator
        self._name = names[0]
        self._seed = seed
        self._rules = Rules(
            max_attempts=config.max_attempts + 1,
            temperatures=(0.0, *config.temperatures),
            exclude=config.exclude,
            on_cycle=config.on_cycle,
            threshold=config.threshold,
        )
        self.fingerprint = exclude_fingerprint(config, names)
        members = (answering.info, validator.info) if len(names) > 1 else (answering.info,)
        self.auxiliaries = tuple(info.fingerprint for info in members)

    async def refine(self, question: Question, draft: Answer, budget: Budget) -> AsyncIterator[Event | Refined]:
        """A turn event after every attempt, then the answer. Raises RouteFailed, EngineError, or what `budget` raises."""
        shown = asked(question)
        state = Refinement(self._rules, (Attempt(answer=draft.text, temperature=0.0, checked="draft"),))
        before = budget.calls, budget.tokens
        while state.outcome is None:
            started = time.monotonic()
            attempt = await self._attempt(shown, state, budget)
            state = state.add(attempt)
            yield Event(
                "turn",
                {
                    "number": len(state.attempts) - 1,
                    "speaker": self._name,
                    "text": attempt.answer,
                    "comment": _told(attempt),
                    "changed": attempt.checked != "repeated",
                    "probability": attempt.probability,
                    "tokens": attempt.tokens + attempt.validator_tokens,
                    "seconds": round(time.monotonic() - started, 6),
                    "unchecked": True,
                },
            )
        outcome = state.outcome
        if outcome.answer is None:
            raise RouteFailed(f"none of {len(state.attempts) - 1} further answers was accepted ({outcome.reason})")
        yield Refined(
            text=outcome.answer,
            calls=budget.calls - before[0],
            tokens=budget.tokens - before[1],
            changed_by=self._name,
        )

    async def _attempt(self, shown: Asked, state: Refinement, budget: Budget) -> Attempt:
        config, number, warm = self._config, len(state.attempts), state.temperature
        request = Request(
            request_id=f"{shown.example_id}/exclude-{number}",
            prompt=exclusion_prompt(shown.turns, state.excluded),
            sampling=Sampling(
                max_tokens=config.max_tokens,
                temperature=warm,
                top_p=config.top_p if warm else 1.0,
                seed=seed_for(shown.asked, "exclude", number, self._seed),
                stop=tuple(config.stop),
            ),
        )
        budget.check()
        answers = await budget.wait_for(self._answering.generate(request))
        tokens = tokens_of(answers)
        budget.spend(1, tokens)
        text = answers[0].text
        checked, probability, judged = state.check(text), None, 0
        if checked == "judged":
            budget.check()
            prompt = validator_prompt(shown.turns, text)
            verdict = Request(request_id=f"{shown.example_id}/validate-{number}", prompt=prompt)
            probability, judged = await budget.wait_for(self._validator.compare(verdict, CORRECT, WRONG))
            budget.spend(1, judged)
        return Attempt(
            answer=text,
            temperature=warm,
            checked=checked,
            probability=probability,
            tokens=tokens,
            validator_tokens=judged,
        )


def _told(attempt: Attempt) -> str:
    if attempt.probability is not None:
        return f"P(CORRECT) {attempt.probability:.2f}"
    return {"repeated": "turned down before", "empty": "empty"}.get(attempt.checked, attempt.checked)

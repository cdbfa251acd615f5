"""The second stage: two auxiliaries refine the draft in dialogue."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from stitch_ray.config.ensemble import DialogueConfig
from stitch_ray.engines.base import AsyncEngine, EngineError, Generation, Request, Sampling
from stitch_ray.ensemble.asking import Asked, asked, seed_for
from stitch_ray.ensemble.budget import Budget
from stitch_ray.ensemble.cost import tokens_of
from stitch_ray.ensemble.dialogue import Dialogue, prompts_hash
from stitch_ray.ensemble.spoken import ReplyError, SpokenTurn, read_turn, turn_schema
from stitch_ray.ensemble.types import Answer, Event, Question, Refined, RouteFailed
from stitch_ray.records import content_hash

RETRY_TEMPERATURE = 0.7
_STOP_RULE = "same answer twice in a row"


def dialogue_fingerprint(config: DialogueConfig, names: Sequence[str]) -> str:
    """`dialogue:` and a hash of all that changes what is said, the models' weights apart. `names`: of the speakers."""
    identity = {
        "prompts": prompts_hash(),
        "schemas": [turn_schema(), turn_schema(config.max_tokens)],
        "settings": config.model_dump(mode="json"),
        "retry_temperature": RETRY_TEMPERATURE,
        "stop": _STOP_RULE,
        "speakers": list(names),
    }
    return f"dialogue:{content_hash(identity)}"


@dataclass(frozen=True, slots=True)
class _Heard:
    turn: SpokenTurn
    attempts: int
    tokens: int


class DialogueRoute:
    """Asks the two engines in turn, the first of them first; `names` are what they call each other.

    A turn that cannot be read, or that the engine could not give just now, is asked for again, up to `attempts` times:
    warmer, with another seed, and bounded in length where the reply had been cut off. If none is any good the
    refinement has failed; no earlier turn takes its place. Every attempt counts against the budget.
    """

    name = "dialogue"

    def __init__(
        self, config: DialogueConfig, engines: Sequence[AsyncEngine], names: Sequence[str], *, seed: int = 0
    ) -> None:
        if len(engines) != 2 or len(names) != 2:
            raise ValueError("a dialogue has two speakers")
        self._config = config
        self._engines = tuple(engines)
        self._names = (names[0], names[1])
        self._seed = seed
        self._unguided: set[int] = set()
        self.fingerprint = dialogue_fingerprint(config, names)
        self.auxiliaries = tuple(engine.info.fingerprint for engine in engines)

    async def refine(self, question: Question, draft: Answer, budget: Budget) -> AsyncIterator[Event | Refined]:
        """A turn event after every turn, then the answer. Raises RouteFailed, or what `budget` raises."""
        shown = asked(question)
        dialogue = Dialogue(
            question=shown.question,
            context=shown.context,
            draft=draft.text,
            speakers=self._names,
            max_turns=self._config.max_turns,
            stop_on_agreement=self._config.stop_on_agreement,
        )
        before = budget.calls, budget.tokens
        while not dialogue.finished:
            number, speaker, started = len(dialogue.turns), dialogue.speaker, time.monotonic()
            heard = await self._hear(dialogue, shown, budget)
            dialogue = dialogue.add(heard.turn)
            yield Event(
                "turn",
                {
                    "number": number + 1,
                    "speaker": speaker,
                    "text": heard.turn.answer,
                    "comment": heard.turn.comment,
                    "changed": dialogue.changed(number),
                    "attempts": heard.attempts,
                    "tokens": heard.tokens,
                    "seconds": round(time.monotonic() - started, 6),
                    "unchecked": True,
                },
            )
        yield Refined(
            text=dialogue.answer,
            calls=budget.calls - before[0],
            tokens=budget.tokens - before[1],
            changed_by=dialogue.changed_by,
        )

    async def _hear(self, dialogue: Dialogue, shown: Asked, budget: Budget) -> _Heard:
        """The speaker's turn, from the first attempt that can be read."""
        place = len(dialogue.turns) % 2
        guided, brief = place not in self._unguided, False
        tokens, reason = 0, ""
        for attempt in range(self._config.attempts):
            budget.check()
            request = self._request(dialogue, shown, attempt, guided=guided, brief=brief)
            try:
                answers = await budget.wait_for(self._engines[place].generate(request))
            except EngineError as error:
                budget.spend(1, 0)
                reason = error.reason
                if not error.retryable and not guided:
                    break
                guided = guided and error.retryable  # a server may refuse no more than the schema
                continue
            spent, cut = _cost(answers)
            budget.spend(1, spent)
            tokens += spent
            if not guided:
                self._unguided.add(place)
            try:
                turn = read_turn(answers[0].text if answers else "", cut=cut)
            except ReplyError as error:
                reason, brief = str(error), brief or cut
                continue
            return _Heard(turn, attempt + 1, tokens)
        raise RouteFailed(f"turn {len(dialogue.turns) + 1}, of {dialogue.speaker}: {reason}")

    def _request(self, dialogue: Dialogue, shown: Asked, attempt: int, *, guided: bool, brief: bool) -> Request:
        config, number = self._config, len(dialogue.turns) + 1
        sampling = Sampling(
            max_tokens=config.max_tokens,
            temperature=max(config.temperature, RETRY_TEMPERATURE) if attempt else config.temperature,
            seed=seed_for(shown.asked, f"dialogue-{number}", attempt, self._seed),
            json_schema=turn_schema(config.max_tokens if brief else None) if guided else None,
        )
        name = f"{shown.example_id}/dialogue-{number}-{attempt}"
        return Request(request_id=name, prompt=dialogue.prompt(), sampling=sampling)


def _cost(answers: Sequence[Generation]) -> tuple[int, bool]:
    """Tokens read and written, and whether the reply reached its longest length."""
    return tokens_of(answers), bool(answers) and answers[0].finish_reason == "length"

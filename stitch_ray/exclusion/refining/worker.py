"""The actor that takes batches of questions through all their attempts. A finished batch is one file, written by rename."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from stitch_ray.batch_files import audit, batch_file, count_attempt, readable, write_batch
from stitch_ray.config.exar import AttemptsConfig, ExarRefineConfig
from stitch_ray.engines.base import Engine, EngineError, Generation, Request, Sampling
from stitch_ray.exclusion.batch_work import BatchActor
from stitch_ray.exclusion.judges import Judge, ModelJudge, OracleJudge, RandomJudge, ScorerJudge
from stitch_ray.exclusion.prompts import exclusion_prompt
from stitch_ray.exclusion.refinement import Attempt, Refinement, Rules
from stitch_ray.reliability.answers.questions import Prompter, Question, read_questions
from stitch_ray.reliability.answers.sampling import sample_seed

ANSWER, VALIDATOR = "answer", "validator"
"""Names of the two adapters in the engine."""

RESULT_SCHEMA = pa.schema([("example_id", pa.string()), ("trace", pa.string()), ("problem", pa.string())])
"""One row a question: its attempts as JSON, and why it had to stop early, null if it did not."""

_ADVICE = "lower model.batch_tokens or attempts.max_tokens"


@dataclass(frozen=True, slots=True)
class RefineJob:
    """What an actor needs to know. `adapters`: name -> folder, those that are loaded beside the model.

    `judge_prompter`: of a validator that is another model.
    """

    config: ExarRefineConfig
    prompter: Prompter
    judge_prompter: Prompter | None
    adapters: dict[str, str]
    name: str
    questions: Path
    results: Path
    tries: Path
    call_log: str | None = None

    def is_done(self, batch_id: int) -> bool:
        return readable(batch_file(self.results, batch_id))


def rules_of(config: ExarRefineConfig) -> Rules:
    """The rules that the configuration names."""
    attempts = config.attempts
    return Rules(
        max_attempts=attempts.max_attempts,
        temperatures=tuple(attempts.temperatures),
        exclude=attempts.exclude,
        last=attempts.last,
        on_cycle=attempts.on_cycle,
        threshold=config.validator.threshold,
    )


class Refiner(BatchActor):
    """Loads its models when the first batch needs them."""

    def __init__(self, job: RefineJob) -> None:
        self._job = job

    @cached_property
    def _engine(self) -> Engine:
        from stitch_ray.engines.registry import load_engine
        from stitch_ray.reliability.answers.templated import TemplatedEngine

        engine = load_engine(self._job.config.model)
        for name, path in self._job.adapters.items():
            engine.load_adapter(name, path)  # type: ignore[attr-defined]
        return TemplatedEngine(engine, self._job.prompter.chat_template())

    @cached_property
    def _judge(self) -> Judge:
        validator = self._job.config.validator
        if validator.kind == "oracle":
            from stitch_ray.reliability.answers.labels import Labeller

            return OracleJudge(Labeller(self._job.config.labels))
        if validator.kind == "random":
            return RandomJudge(validator.accept, self._job.config.seed)
        if validator.kind == "scorer":
            from stitch_ray.reliability.scorer.combined import ReliabilityScorer

            return ScorerJudge(ReliabilityScorer.load(str(validator.scorer)))
        if validator.model is None:
            adapter = VALIDATOR if VALIDATOR in self._job.adapters else self._answering
            return ModelJudge(self._engine, self._job.prompter.chat_template(), adapter)
        from stitch_ray.engines.registry import load_engine
        from stitch_ray.reliability.answers.templated import TemplatedEngine

        assert self._job.judge_prompter is not None
        template = self._job.judge_prompter.chat_template()
        return ModelJudge(TemplatedEngine(load_engine(validator.model), template), template)

    @property
    def _answering(self) -> str | None:
        return ANSWER if ANSWER in self._job.adapters else None

    def do(self, batch_id: int) -> tuple[int, int]:
        job = self._job
        count_attempt(job.tries, batch_id, _ADVICE)
        questions = read_questions(batch_file(job.questions, batch_id))
        audit(job.call_log, "refine", batch_id, len(questions))
        found, problems = self._refine(questions)
        rows = [
            {"example_id": one.example_id, "trace": json.dumps(state.trace()), "problem": problems.get(number)}
            for number, (one, state) in enumerate(zip(questions, found, strict=True))
        ]
        tokens = sum(state.tokens for state in found)
        write_batch(batch_file(job.results, batch_id), pa.Table.from_pylist(rows, RESULT_SCHEMA), {"tokens": tokens})
        return len(rows), tokens

    def _refine(self, questions: Sequence[Question]) -> tuple[list[Refinement], dict[int, str]]:
        """All attempts at all questions, one attempt of every open question at a time."""
        states = [Refinement(rules_of(self._job.config)) for _ in questions]
        problems: dict[int, str] = {}
        for _ in range(self._job.config.attempts.max_attempts):
            places = [n for n, state in enumerate(states) if state.outcome is None and n not in problems]
            if not places:
                break
            requests = [self._request(questions[n], states[n]) for n in places]
            answers: dict[int, Generation] = {}
            for place, reply in zip(places, self._engine.generate(requests), strict=True):
                if isinstance(reply, EngineError):
                    problems[place] = reply.reason
                else:
                    answers[place] = reply[0]
            judged = [place for place, answer in answers.items() if states[place].check(answer.text) == "judged"]
            verdicts = self._judge.judge([(questions[n], answers[n].text) for n in judged]) if judged else []
            of_place = dict(zip(judged, verdicts, strict=True))
            for place, answer in answers.items():
                state, verdict = states[place], of_place.get(place)
                checked = state.check(answer.text)
                if verdict is not None and verdict.probability is None:
                    checked = "judge_failed"
                states[place] = state.add(
                    Attempt(
                        answer=answer.text,
                        temperature=state.temperature,
                        checked=checked,
                        probability=None if verdict is None else verdict.probability,
                        logprob=None if answer.logprobs is None else float(sum(answer.logprobs)),
                        tokens=answer.prompt_tokens + len(answer.token_ids),
                        validator_tokens=0 if verdict is None else verdict.tokens,
                    )
                )
        return states, problems

    def _request(self, question: Question, state: Refinement) -> Request:
        return attempt_request(question, state, self._job.config.attempts, self._job.config.seed, self._answering)


def attempt_request(
    question: Question, state: Refinement, attempts: AttemptsConfig, seed: int, adapter: str | None
) -> Request:
    """The next attempt. Its seed depends on question and number of the attempt alone."""
    number, warm = len(state.attempts), state.temperature
    sampling = Sampling(
        max_tokens=attempts.max_tokens,
        temperature=warm,
        top_p=attempts.top_p if warm else 1.0,
        seed=sample_seed(seed, question.asked, "attempt", number),
        stop=tuple(attempts.stop),
        token_stats=True,
    )
    return Request(
        request_id=f"{question.example_id}/attempt-{number}",
        prompt=exclusion_prompt(question.turns, state.excluded),
        sampling=sampling,
        adapter=adapter,
    )

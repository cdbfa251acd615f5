"""Who says whether an answer is right: a model, a scorer, and two controls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from stitch_ray.engines.base import Engine, EngineError
from stitch_ray.exclusion.labels import CORRECT, WRONG
from stitch_ray.exclusion.prompts import validator_prompt
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.reliability.answers.labels import Labelled, Labeller
from stitch_ray.reliability.answers.questions import Question, prompt_ids
from stitch_ray.reliability.answers.sampling import sample_seed
from stitch_ray.reliability.scorer.batched import ScoreRequest, score_requests
from stitch_ray.reliability.scorer.combined import ReliabilityScorer
from stitch_ray.reliability.scorer.inputs import ScoreInput
from stitch_ray.reliability.signals.prompted import probability_of


@dataclass(frozen=True, slots=True)
class Verdict:
    """P(CORRECT) in [0, 1], or why there is none; tokens: read and written for it."""

    probability: float | None
    tokens: int = 0
    problem: str = ""


class Judge(Protocol):
    def judge(self, asked: Sequence[tuple[Question, str]]) -> list[Verdict]:
        """One verdict for every (question, answer), in order."""
        ...


class ModelJudge:
    """P(CORRECT) / (P(CORRECT) + P(WRONG)) as the model's reply to the validator's prompt; nothing is sampled.

    `adapter`: the one that judges. A verdict's tokens are those of its prompt and one word.
    """

    def __init__(self, engine: Engine, template: ChatTemplate, adapter: str | None = None) -> None:
        self._engine, self._template, self._adapter = engine, template, adapter

    def judge(self, asked: Sequence[tuple[Question, str]]) -> list[Verdict]:
        prompts = [validator_prompt(question.turns, answer) for question, answer in asked]
        found = probability_of(self._engine, prompts, CORRECT, WRONG, adapter=self._adapter)
        return [
            Verdict(None, 0, one.reason)
            if isinstance(one, EngineError)
            else Verdict(one, len(prompt_ids(prompt, self._template)) + 1)
            for prompt, one in zip(prompts, found, strict=True)
        ]


class ScorerJudge:
    """The confidence of a run of `train-scorer` that needs no signals."""

    def __init__(self, scorer: ReliabilityScorer) -> None:
        self._scorer = scorer

    def judge(self, asked: Sequence[tuple[Question, str]]) -> list[Verdict]:
        requests = [ScoreRequest(ScoreInput(one.question, answer, one.context), {}) for one, answer in asked]
        found = score_requests(self._scorer, requests)
        return [Verdict(one["confidence"], 0, one["reason"] or "") for one in found]


class OracleJudge:
    """Control: knows the gold answers. What it accepts is right, so it shows what no validator can exceed."""

    def __init__(self, labeller: Labeller) -> None:
        self._labeller = labeller

    def judge(self, asked: Sequence[tuple[Question, str]]) -> list[Verdict]:
        items = [
            Labelled(question=one.question, answer=answer, references=one.references, context=one.context)
            for one, answer in asked
        ]
        found = self._labeller.label(items).correct if items else []
        return [Verdict(None, 0, "no gold answer") if right is None else Verdict(float(right)) for right in found]


class RandomJudge:
    """Control: accepts a share of the answers by chance, the same ones in every run. 1 accepts all, 0 none."""

    def __init__(self, accept: float, seed: int) -> None:
        self._accept, self._seed = accept, seed

    def judge(self, asked: Sequence[tuple[Question, str]]) -> list[Verdict]:
        seeds = [sample_seed(self._seed, question.asked, answer, 0) for question, answer in asked]
        return [Verdict(float(np.random.default_rng(seed).random() < self._accept)) for seed in seeds]

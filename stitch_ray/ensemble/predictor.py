"""Draft, score, refine where unsure, score again; answer or abstain. What decides is `reliability.cascade`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import asdict
from typing import Any, Literal, cast

from stitch_ray.config.ensemble import EnsembleConfig
from stitch_ray.engines.base import AsyncEngine, EngineError
from stitch_ray.ensemble.asking import asked
from stitch_ray.ensemble.budget import BudgetExceeded, DeadlineExceeded
from stitch_ray.ensemble.dialogue_route import DialogueRoute
from stitch_ray.ensemble.exclude_route import ExcludeRoute, Validator
from stitch_ray.ensemble.passage import Passage
from stitch_ray.ensemble.types import (
    Action,
    Answer,
    Emit,
    Limits,
    Prediction,
    Primary,
    Question,
    Reason,
    Refined,
    Route,
    RouteFailed,
    Scorer,
    ScorerUnavailable,
)
from stitch_ray.errors import UserError
from stitch_ray.records import content_hash
from stitch_ray.reliability.cascade import Decision, decide
from stitch_ray.reliability.policy import NO_ROUTE, Fingerprints, Policy
from stitch_ray.reliability.stage_scale import Stage

_FAILURES: dict[type[Exception], Reason] = {
    ScorerUnavailable: "scorer_unavailable",
    RouteFailed: "route_failed",
    DeadlineExceeded: "deadline",
    BudgetExceeded: "budget",
}


class Predictor:
    """Answers questions with the members it is given. Safe for any number of questions at a time.

    `on_failure`: where the scorer cannot be reached, the refinement fails, or time or budget are used up, "abstain"
    gives a prediction that says so, "error" raises. Either way no answer is given that no policy has taken.
    """

    def __init__(
        self,
        *,
        primary: Primary,
        scorer: Scorer,
        route: Route | None = None,
        on_failure: Literal["abstain", "error"] = "abstain",
    ) -> None:
        self._primary = primary
        self._scorer = scorer
        self._route = route
        self._on_failure = on_failure
        self.fingerprints = Fingerprints(
            primary=primary.fingerprint,
            auxiliaries=() if route is None else route.auxiliaries,
            scorer=scorer.fingerprint,
            route=NO_ROUTE if route is None else route.fingerprint,
        )
        self.model_version = content_hash(asdict(self.fingerprints))

    def check(self, policy: Policy) -> list[str]:
        """Raises UserError if `policy` was made for other members; returns what it does not tell."""
        return policy.check_fingerprints(**asdict(self.fingerprints))

    async def predict(
        self,
        question: Question,
        *,
        policy: Policy,
        target_risk: float | None = None,
        limits: Limits = Limits(),
        emit: Emit | None = None,
    ) -> Prediction:
        """The answer that `policy` lets pass, or an abstention. Cancelling it cancels what is under way.

        Raises ValueError for a question that is none and for a policy of another kind of cascade, UnknownTarget (both
        before anything is asked), EngineError if the primary gives no answer, and with on_failure "error"
        ScorerUnavailable, RouteFailed, DeadlineExceeded or BudgetExceeded.
        """
        passage = Passage(question, limits, emit)
        return await self._pass(passage, policy, target_risk, always=False)

    async def both_stages(
        self,
        question: Question,
        *,
        policy: Policy | None = None,
        target_risk: float | None = None,
        limits: Limits = Limits(),
        emit: Emit | None = None,
    ) -> Prediction:
        """Like `predict`, but the draft is refined and scored again however sure it is: calibration needs both.

        The decision is that of `policy`, or none, and without one confidences are the scorer's own. A refined answer that could not be had has no confidence; the reason
        is that of the decision where the draft was to be given anyway. Raises ValueError without a route.
        """
        if self._route is None:
            raise ValueError("there is no route, and so no second stage")
        passage = Passage(question, limits, emit)
        return await self._pass(passage, policy, target_risk, always=True)

    async def _pass(
        self, passage: Passage, policy: Policy | None, target_risk: float | None, *, always: bool
    ) -> Prediction:
        question = passage.question
        asked(question)
        if policy is not None:
            self._decide(policy, question, target_risk)  # raises now what it would raise after all the work
            passage.target_risk = policy.target(question.task, target_risk).target_risk
        decision: Decision | None = None
        reason: Reason | None = None
        try:
            draft = await self._draft(passage, policy)
            if policy is not None:
                decision = self._decide(policy, question, target_risk, passage.draft_confidence)
            if self._route is not None and (always or (decision is not None and decision.action == "escalate")):
                await self._refine(passage, self._route, draft, policy)
                if policy is not None and decision is not None and decision.action == "escalate":
                    final = math.nan if passage.final_confidence is None else passage.final_confidence
                    decision = self._decide(policy, question, target_risk, passage.draft_confidence, final)
        except tuple(_FAILURES) as failure:
            if self._on_failure == "error":
                raise
            reason = next(name for kind, name in _FAILURES.items() if isinstance(failure, kind))
            passage.note("failure", reason=reason, message=str(failure))
        prediction = self._prediction(passage, policy, decision, reason)
        await passage.finish(prediction)
        return prediction

    def _decide(
        self,
        policy: Policy,
        question: Question,
        target_risk: float | None,
        draft: float | None = None,
        final: float | None = None,
    ) -> Decision:
        has_route = self._route is not None
        return decide(
            policy, draft=draft, final=final, has_route=has_route, task=question.task, target_risk=target_risk
        )

    async def _draft(self, passage: Passage, policy: Policy | None) -> Answer:
        passage.budget.check()
        draft = await passage.timed(self._primary.answer(passage.question))
        passage.draft = draft.text
        passage.budget.spend(draft.calls, draft.tokens)
        await passage.tell("draft", **_shown(draft))
        passage.draft_score = await self._score(passage, draft)
        passage.draft_confidence = _confidence(policy, passage.draft_score, "draft")
        await passage.tell("score", confidence=passage.draft_confidence)
        return draft

    async def _refine(self, passage: Passage, route: Route, draft: Answer, policy: Policy | None) -> None:
        await passage.begin("refine", route=route.name)
        refined = await self._last(passage, route, draft)
        if refined.text == draft.text:
            confidence = _confidence(policy, passage.draft_score, "refined")
            await passage.tell("rescore", confidence=confidence, same_as_draft=True)
        else:
            passage.budget.check()
            try:
                answer = await passage.timed(self._primary.signals(passage.question, refined.text, draft.samples))
            except EngineError as error:
                raise RouteFailed(f"the primary cannot read the refined answer: {error.reason}") from error
            passage.budget.spend(answer.calls, answer.tokens)
            confidence = _confidence(policy, await self._score(passage, answer), "refined")
            await passage.tell("rescore", confidence=confidence, changed_by=refined.changed_by, **_shown(answer))
        passage.refined, passage.final_confidence = refined.text, confidence

    async def _last(self, passage: Passage, route: Route, draft: Answer) -> Refined:
        """The refined answer; events are passed on as they come."""
        async with aclosing(route.refine(passage.question, draft, passage.budget)) as items:  # type: ignore[type-var]
            while True:
                try:
                    item = await passage.budget.wait_for(anext(items, None))
                except EngineError as error:
                    raise RouteFailed(f"{route.name}: {error.reason}") from error
                if item is None:
                    raise RouteFailed(f"{route.name} came to no answer")
                if isinstance(item, Refined):
                    return item
                await passage.pass_on(item)

    async def _score(self, passage: Passage, answer: Answer) -> float | None:
        """None: unscored, as is everything that is no probability."""
        try:
            found = await passage.timed(self._scorer.score(passage.question, answer.text, answer.signals))
        except (ScorerUnavailable, DeadlineExceeded, BudgetExceeded):
            raise
        except Exception as error:
            raise ScorerUnavailable(f"the scorer failed ({type(error).__name__})") from error
        return found if found is not None and 0 <= found <= 1 else None

    def _prediction(
        self, passage: Passage, policy: Policy | None, decision: Decision | None, failure: Reason | None
    ) -> Prediction:
        """`failure`: what kept a stage from its end. It leaves a decision on the draft as it is, and no other."""
        question, refined = passage.question, passage.refined
        taken = None if decision is None or decision.action == "escalate" else decision
        answer = None
        if taken is not None and taken.action == "answer":
            answer = passage.draft if taken.stage == "draft" else refined
            assert answer is not None
        reason: Reason | None = failure if taken is None else taken.reason
        action: Action | None = None if policy is None else "abstain" if answer is None else "answer"
        return Prediction(
            example_id=question.example_id,
            question=question.question,
            context=question.context,
            task=question.task,
            draft=passage.draft,
            draft_confidence=passage.draft_confidence,
            refined=refined,
            final_confidence=passage.final_confidence,
            answer=answer,
            confidence=None if taken is None else taken.confidence,
            decision=action,
            reason=reason,
            route=NO_ROUTE if refined is None or self._route is None else self._route.name,
            target_risk=passage.target_risk,
            calls=passage.budget.calls,
            tokens=passage.budget.tokens,
            policy_version=None if policy is None else policy.version,
            model_version=self.model_version,
            trace=passage.closed_trace(decision=action, reason=reason),
            seconds=passage.seconds,
        )


def build_predictor(
    config: EnsembleConfig, primary: Primary, auxiliaries: Sequence[AsyncEngine], scorer: Scorer
) -> Predictor:
    """The predictor that `config` describes, of members that are there. Raises UserError if they do not fit together."""
    names = getattr(primary, "names", None)
    if names is not None and not scorer.signals <= names:
        missing = ", ".join(sorted(scorer.signals - names))
        raise UserError(
            f"ensemble.primary gives no {missing}, which the scorer needs; start it with the scorer's signals"
        )
    route: Route | None = None
    names_of_auxiliaries = [member.name for member in config.auxiliaries]
    if config.route == "dialogue":
        route = DialogueRoute(config.dialogue, auxiliaries, names_of_auxiliaries)
    elif config.route == "exclude":
        # Whoever starts the members has seen to it that the last one can compare.
        validator = cast(Validator, auxiliaries[-1])
        route = ExcludeRoute(config.exclude, auxiliaries[0], validator, names_of_auxiliaries)
    return Predictor(primary=primary, scorer=scorer, route=route, on_failure=config.on_failure)


def _confidence(policy: Policy | None, score: float | None, stage: Stage) -> float | None:
    return score if policy is None else policy.confidence(score, stage)


def _shown(answer: Answer) -> dict[str, Any]:
    signals = {
        name: None if value is None or not math.isfinite(value) else value for name, value in answer.signals.items()
    }
    return {
        "text": answer.text,
        "unchecked": True,
        "signals": signals,
        "calls": answer.calls,
        "tokens": answer.tokens,
    }

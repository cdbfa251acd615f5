"""The whole ensemble on real models: hosts behind calls, as actors and replicas have them, and a dialogue in JSON."""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest

from stitch_ray.config.ensemble import EnsembleConfig
from stitch_ray.engines.base import EngineError, Request, Sampling
from stitch_ray.ensemble.dialogue_route import DialogueRoute
from stitch_ray.ensemble.fingerprints import answer_versions, ensemble_fingerprints
from stitch_ray.ensemble.hosts import AuxiliaryHost, PrimaryHost, ScorerHost
from stitch_ray.ensemble.predictor import Predictor, build_predictor
from stitch_ray.ensemble.remote import RemoteAuxiliary, RemotePrimary, RemoteScorer
from stitch_ray.ensemble.types import Answer, Prediction, Question, ScorerUnavailable
from stitch_ray.errors import UserError
from stitch_ray.records import Turn
from stitch_ray.reliability.policy import Policy
from stitch_ray.reliability.probability import Isotonic
from stitch_ray.reliability.scorer.file import ScorerFile
from stitch_ray.reliability.scorer.logistic import LogisticStack
from tests.scripted import policy_for
from tests.unit.test_engine_adapters import make_adapter

pytestmark = pytest.mark.numeric

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]
Call = Callable[..., Any]

QUESTION = Question(
    example_id="q1",
    question="What is the sum of two and two?",
    context="Two and two make four.",
    history=(Turn("system", "Answer in a word."),),
)


def travelling(host: Any) -> Call:
    """Arguments, results and exceptions are pickled on their way, as between processes."""

    async def call(method: str, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = pickle.loads(pickle.dumps((args, kwargs)))
        try:
            return pickle.loads(pickle.dumps(await getattr(host, method)(*args, **kwargs)))
        except Exception as error:
            raise pickle.loads(pickle.dumps(error)) from None

    return call


def member(path: Path, name: str) -> dict[str, Any]:
    return {"model": {"path": str(path), "name": name, "dtype": "float32"}}


@pytest.fixture(scope="module")
def config(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> EnsembleConfig:
    adapter = make_adapter(tiny_model, tmp_path_factory.mktemp("adapters") / "blue", " blue sky")
    return EnsembleConfig.model_validate(
        {
            "primary": {**member(tiny_model, "primary"), "max_tokens": 8, "adapters": {"the.sky": adapter}},
            "auxiliaries": [member(tiny_model, "Ada"), member(tiny_model, "Bo")],
            "route": "dialogue",
            "dialogue": {"max_turns": 2, "max_tokens": 64, "attempts": 4, "stop_on_agreement": False},
        }
    )


@pytest.fixture(scope="module")
def scorer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half sure of everything that the primary finds as likely as it finds its own answers."""
    folder = tmp_path_factory.mktemp("scorer")
    ScorerFile(
        encoder_fingerprint=None,
        loss=None,
        max_length=None,
        stack=LogisticStack(("mean_token_margin",), (0.0,), (1.0,), (1.0,), 0.0),
        isotonic=Isotonic((-1.0, 1.0), (0.0, 1.0)),
        answers_from=None,
    ).save(folder)
    return folder


@pytest.fixture(scope="module")
def runner() -> Any:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module")
def hosts(config: EnsembleConfig, scorer_folder: Path, runner: Run[Any]) -> Any:
    """Primary, two auxiliaries, scorer."""
    values = config.model_dump(mode="json")
    hosts = (
        PrimaryHost(values, ["mean_token_margin"], 0),
        *(AuxiliaryHost(one) for one in values["auxiliaries"]),
        ScorerHost(str(scorer_folder)),
    )
    yield hosts
    for host in hosts[:3]:
        runner(host.close())


@pytest.fixture(scope="module")
def predictor(config: EnsembleConfig, hosts: Any, runner: Run[Any]) -> Predictor:
    calls = [travelling(host) for host in hosts]
    described = [runner(call("describe")) for call in calls]
    json.dumps(described)
    primary = RemotePrimary(calls[0], described[0])
    auxiliaries = [RemoteAuxiliary(*pair) for pair in zip(calls[1:3], described[1:3], strict=True)]
    return build_predictor(config, primary, auxiliaries, RemoteScorer(calls[3], described[3]))


def made_for(predictor: Predictor, threshold: float) -> Policy:
    return replace(policy_for(threshold, route="dialogue"), fingerprints=predictor.fingerprints)


def test_members_describe_what_the_configuration_tells(
    predictor: Predictor, config: EnsembleConfig, scorer_folder: Path
) -> None:
    scorer = ScorerFile.load(scorer_folder).fingerprint
    assert predictor.fingerprints == ensemble_fingerprints(config, scorer)
    plain = config.model_copy(update={"primary": config.primary.model_copy(update={"adapters": {}})})
    assert ensemble_fingerprints(plain, scorer).primary != predictor.fingerprints.primary
    versions = answer_versions(config.primary)
    assert len(versions) == 2
    assert answer_versions(plain.primary) < versions


def test_tiny_models_hold_a_dialogue_and_the_decision_follows_from_the_scores(
    predictor: Predictor, runner: Run[Any]
) -> None:
    refined: Prediction = runner(predictor.both_stages(QUESTION, policy=made_for(predictor, 0.99)))
    turns = [entry for entry in refined.trace if entry["stage"] == "turn"]
    assert [turn["speaker"] for turn in turns] == ["Ada", "Bo"]
    assert refined.refined == turns[-1]["text"]
    assert (refined.decision, refined.reason, refined.route) == ("abstain", "unsure", "dialogue")
    assert refined.draft_confidence is not None
    assert refined.final_confidence is not None
    lowest = min(refined.draft_confidence, refined.final_confidence) - 1e-6  # computed anew, it may round otherwise
    sure: Prediction = runner(predictor.predict(QUESTION, policy=made_for(predictor, lowest)))
    stage = "draft" if refined.draft_confidence >= lowest else "refined"
    assert (sure.decision, sure.answer) == ("answer", getattr(refined, stage))
    assert sure.confidence == pytest.approx(refined.draft_confidence, abs=1e-6)
    assert sure.calls < refined.calls


def test_the_same_question_gets_the_same_answers_alone_and_among_others(predictor: Predictor, runner: Run[Any]) -> None:
    async def run() -> list[Prediction]:
        questions = [replace(QUESTION, example_id=f"q{n}", question=f"What is {n % 2}?") for n in range(4)]
        return await asyncio.gather(*(predictor.both_stages(one) for one in questions))

    found: list[Prediction] = runner(run())
    for n in range(2, 4):
        assert (found[n].draft, found[n].refined, found[n].tokens) == (
            found[n % 2].draft,
            found[n % 2].refined,
            found[n % 2].tokens,
        )


def test_a_task_is_answered_by_its_adapter(hosts: Any, predictor: Predictor, runner: Run[Any]) -> None:
    host = hosts[0]
    assert runner(host.describe())["adapters"] == ["the.sky"]
    primary = predictor._primary
    task = replace(QUESTION, task="the.sky")
    plain, adapted = runner(primary.answer(QUESTION)), runner(primary.answer(task))
    assert isinstance(adapted, Answer)
    assert adapted.signals["mean_token_margin"] != plain.signals["mean_token_margin"]
    named: Answer = runner(host.answer(QUESTION, adapter="the.sky"))
    assert named.text == adapted.text
    again: Answer = runner(primary.answer(QUESTION))
    assert again == plain


def test_a_member_that_is_lost_fails_closed(
    predictor: Predictor, hosts: Any, config: EnsembleConfig, runner: Run[Any]
) -> None:
    async def dead(method: str, *args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("the process has died")

    described = [runner(host.describe()) for host in hosts]
    scorer = RemoteScorer(dead, described[3])
    with pytest.raises(ScorerUnavailable):
        runner(scorer.score(QUESTION, "four", {}))
    auxiliary = RemoteAuxiliary(dead, described[1])
    with pytest.raises(EngineError) as caught:
        runner(auxiliary.generate(Request(request_id="q", prompt=QUESTION.history)))
    assert caught.value.retryable
    route = DialogueRoute(config.dialogue, [auxiliary, auxiliary], ["Ada", "Bo"])
    lost = Predictor(primary=predictor._primary, scorer=predictor._scorer, route=route)
    found: Prediction = runner(lost.predict(QUESTION, policy=made_for(lost, 0.999)))
    assert (found.decision, found.reason, found.answer) == ("abstain", "route_failed", None)
    mute = Predictor(primary=predictor._primary, scorer=scorer, route=route)
    unscored: Prediction = runner(mute.predict(QUESTION, policy=made_for(mute, 0.5)))
    assert (unscored.decision, unscored.reason) == ("abstain", "scorer_unavailable")


def test_errors_of_a_model_travel_as_they_are(predictor: Predictor, hosts: Any, runner: Run[Any]) -> None:
    with pytest.raises(EngineError, match="prompt tokens") as caught:
        runner(predictor._primary.answer(replace(QUESTION, question="why " * 5000)))
    assert not caught.value.retryable
    auxiliary = RemoteAuxiliary(travelling(hosts[1]), runner(hosts[1].describe()))
    with pytest.raises(EngineError, match="prompt tokens"):
        runner(auxiliary.generate(Request(request_id="q", prompt=(Turn("user", "why " * 5000),), sampling=Sampling())))


def test_a_primary_without_the_scorers_signals_is_refused(config: EnsembleConfig, hosts: Any, runner: Run[Any]) -> None:
    calls = [travelling(host) for host in hosts]
    described = [runner(call("describe")) for call in calls]
    scorer = RemoteScorer(calls[3], {**described[3], "signals": ["p_true"]})
    with pytest.raises(UserError, match="p_true"):
        build_predictor(config, RemotePrimary(calls[0], described[0]), [], scorer)

"""One scorer in two places: the Ray Data pool and the Serve deployment give the same numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stitch_ray.config.reliability import AnswerSplitConfig
from stitch_ray.errors import UserError
from stitch_ray.records import ANSWER_SCHEMA
from stitch_ray.reliability.probability import Isotonic
from stitch_ray.reliability.scorer import scoring
from stitch_ray.reliability.scorer.combined import ReliabilityScorer
from stitch_ray.reliability.scorer.encoder import encoder_fingerprint
from stitch_ray.reliability.scorer.file import MODEL, ScorerFile
from stitch_ray.reliability.scorer.logistic import ENCODER, LogisticStack
from stitch_ray.reliability.scorer.scoring import inputs_of, plan_units, score_answers
from stitch_ray.reliability.tables import Answers
from stitch_ray.runs import Step
from tests.encoders import LONGEST, WORDS, make_encoder

pytestmark = [pytest.mark.numeric, pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")]

ROWS = 90
TOLERANCE = 1e-5  # float32 rounds logits of 1 by 1e-6 when batches differ; those of two inputs are 1e-2 apart


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scorer")
    make_encoder(folder / MODEL)
    ScorerFile(
        encoder_fingerprint=encoder_fingerprint(folder / MODEL, "bce", LONGEST),
        loss="bce",
        max_length=LONGEST,
        stack=LogisticStack((ENCODER, "perplexity"), (0.0, 2.0), (0.5, 1.5), (1.2, -0.7), 0.3),
        isotonic=Isotonic((-4.0, -1.0, 0.5, 4.0), (0.05, 0.2, 0.7, 0.95)),
        answers_from="model-1",
    ).save(folder)
    return folder


@pytest.fixture(scope="module")
def answers() -> Answers:
    """Of many lengths, some twice, one empty, one too long, one without its signal."""
    rng = np.random.default_rng(0)

    def words(least: int, most: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(least, most + 1)))

    rows = [
        {
            "answer_id": f"a{row:03d}",
            "question": f"{words(2, 12)}?",
            "answer": words(1, 6),
            "context": words(1, 40) if row % 3 == 0 else None,
        }
        for row in range(ROWS)
    ]
    rows[3]["answer"] = ""
    rows[4]["question"] = "who " * 60
    rows[5:10] = [{**rows[5], "answer_id": f"a{row:03d}"} for row in range(5, 10)]
    perplexity = rng.uniform(1, 4, ROWS)
    perplexity[6] = np.nan
    return Answers(
        pa.Table.from_pylist(rows, ANSWER_SCHEMA), {"perplexity": perplexity}, AnswerSplitConfig(), "model-1", ROWS, ()
    )


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_MOST_ROWS", 16)


@pytest.fixture
def handle(ray_cluster: object, run: Path) -> Iterator[Any]:
    from ray import serve

    from serve_apps.scorer import build

    yield serve.run(build(run), name="scorer", route_prefix=None)
    serve.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster", "small_units")
def test_the_pool_gives_the_same_bits_with_one_or_two_actors_and_in_any_order(run: Path, answers: Answers) -> None:
    steps: list[Step] = []
    one = score_answers(run, answers, replicas=1, batch_tokens=200, progress=steps.append)
    order = np.random.default_rng(1).permutation(ROWS)
    two = score_answers(run, answers.take(order), replicas=2, batch_tokens=200)
    for name, values in one.items():
        assert np.array_equal(two[name], values[order], equal_nan=True), name
    assert np.flatnonzero(np.isnan(one["confidence"])).tolist() == [4, 6]
    assert np.flatnonzero(np.isnan(one["encoder"])).tolist() == [4]
    assert len(set(one["encoder"][5:10])) == 1
    assert (steps[0].done, steps[-1].done, steps[-1].total) == (0, ROWS, ROWS)

    alone, reasons = ReliabilityScorer.load(run, batch_tokens=1).score(inputs_of(answers), answers.signals)
    for name, values in alone.as_dict().items():
        assert one[name] == pytest.approx(values, abs=TOLERANCE, nan_ok=True)
    assert sorted(reasons) == [4, 6]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_scorer_of_another_model_version_is_refused(run: Path, answers: Answers) -> None:
    other = replace(answers, answers_from="model-2")
    with pytest.raises(UserError, match=r"version model-1, these are of model-2"):
        score_answers(run, other)
    with pytest.raises(UserError, match="needs perplexity, which none of them has"):
        score_answers(run, replace(answers, signals={}))


@pytest.mark.ray
def test_the_deployment_gives_the_numbers_of_the_pool(handle: Any, run: Path, answers: Answers) -> None:
    pool = score_answers(run, answers)
    requests = [
        {
            "question": shown.question,
            "answer": shown.answer,
            "context": shown.context,
            "signals": {"perplexity": None if math.isnan(value) else float(value)},
        }
        for shown, value in zip(inputs_of(answers), answers.signals["perplexity"], strict=True)
    ]
    found = [response.result(timeout_s=60) for response in [handle.score.remote(request) for request in requests]]
    for name, values in pool.items():
        got = [math.nan if one[name] is None else one[name] for one in found]
        assert got == pytest.approx(values.tolist(), abs=TOLERANCE, nan_ok=True)
    assert [row for row, one in enumerate(found) if one["reason"]] == [4, 6]
    assert handle.describe.remote().result() == {
        "fingerprint": ScorerFile.load(run).fingerprint,
        "signals": ["perplexity"],
    }
    with pytest.raises(Exception, match="answer must be a text"):
        handle.score.remote({"question": "who?"}).result(timeout_s=60)
    again = handle.score.remote(requests[0]).result(timeout_s=60)
    assert again["confidence"] == pytest.approx(found[0]["confidence"], abs=TOLERANCE)


def test_units_hold_every_input_once_whatever_their_order(answers: Answers) -> None:
    inputs = sorted(set(inputs_of(answers)), key=lambda shown: shown.first)
    units = plan_units(inputs)
    assert sorted(position for unit in units for position in unit) == list(range(len(inputs)))
    turned = inputs[::-1]
    assert [[turned[i] for i in unit] for unit in plan_units(turned)] == [[inputs[i] for i in unit] for unit in units]

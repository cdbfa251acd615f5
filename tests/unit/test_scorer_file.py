"""scorer.json: what is written is what is read, and nothing else is taken for a scorer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stitch_ray.errors import UserError
from stitch_ray.reliability.probability import Isotonic
from stitch_ray.reliability.scorer.batched import ScoreRequest, score_requests
from stitch_ray.reliability.scorer.combined import ReliabilityScorer
from stitch_ray.reliability.scorer.encoder import encoder_fingerprint
from stitch_ray.reliability.scorer.file import MODEL, SCORER, ScorerFile, read_trained_on, write_trained_on
from stitch_ray.reliability.scorer.inputs import ScoreInput
from stitch_ray.reliability.scorer.logistic import ENCODER, LogisticStack
from tests.encoders import make_encoder

pytestmark = pytest.mark.numeric

STACK = LogisticStack((ENCODER, "perplexity"), (0.1, 2.0), (0.3, 1.5), (1.2, -0.7), 1 / 3)
ISOTONIC = Isotonic((-4.0, -1.0, 0.5, 4.0), (0.05, 0.2, 0.7, 0.95))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    make_encoder(folder / MODEL)
    made_scorer(folder).save(folder)
    return folder


def made_scorer(folder: Path, **changes: Any) -> ScorerFile:
    values: dict[str, Any] = {
        "encoder_fingerprint": encoder_fingerprint(folder / MODEL, "bce", 40) if (folder / MODEL).exists() else None,
        "loss": "bce",
        "max_length": 40,
        "stack": STACK,
        "isotonic": ISOTONIC,
        "answers_from": "model-1",
        "num_stack": 100,
        "num_isotonic": 90,
        "notes": ("a note",),
    }
    return ScorerFile(**{**values, **changes})


def test_loading_gives_what_was_saved_bit_by_bit(run: Path) -> None:
    assert ScorerFile.load(run) == ScorerFile.load(run / SCORER) == made_scorer(run)


def test_the_file_has_the_documented_fields(run: Path) -> None:
    values = json.loads((run / SCORER).read_text())
    assert values["encoder"] == "model/"
    assert values["signals"] == ["perplexity"]
    assert values["standardise"] == {"mean": [0.1, 2.0], "scale": [0.3, 1.5]}
    assert values["logistic"] == {"coef": [1.2, -0.7], "intercept": 1 / 3}
    assert values["isotonic"] == {"x": list(ISOTONIC.x), "y": list(ISOTONIC.y)}
    assert values["answers_from"] == "model-1"
    assert values["fingerprint"] == made_scorer(run).fingerprint
    assert (values["format"], values["max_length"], values["loss"]) == (2, 40, "bce")


def test_a_scorer_of_signals_alone_has_no_encoder(tmp_path: Path) -> None:
    stack = LogisticStack(("perplexity",), (2.0,), (1.5,), (-0.7,), 0.1)
    scorer = made_scorer(tmp_path, loss=None, max_length=None, stack=stack)
    scorer.save(tmp_path)
    assert json.loads((tmp_path / SCORER).read_text())["encoder"] is None
    loaded = ReliabilityScorer.load(tmp_path)
    scores, reasons = loaded.score([ScoreInput("q", "a")] * 2, {"perplexity": np.array([2.0, np.nan])})
    assert scores.stack[0] == 0.1
    assert np.isnan(scores.encoder).all()
    assert reasons == {1: "no finite value of perplexity"}


@pytest.mark.parametrize(
    "change",
    [
        {"stack": LogisticStack((ENCODER, "perplexity"), (0.1, 2.0), (0.3, 1.5), (1.2, -0.70001), 1 / 3)},
        {"isotonic": Isotonic((-4.0, 4.0), (0.05, 0.95))},
        {"stack": LogisticStack((ENCODER, "p_true"), (0.1, 2.0), (0.3, 1.5), (1.2, -0.7), 1 / 3)},
        {"answers_from": "model-2"},
        {"answering": {"max_tokens": 8}},
        {"max_length": 30},
        {"encoder_fingerprint": "0" * 16},
    ],
)
def test_the_fingerprint_covers_what_a_confidence_depends_on(run: Path, change: dict[str, Any]) -> None:
    assert made_scorer(run, **change).fingerprint != made_scorer(run).fingerprint
    assert made_scorer(run, num_stack=7, notes=()).fingerprint == made_scorer(run).fingerprint


def _edit(**changes: Any):
    def apply(folder: Path) -> None:
        values = json.loads((folder / SCORER).read_text())
        (folder / SCORER).write_text(json.dumps({**values, **changes}))

    return apply


def _other_encoder(folder: Path) -> None:
    shutil.rmtree(folder / MODEL)
    make_encoder(folder / MODEL, seed=5)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / SCORER).unlink(), "name a finished run of train-scorer"),
        (lambda folder: (folder / SCORER).write_text("{"), "cannot be read"),
        (lambda folder: (folder / SCORER).write_text("[]"), "damaged"),
        (_edit(format=1), "this version reads 2"),
        (_edit(loss="hinge"), "damaged"),
        (_edit(encoder=None), "damaged"),
        (_edit(signals=[]), "damaged"),
        (_edit(isotonic={"x": [0, 1], "y": [0.7, 0.2]}), "must not fall"),
        (_edit(answers_from="model-2"), "was changed after"),
        (lambda folder: shutil.rmtree(folder / MODEL), "model is missing"),
        (_other_encoder, "is not the encoder"),
    ],
)
def test_a_damaged_or_mixed_up_scorer_is_refused(run: Path, tmp_path: Path, damage, complaint: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    damage(folder)
    with pytest.raises(UserError, match=complaint):
        ScorerFile.load(folder)


def test_a_copied_run_folder_is_the_same_scorer(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    assert ScorerFile.load(tmp_path / "copy").fingerprint == ScorerFile.load(run).fingerprint


def test_confidence_is_the_isotonic_value_of_the_stack_and_unscored_stays_unscored(run: Path) -> None:
    scorer = ReliabilityScorer.load(run)
    inputs = [
        ScoreInput("who?", "Bach"),
        ScoreInput("who?", "Homer"),
        ScoreInput("who " * 50, "Bach"),
        ScoreInput("who?", ""),
    ]
    perplexity = np.array([1.5, np.nan, 1.5, 9.0])
    scores, reasons = scorer.score(inputs, {"perplexity": perplexity, "p_true": np.zeros(4)})
    z = (np.log(scores.encoder / (1 - scores.encoder)) - 0.1) / 0.3 * 1.2 + (perplexity - 2) / 1.5 * -0.7 + 1 / 3
    assert scores.stack[[0, 3]] == pytest.approx(z[[0, 3]], abs=1e-9)
    assert scores.confidence[[0, 3]] == pytest.approx(np.interp(z[[0, 3]], ISOTONIC.x, ISOTONIC.y), abs=1e-9)
    assert np.isnan(scores.confidence).tolist() == [False, True, True, False]
    assert np.isnan(scores.encoder).tolist() == [False, False, True, False]
    assert reasons[1] == "no finite value of perplexity"
    assert "never cut" in reasons[2]


def test_questions_learned_from_are_kept_sorted_and_once(tmp_path: Path) -> None:
    write_trained_on(tmp_path, ["b", "a", "b"])
    assert read_trained_on(tmp_path) == {"a", "b"}


def test_requests_get_numbers_or_null_with_the_reason(run: Path) -> None:
    scorer = ReliabilityScorer.load(run)
    requests = [
        {"question": "who?", "answer": "Bach", "signals": {"perplexity": 1.5}},
        {"question": "who?", "answer": "Bach", "context": None, "signals": {"perplexity": None}},
        {"question": "who?", "answer": "Bach"},
    ]
    found = score_requests(scorer, [ScoreRequest.parse(request) for request in requests])
    (expected,) = scorer.score([ScoreInput("who?", "Bach")], {"perplexity": np.array([1.5])})[0].confidence
    assert found[0]["confidence"] == pytest.approx(expected, abs=1e-6)
    assert found[0]["reason"] is None
    assert [one["confidence"] for one in found[1:]] == [None, None]
    assert {one["reason"] for one in found[1:]} == {"no finite value of perplexity"}
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        ({"question": "q"}, "answer must be a text"),
        ({"question": 3, "answer": "a"}, "question must be a text"),
        ({"question": "q", "answer": "a", "context": 3}, "context must be a text"),
        ({"question": "q", "answer": "a", "signals": [1]}, "signals must be an object"),
        ({"question": "q", "answer": "a", "signals": {"perplexity": "1"}}, "signals.perplexity must be a number"),
        ({"question": "q", "answer": "a", "prompt": "x"}, "unknown field prompt"),
        ({"question": "\ud800", "answer": "a"}, "half of a surrogate pair"),
        (["q", "a"], "an object with question and answer"),
    ],
)
def test_a_request_that_is_none_is_refused_by_name(request_: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ScoreRequest.parse(request_)

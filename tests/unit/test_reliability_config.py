"""Options of sample-answers, train-scorer and calibrate that do not go together are refused with the fix."""

from operator import attrgetter
from typing import Any

import pytest

from stitch_ray.config import CONFIGS
from stitch_ray.config.loading import validate
from stitch_ray.config.reliability import SIGNAL_NAMES
from stitch_ray.errors import UserError
from stitch_ray.reliability.signals.registry import FROM_PROMPTS, FROM_SAMPLES, FROM_TOKENS, SIGN

SAMPLE = {"data": {"paths": ["q.json"]}, "model": {"path": "m"}}
SCORER = {"answers": ["a.jsonl"], "encoder": {"path": "e"}}
CALIBRATE = {"answers": ["a.jsonl"]}


@pytest.mark.parametrize(
    ("job", "base", "change", "message"),
    [
        ("sample-answers", SAMPLE, {"endpoint": {"url": "u", "model": "m"}}, "give model or endpoint"),
        ("sample-answers", {"data": SAMPLE["data"]}, {}, "give model or endpoint"),
        (
            "sample-answers",
            {"data": SAMPLE["data"], "endpoint": {"url": "u", "model": "m"}},
            {"template": "raw"},
            "template has no effect with endpoint",
        ),
        ("sample-answers", SAMPLE, {"samples": {"greedy": False, "num": 0}}, "leave nothing to sample"),
        (
            "sample-answers",
            SAMPLE,
            {"samples": {"num": 1}, "signals": {"names": ["semantic_entropy"]}},
            "semantic_entropy compare samples and need samples.num of at least 2",
        ),
        ("sample-answers", SAMPLE, {"labels": {"metric": "bert_score"}}, "bert_score and labels.encoder go together"),
        ("sample-answers", SAMPLE, {"labels": {"metric": "judge"}}, "judge and labels.judge go together"),
        ("sample-answers", SAMPLE, {"signals": {"similarity": "nli"}}, "needs signals.encoder"),
        ("sample-answers", SAMPLE, {"signals": {"encoder": "e"}}, "exact has no use for it"),
        ("sample-answers", SAMPLE, {"signals": {"names": ["p_true", "p_true"]}}, "repeats a signal"),
        ("sample-answers", SAMPLE, {"split": {"test": 0.5}}, "must add up to 1"),
        ("train-scorer", {"answers": ["a.jsonl"]}, {}, "give encoder, signals, or both"),
        (
            "train-scorer",
            {"answers": ["a.jsonl"], "signals": ["perplexity"]},
            {"training": {"epochs": 2}},
            "training has no effect without encoder",
        ),
        ("train-scorer", SCORER, {"signals": ["p_true", "p_true"]}, "repeats a signal"),
        ("train-scorer", SCORER, {"tests": [{"name": "test", "answers": ["b"]}]}, "not 'test'"),
        ("train-scorer", SCORER, {"evaluation": {"risks": [0.0]}}, "between 0 and 1"),
        ("calibrate", CALIBRATE, {"predictions": ["p.parquet"]}, "one of them"),
        ("calibrate", {}, {}, "one of them"),
        ("calibrate", CALIBRATE, {"policy": "p.json"}, "policy and feedback go together"),
        ("calibrate", CALIBRATE, {"route": "dialogue"}, "does not keep its promise for a cascade"),
        ("calibrate", {"predictions": ["p"]}, {"scorer": "s"}, "scorer has no effect with predictions"),
        ("calibrate", CALIBRATE, {"targets": [{"risk": 0.1}, {"risk": 0.1}]}, "repeats a promise"),
        ("calibrate", CALIBRATE, {"targets": [{"risk": 1.0}]}, "less than 1"),
    ],
)
def test_what_does_not_go_together_is_refused(job: str, base: Any, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(CONFIGS[job], {**base, **change}, "config")


@pytest.mark.parametrize(
    ("job", "base", "defaults"),
    [
        ("sample-answers", SAMPLE, {"labels.metric": "exact_match", "signals.similarity": "exact", "endpoint": None}),
        ("train-scorer", SCORER, {"signals": [], "tests": []}),
        ("calibrate", CALIBRATE, {"route": "none", "loss": "error", "scorer": None}),
    ],
)
def test_the_smallest_configuration_is_enough_and_has_the_documented_defaults(
    job: str, base: Any, defaults: dict[str, Any]
) -> None:
    config = validate(CONFIGS[job], base, "config")
    assert {key: attrgetter(key)(config) for key in defaults} == defaults


def test_every_signal_has_a_direction_and_is_of_one_family() -> None:
    assert set(SIGN) == set(SIGNAL_NAMES)
    families = [*FROM_TOKENS, *FROM_SAMPLES, *FROM_PROMPTS, "answer_length"]
    assert sorted(families) == sorted(SIGNAL_NAMES)

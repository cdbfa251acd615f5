"""Labels of answers: best over the references, and no label where none can be told."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stitch_ray.config.sample_answers import LabelsConfig
from stitch_ray.engines.base import EngineError, Generation, Request
from stitch_ray.errors import UserError
from stitch_ray.reliability.answers.labels import Labelled, Labeller, judge_request, label_answers
from tests import needs
from tests.fake_endpoint import Fault, serving

pytestmark = pytest.mark.numeric


def item(answer: str, *references: str) -> Labelled:
    return Labelled(question="who?", answer=answer, references=references)


@pytest.mark.parametrize(
    ("options", "label"),
    [
        ({"metric": "exact_match"}, 0),
        ({"metric": "token_f1"}, 2 / 3),
        ({"metric": "rouge_l"}, 2 / 3),
        ({"metric": "rouge_l", "convention": "rouge_101"}, 0.6666666622),
    ],
)
def test_label_is_the_best_over_the_references(options: dict[str, Any], label: float) -> None:
    labels = label_answers([item("Broncos", "Carolina Panthers", "Denver Broncos", "")], LabelsConfig(**options))
    assert labels.label.tolist() == pytest.approx([label])
    assert labels.correct == [label >= 0.5]


def test_threshold_decides_what_is_correct() -> None:
    items = [item("Broncos", "Denver Broncos"), item("Denver Broncos", "Denver Broncos")]
    labels = label_answers(items, LabelsConfig(metric="token_f1", threshold=0.7))
    assert labels.correct == [False, True]


def test_empty_answers_are_labelled() -> None:
    labels = label_answers([item("", "Ada"), item("", "")], LabelsConfig(metric="token_f1"))
    assert labels.label.tolist() == [0, 1]


def test_without_references_there_is_no_label() -> None:
    labels = label_answers([item("Ada"), item("Ada", "Ada")], LabelsConfig())
    assert math.isnan(labels.label[0])
    assert labels.correct == [None, True]
    assert labels.reasons == {0: "no reference answer"}
    assert labels.counts == {"labelled": 1, "unlabelled": 1}


def test_none_labels_nothing() -> None:
    labels = label_answers([item("Ada", "Ada")], LabelsConfig(metric="none"))
    assert np.isnan(labels.label).all()
    assert labels.correct == [None]


def test_no_items_are_no_error() -> None:
    assert len(label_answers([], LabelsConfig()).label) == 0


def test_bert_score_labels_lie_between_zero_and_one() -> None:
    labeller = Labeller(LabelsConfig(metric="bert_score", encoder=str(needs.minilm()), threshold=0.9), num_threads=1)
    labels = labeller.label(
        [item("Denver Broncos", "Paris", "The Denver Broncos"), item("", "Ada"), item("Ada", "Ada")]
    )
    assert labels.correct == [True, False, True]
    assert labels.label.min() == 0
    assert labels.label.max() <= 1


def judging(replies: dict[str, str | EngineError], log: list[Request]) -> Labeller:
    def generate(requests: Sequence[Request]) -> list[list[Generation] | EngineError]:
        log.extend(requests)
        results: list[list[Generation] | EngineError] = []
        for request in requests:
            reply = next(reply for answer, reply in replies.items() if f'"answer": "{answer}"' in str(request.prompt))
            one = Generation(text=str(reply), token_ids=(), finish_reason="stop", prompt_tokens=1)
            results.append(reply if isinstance(reply, EngineError) else [one])
        return results

    return Labeller(judge_config("http://127.0.0.1:9/v1"), judge=generate)


def judge_config(url: str, **options: Any) -> LabelsConfig:
    return LabelsConfig.model_validate({"metric": "judge", "judge": {"url": url, "model": "fake", **options}})


def test_a_judge_gives_verdicts_and_its_silence_is_no_verdict() -> None:
    replies = {
        "right": '{"correct": true}',
        "wrong": "```json\n{'correct': False}\n```",
        "odd": "Well, it depends.",
        "lost": EngineError("x", "HTTP 500: down", retryable=True),
    }
    log: list[Request] = []
    items = [*(item(answer, "gold", "or") for answer in replies), item("right", "gold", "or"), item("right")]
    labels = judging(replies, log).label(items)
    assert labels.label[[0, 1, 4]].tolist() == [1, 0, 1]
    assert labels.correct == [True, False, None, None, True, None]
    assert labels.reasons.keys() == {2, 3, 5}
    assert labels.reasons[3] == "judge: HTTP 500: down"
    assert labels.counts == {
        "judge_asked": 4, "judge_repaired": 1, "judge_unparsable": 1, "judge_failed": 1,
        "labelled": 3, "unlabelled": 3,
    }  # fmt: skip
    assert len(log) == 4  # equal answers to one question are judged once
    assert all(request.sampling.temperature == 0 for request in log)


def test_a_judge_sees_all_references() -> None:
    (turn,) = judge_request(Labelled(question="q", answer="a", references=("r1", "r2"), context="c")).prompt
    for shown in ('"q"', '"a"', '"r1"', '"r2"', '"c"'):
        assert shown in turn.content  # type: ignore[union-attr]


def test_a_judge_is_asked_over_http() -> None:
    with serving('{"correct": true}', faults=[Fault(status=404)]) as endpoint:
        labels = label_answers([item("a", "b"), item("b", "b")], judge_config(endpoint.url, concurrency=1))
    assert labels.correct == [None, True]
    with pytest.raises(UserError, match="NOT_THERE is not set"):
        label_answers([item("a", "b")], judge_config(endpoint.url, api_key_env="NOT_THERE"))

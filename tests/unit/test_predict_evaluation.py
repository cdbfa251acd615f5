"""The evaluation of predictions, by hand: systems, costs, promises, and what is measured on which questions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from stitch_ray.ensemble.batch.evaluation import evaluate
from stitch_ray.ensemble.batch.measures import Answers, majority, measure, promise_kept
from stitch_ray.ensemble.batch.rows import PREDICTION_SCHEMA
from stitch_ray.ensemble.batch.traces import read_trace
from stitch_ray.report.predictions import DialogueFacts, PredictionsFacts, write_report
from tests.page import Page

Row = dict[str, Any]


def row(number: int, draft: bool, final: bool | None, confidences: tuple[float, float | None], **values: Any) -> Row:
    """A question with gold "yes"; `final` None: not refined. Decided at a threshold of 0.5."""
    text = {True: "yes", False: f"no {number}"}
    sure = confidences[0] >= 0.5
    answer, correct, reason = None, None, "unsure"
    if sure:
        answer, correct, reason = text[draft], draft, "confident"
    elif confidences[1] is not None and confidences[1] >= 0.5:
        assert final is not None
        answer, correct, reason = text[final], final, "refined"
    trace: list[Row] = [
        {"stage": "draft", "text": text[draft], "calls": 1, "tokens": 10, "seconds": 0.5},
        {"stage": "score", "confidence": confidences[0], "seconds": 0.5},
    ]
    if final is not None:
        trace += [
            {"stage": "turn", "speaker": "anna", "text": text[final], "comment": "hm", "changed": draft != final},
            {"stage": "rescore", "text": text[final], "confidence": confidences[1]},
        ]
    made = {
        "example_id": f"q{number}",
        "group_id": f"g{number}",
        "split": "test",
        "question": f"Question {number}?",
        "draft": text[draft],
        "draft_confidence": confidences[0],
        "draft_correct": draft,
        "draft_label": float(draft),
        "refined": None if final is None else text[final],
        "final_confidence": confidences[1],
        "final_correct": final,
        "final_label": None if final is None else float(final),
        "answer": answer,
        "correct": correct,
        "confidence": confidences[0] if sure else confidences[1],
        "decision": "abstain" if answer is None else "answer",
        "reason": reason,
        "route": "none" if final is None else "dialogue",
        "target_risk": 0.2,
        "calls": 1 if final is None else 4,
        "tokens": 10 if final is None else 100,
        "seconds": 1.0 if final is None else 5.0,
        "trace": json.dumps(trace),
    }
    return {**made, **values}


BOTH = [
    row(0, True, True, (0.9, 0.9)),
    row(1, True, False, (0.8, 0.9)),  # sure of a right draft, which refining would have broken
    row(2, False, True, (0.2, 0.7)),
    row(3, False, False, (0.1, 0.2)),
]


def table(rows: list[Row]) -> pa.Table:
    return pa.Table.from_pylist(rows, PREDICTION_SCHEMA)


def evaluated(rows: list[Row], **values: Any) -> Any:
    options: Row = {"both_stages": True, "route": "dialogue", "auxiliaries": [], "loss": "error", "seed": 0}
    return evaluate(table(rows), [("yes",)] * len(rows), **{**options, **values})


def test_every_system_is_measured_on_the_same_questions_with_its_own_cost() -> None:
    found = evaluated(BOTH)
    of = {system.name: system for system in found.systems}
    assert list(of) == ["primary alone", "always refined", "cascade", "cascade without abstaining"]
    assert [of[name].accuracy.value for name in of] == [0.5, 0.5, 1.0, 0.75]
    assert [of[name].coverage for name in of] == [1, 1, 0.75, 1]
    assert [of[name].calls for name in of] == [1, 4, 2.5, 2.5]  # a sure draft would not have been refined
    assert [of[name].tokens for name in of] == [10, 100, 55, 55]
    assert [of[name].seconds for name in of] == [1, 5, 3, 3]
    assert of["primary alone"].exact_match.value == 0.5
    assert of["cascade"].accuracy.low == pytest.approx(0.025 ** (1 / 3))  # Clopper and Pearson's, 3 of 3
    assert found.refined is not None
    assert (found.refined.corrected, found.refined.broken) == (1, 1)
    assert found.refined.oracle_union == 0.75
    assert found.point == (0.75, 0.0)
    assert set(found.curves) == {"cascade", "draft", "always refined"}
    coverage, risk = found.curves["cascade"]
    assert (risk[coverage == 0.75].tolist(), risk[coverage == 1].tolist()) == ([0], [0.5])


def test_of_a_plain_run_only_what_was_refined_counts_as_refined() -> None:
    rows = [row(0, True, None, (0.9, None)), row(1, False, None, (0.8, None)), row(2, False, True, (0.2, 0.7))]
    found = evaluated(rows, both_stages=False)
    assert [system.name for system in found.systems] == ["primary alone", "cascade", "cascade without abstaining"]
    assert found.refined is not None
    assert (found.refined.num, found.refined.corrected) == (1, 1)
    assert [kept.as_dict()["wrong"] for kept in found.promises] == [1.0]
    assert set(found.curves) == {"draft"}


def test_measured_is_the_test_split_where_there_is_one_and_only_labelled_questions() -> None:
    train = [{**one, "split": "train", "draft_correct": True} for one in BOTH]
    assert evaluated([*BOTH, *train]).num == 4
    whole = evaluated(train)
    assert (whole.num, whole.split) == (4, None)
    unlabelled = [{**one, **dict.fromkeys(("draft_label", "draft_correct", "correct"))} for one in BOTH]
    assert evaluated(unlabelled) is None


def test_a_promise_is_held_or_not_by_the_losses_of_the_answers_given() -> None:
    losses = np.array([0.0] * 9 + [1.0])
    kept = promise_kept(0.1, losses, 20, 0)
    assert kept.held
    assert (kept.answered, kept.wrong, kept.risk) == (10, 1, 0.1)
    assert kept.low < 0.1 < kept.high
    assert promise_kept(0.05, losses, 20, 0).held is False
    nothing = promise_kept(0.1, np.empty(0), 20, 0)
    assert nothing.held is None
    assert nothing.as_dict()["risk"] is None
    graded = promise_kept(0.3, np.array([0.25] * 50), 50, 0)
    assert (graded.low, graded.high) == (0.25, 0.25)


def test_the_majority_wins_and_the_primary_decides_where_there_is_none() -> None:
    members: list[list[str | None]] = [["a b", "x", None, None], ["Rome", "y", "z", None], ["rome.", "w", "v", None]]
    assert majority(members) == [1, 0, 1, None]


def test_auxiliaries_alone_and_the_majority_have_costs_of_their_own() -> None:
    extra = {"answer.anna": "yes", "correct.anna": True, "tokens.anna": 30, "seconds.anna": 2.0}
    rows = [{**one, **extra} for one in BOTH]
    columns = {name: [one[name] for one in rows] for name in extra}
    whole = table(BOTH)
    for name, values in columns.items():
        whole = whole.append_column(name, pa.array(values))
    found = evaluate(
        whole, [("yes",)] * 4, both_stages=True, route="dialogue", auxiliaries=["anna"], loss="error", seed=0
    )
    assert found is not None
    of = {system.name: system for system in found.systems}
    assert (of["anna alone"].accuracy.value, of["anna alone"].calls, of["anna alone"].tokens) == (1, 1, 30)
    assert (of["majority of all"].calls, of["majority of all"].seconds) == (2, 2)


def test_intervals_of_a_mean_hold_it_and_unlabelled_answers_do_not_count() -> None:
    answers = Answers(name="x", texts=["yes", "no", None, "yes"], correct=[True, False, None, None])
    found = measure(answers, [("yes",)] * 4, np.arange(4), 0)
    assert (found.answered, found.num) == (2, 4)
    assert found.accuracy.low < 0.5 < found.accuracy.high
    assert math.isnan(found.calls)


def test_a_trace_without_texts_still_tells_confidences_and_turns() -> None:
    stages = read_trace([{"stage": "draft"}, {"stage": "score", "confidence": 0.3}, {"stage": "turn", "speaker": "a"}])
    assert (stages.draft, stages.draft_confidence, stages.refined, len(stages.turns)) == (None, 0.3, None, 1)
    same = [{"stage": "draft", "text": "x"}, {"stage": "rescore", "confidence": 0.3, "same_as_draft": True}]
    assert (read_trace(same).refined, read_trace(same).final_confidence) == ("x", 0.3)


def test_the_report_shows_systems_promises_chance_and_the_dialogue_and_escapes_what_models_say(tmp_path: Path) -> None:
    found = evaluated(BOTH)
    example: DialogueFacts = {
        "question": "Who <b>wrote</b> it?",
        "references": ["Homer"],
        "draft": "Bach",
        "draft_confidence": 0.2,
        "draft_correct": False,
        "refined": "Homer",
        "final_confidence": 0.8,
        "final_correct": True,
        "decision": "answer",
        "turns": [{"speaker": "anna", "answer": "Homer", "comment": "<script>alert(1)</script>", "changed": True}],
    }
    facts: PredictionsFacts = {
        "who": "primary, refined by anna and ben",
        "questions": 4,
        "decisions": {"answer": 3, "abstain": 1},
        "reasons": {"confident": 2, "refined": 1, "unsure": 1},
        "confidences": {"draft": np.array([0.9, 0.8, 0.2, np.nan])},
        "evaluation": found.as_dict(),
        "curves": found.curves,
        "point": found.point,
        "examples": [example],
        "quarantined": [],
    }
    write_report(tmp_path / "report.html", facts)
    html = (tmp_path / "report.html").read_text()
    assert "<script>" not in html
    page = Page(html)
    for text in (
        "3 of 4 questions answered",
        "cascade without abstaining",
        "held",
        "corrected",
        "Oracle",
        "who",
        "anna",
    ):
        assert text in page.text
    write_report(tmp_path / "report.html", {})
    assert "Predictions" in Page((tmp_path / "report.html").read_text()).text

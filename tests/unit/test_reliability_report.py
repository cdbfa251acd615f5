"""The reports of `sample-answers`, `train-scorer` and `calibrate`, on facts made here: no Ray, no model."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stitch_ray.data.quarantine import Quarantined
from stitch_ray.reliability.evaluation import evaluate
from stitch_ray.reliability.metrics import risk_coverage_curve
from stitch_ray.report import (
    answer_figures,
    answers,
    calibration,
    policy_figures,
    reliability,
    reliability_figures,
    risk_curves,
    scorer,
    scorer_figures,
)
from tests.page import Page

EVIL = '</title></div><script>alert("x")</script><img src=x onerror=alert(1)> & \'"'
NAN = float("nan")
MANIFEST = {
    "created": "2026-07-24T12:00:00+0000",
    "seed": 3,
    "work_hash": "0123456789abcdef",
    "config_hash": "fedcba9876543210",
    "versions": {"ray": "2.60.0"},
    "machine": {"cpus": 2},
    "rows_quarantined": 25,
}
BAD = [Quarantined("data/a.jsonl", 100 + row, f"answer has {600 + row} tokens", "excerpt") for row in range(25)]
Write = Callable[[Path, Any], None]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Page]:
    """The three pages with all facts and their figures."""
    names = ("scorer", "calibration", "answers")
    return {
        name: page_of(write, facts(), tmp_path_factory.mktemp(name))
        for name, (write, facts) in zip(names, PAGES, strict=True)
    }


def page_of(write: Write, facts: Mapping[str, Any], folder: Path) -> Page:
    write(folder / "report.html", facts)
    return Page((folder / "report.html").read_text("utf-8"))


def sections(page: Page) -> list[str | None]:
    return [attributes["id"] for tag, attributes in page.tags if tag == "section"]


def figures_of(page: Page) -> list[str | None]:
    return [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time, and many tests are about words."""
    for module in (answer_figures, policy_figures, reliability_figures, scorer_figures):
        monkeypatch.setattr(module, "svg", lambda draw, height, title: f'<svg aria-label="{title}"></svg>')


def held_out(count: int = 240, seed: int = 0) -> dict[str, Any]:
    """Test answers whose confidence is their true probability, and a length that says nothing."""
    rng = np.random.default_rng(seed)
    probability = rng.beta(1.6, 0.9, count)
    residual = (rng.random(count) >= probability).astype(np.float64)
    confidences = {"scorer": probability, "answer_length": -rng.integers(1, 40, count).astype(np.float64)}
    return {
        "residual": residual,
        "confidences": {**confidences, "random": rng.random(count)},
        "probability": probability,
        "before": np.sqrt(probability),
        "groups": np.array([f"g{row // 2}" for row in range(count)]),
    }


def evaluated(test: Mapping[str, Any]) -> dict[str, Any]:
    found = evaluate(
        test["confidences"], test["residual"], groups=test["groups"], probabilities=("scorer",), bootstrap=50
    )
    return json.loads(json.dumps(found.as_dict(), allow_nan=False))


def row(name: str, **metrics: float | tuple[float, float, float] | None) -> dict[str, Any]:
    cells = {
        key: dict(
            zip(("value", "low", "high"), value if isinstance(value, tuple) else (value, None, None), strict=True)
        )
        for key, value in metrics.items()
    }
    return {"name": name, "metrics": cells, "scored": 100, "unscored": 0}


def scorer_facts() -> dict[str, Any]:
    test = held_out()
    records = [{"kind": "start", "step": 0}]
    records += [{"kind": "step", "step": step, "loss": 1 / step} for step in range(1, 101)]
    records += [{"kind": "validation", "step": step, "loss": 0.5 + 0.1 / step} for step in (50, 100)]
    return {
        "run": "first",
        "manifest": MANIFEST,
        "config": {"answers": ["runs/answers"], "seed": 3},
        "notes": ["Look here."],
        "quarantined": BAD,
        "scorer": "scorer",
        "splits": {
            "train": {"answers": 1000, "questions": 200, "correct": 0.5},
            "test": {"answers": 240, "questions": 120, "correct": 0.625},
        },
        "evaluation": evaluated(test),
        "majority": 0.625,
        "differences": [
            {
                "first": "scorer",
                "second": "answer_length",
                "metric": "auroc",
                "difference": {"value": 0.25, "low": 0.125, "high": 0.375},
            }
        ],
        "test": test,
        "encoder": {
            "records": records,
            "loss": "bce",
            "path": "model",
            "parameters": 22_000_000,
            "step": 50,
            "best_loss": 0.502,
            "steps": 100,
            "total_steps": 300,
            "seconds": 12.0,
            "notes": ["The train split has one class."],
        },
        "weights": [
            {"name": "encoder", "coef": 1.5, "mean": 0.25, "scale": 2.0},
            {"name": "perplexity", "coef": -0.5, "mean": 3.0, "scale": 1.0},
        ],
        "intercept": 0.125,
        "tests": [
            {
                "name": "by people",
                "answers": 100,
                "questions": 90,
                "correct": 0.575,
                "majority": 0.575,
                "evaluation": {"rows": [row("scorer", auroc=(0.625, 0.5, 0.75), accuracy=0.6, balanced_accuracy=0.55)]},
                "published": [{"name": "meta-validator", "accuracy": 0.566, "note": "on its training rows"}],
            }
        ],
        "examples": [
            {"question": "q0", "answer": "sure and wrong", "correct": False, "confidence": 0.9},
            {"question": "q1", "answer": "unsure and right", "correct": True, "confidence": 0.2, "label": 0.8},
        ],
        "fingerprint": "aaaabbbbccccdddd",
        "answers_from": "eeeeffff00001111",
    }


def target(**changes: Any) -> dict[str, Any]:
    check = {"total": 500, "answered": 250, "wrong": 20, "risk": 0.08, "low": 0.05, "high": 0.12, "held": True}
    return {
        "task": None,
        "target_risk": 0.1,
        "delta": 0.1,
        "threshold": 0.75,
        "n_calibration": 1000,
        "num_accepted": 480,
        "empirical_risk": 0.0725,
        "coverage": 0.48,
        "p_value": 0.0123,
        "method": "learn_then_test",
        "reason": None,
        "test": check,
        **changes,
    }


def abstaining() -> dict[str, Any]:
    return target(
        target_risk=0.025,
        threshold=None,
        n_calibration=40,
        num_accepted=0,
        empirical_risk=None,
        coverage=0.0,
        p_value=None,
        reason="needs at least 90 accepted calibration answers without an error; there are 40",
        test={"total": 500, "answered": 0, "wrong": 0, "risk": None, "low": None, "high": None, "held": None},
    )


def calibration_facts() -> dict[str, Any]:
    test = held_out(seed=1)
    curve = risk_coverage_curve(test["probability"], test["residual"])
    return {
        "manifest": MANIFEST,
        "config": {"targets": [{"risk": 0.1}]},
        "quarantined": [],
        "targets": [target(stages={"draft": 200, "refined": 50, "abstained": 250}), abstaining()],
        "policy": {
            "version": "0011223344556677",
            "created_from": None,
            "fingerprints": {"primary": "aa11", "auxiliaries": ["bb22", "cc33"], "scorer": None, "route": "revise"},
            "joint_delta": 0.2,
        },
        "route": "revise",
        "loss": "error",
        "splits": {"calibrate": {"answers": 1000, "questions": 1000, "correct": 0.6}},
        "curve": {"coverage": curve.coverage, "risk": curve.risk, "threshold": curve.threshold},
        "test": {"confidence": test["probability"], "correct": 1 - test["residual"]},
        "evaluation": {"rows": [row("confidence", auroc=0.75)], "notes": []},
        "monitor": {
            "target_risk": 0.1,
            "alpha": 0.05,
            "wealth": np.geomspace(1, 40, 60),
            "labels": 60,
            "wrong": 14,
            "alarm": True,
            "alarm_at": 49,
        },
        "caveats": ["Answers in use must be like those of the calibration."],
    }


def answers_facts() -> dict[str, Any]:
    rng = np.random.default_rng(2)
    correct = rng.random(90) < 0.6
    return {
        "manifest": MANIFEST,
        "config": {"samples": {"num": 2}},
        "quarantined": BAD[:1],
        "model": "models/tiny, transformers, float32",
        "questions": 100,
        "answers": 300,
        "tokens": 1500,
        "tokens_per_second": 250.0,
        "failures": 0,
        "metric": "token_f1",
        "label_threshold": 0.5,
        "kinds": {
            "greedy": {
                "answers": 100,
                "labelled": 90,
                "correct": 0.6,
                "empty": 3,
                "cut": 0,
                "labels": np.where(np.arange(100) < 90, np.linspace(0, 1, 100), NAN),
                "tokens": rng.integers(0, 30, 100),
            },
            "sample": {"answers": 200, "labelled": 0, "correct": None, "labels": np.full(200, NAN)},
        },
        "splits": {"test": {"answers": 30, "questions": 15, "correct": 0.6}},
        "trained_on": {"test": 4},
        "signals": {"perplexity": 3 - correct + rng.random(90), "p_true": np.full(90, NAN)},
        "correct": correct,
        "aurocs": {
            "perplexity": {"value": 0.875, "low": 0.75, "high": 0.9375},
            "p_true": {"value": None, "low": None, "high": None},
        },
        "distractors": {"asked": 60, "repaired": 5, "answers": 250},
        "examples": [
            {
                "question": "What is 2 + 2?",
                "references": ["4"],
                "split": "test",
                "signals": {"perplexity": 1.25, "p_true": None},
                "answers": [
                    {"kind": "greedy", "answer": "4", "label": 1.0, "correct": True, "cluster": 0},
                    {"kind": "sample", "answer": "", "label": None, "correct": None, "cluster": 1},
                ],
            }
        ],
    }


PAGES: list[tuple[Write, Callable[[], dict[str, Any]]]] = [
    (scorer.write_report, scorer_facts),
    (calibration.write_report, calibration_facts),
    (answers.write_report, answers_facts),
]


# All pages


@pytest.mark.parametrize("name", ["scorer", "calibration", "answers"])
def test_a_page_loads_nothing_and_its_links_lead_somewhere(name: str, drawn: dict[str, Page]) -> None:
    page = drawn[name]
    assert not {"script", "link", "iframe", "img", "object", "embed"} & {tag for tag, _ in page.tags}
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in {"src", "href"}]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert links
    assert all(value and value.startswith("#") for value in links)
    assert {str(value)[1:] for value in links} <= set(ids)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(("write", "facts"), PAGES)
@pytest.mark.usefixtures("no_figures")
def test_every_text_is_escaped(write: Write, facts: Callable[[], dict[str, Any]], tmp_path: Path) -> None:
    def poisoned(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return {name: poisoned(part, name) for name, part in value.items()}
        if isinstance(value, list):
            return [poisoned(part, key) for part in value]
        return f"{value}{EVIL}" if isinstance(value, str) and key not in {"kind", "loss", "metric", "route"} else value

    page = page_of(write, poisoned(facts()), tmp_path)
    assert not {"script", "img"} & {tag for tag, _ in page.tags}
    assert EVIL in " ".join(page.words)


@pytest.mark.parametrize(
    ("write", "facts", "left"),
    [
        (scorer.write_report, {}, []),
        (calibration.write_report, {"targets": [{"target_risk": 0.1, "delta": 0.1, "threshold": 0.5}]}, ["promises"]),
        (calibration.write_report, {"targets": [{"target_risk": 0.1, "delta": 0.1, "threshold": None}]}, ["promises"]),
        (answers.write_report, {}, []),
    ],
)
def test_missing_facts_leave_their_sections_out(
    write: Write, facts: dict[str, Any], left: list[str], tmp_path: Path
) -> None:
    page = page_of(write, facts, tmp_path)
    assert sections(page) == left
    assert not figures_of(page)


@pytest.mark.parametrize(("write", "facts"), PAGES)
@pytest.mark.usefixtures("no_figures")
def test_any_single_fact_may_be_missing_and_takes_its_own_section_with_it(
    write: Write, facts: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    own = {"evaluation": "scores", "quarantined": "quarantine", "tests": "further", "signals": "kept by their AUROCs"}
    whole = facts()
    shown = sections(page_of(write, whole, tmp_path))
    for name in whole.keys() - {"targets"}:
        page = page_of(write, {key: value for key, value in whole.items() if key != name}, tmp_path)
        assert sections(page) == [section for section in shown if section != own.get(name, name)], name


@pytest.mark.usefixtures("no_figures")
def test_quarantine_says_what_was_lost_or_that_nothing_was(tmp_path: Path) -> None:
    page = page_of(scorer.write_report, {"quarantined": BAD}, tmp_path)
    assert "All 25 are in quarantine.jsonl" in page.text
    assert "25 answer has N tokens" in page.text
    assert "data/a.jsonl:119 " in page.text
    assert "data/a.jsonl:120 " not in page.text
    assert "every row that was read could be used" in page_of(scorer.write_report, {"quarantined": []}, tmp_path).text


# Scorer


def test_scorer_page_has_all_sections_with_their_numbers(drawn: dict[str, Page]) -> None:
    facts, page = scorer_facts(), drawn["scorer"]
    assert sections(page) == [
        "scores", "pictures", "splits", "training", "further", "examples", "quarantine", "reproduce",
    ]  # fmt: skip
    assert figures_of(page) == [
        "AUROC of every score",
        "Risk against coverage",
        "Stated and observed",
        "Confidence of right and wrong answers",
        "Loss of the encoder",
        "Weights of the stack",
        "AUROC of every score",
    ]
    cell = facts["evaluation"]["rows"][0]["metrics"]["auroc"]
    assert f"AUROC {cell['value']:.3f} ({cell['low']:.3f} to {cell['high']:.3f}) on 240 test answers" in page.text
    assert "1,240 labelled answers" in page.text
    assert "train 200 1,000 50%" in page.text
    assert "scorer answer length AUROC 0.250 (0.125 to 0.375)" in page.text
    assert "always the more frequent 0.625 0.500" in page.text
    assert "meta-validator 0.566 – on its training rows" in page.text
    assert "Kept: step 50 of 100. Lowest validation loss 0.5020. Stopped early: 300 steps were planned." in page.text
    assert "perplexity -0.5000 3.0000 1.0000" in page.text
    assert "Look here." in page.text
    assert "The train split has one class." in page.text
    assert "at risk 5% at risk 10% at risk 20%" in page.text


@pytest.mark.usefixtures("no_figures")
def test_a_score_that_could_not_be_measured_is_shown_with_a_dash(tmp_path: Path) -> None:
    rows = [row("scorer", auroc=0.7, aurc=0.2), row("p_true", auroc=None, aurc=NAN)]
    page = page_of(scorer.write_report, {"evaluation": {"rows": rows}}, tmp_path)
    assert "P(True) – – 100 0" in page.text


@pytest.mark.usefixtures("no_figures")
def test_a_single_class_gives_a_page_without_an_auroc(tmp_path: Path) -> None:
    test = held_out()
    test["residual"] = np.zeros(240)
    page = page_of(scorer.write_report, {"evaluation": evaluated(test), "test": test}, tmp_path)
    assert "AUROC could not be measured on 240 test answers" in page.text
    assert "All 240 answers are right" in page.text
    assert "AUROC of every score" not in figures_of(page)


@pytest.mark.usefixtures("no_figures")
def test_a_scorer_at_chance_and_one_behind_a_baseline_are_pointed_out(tmp_path: Path) -> None:
    rows = [row("scorer", auroc=(0.55, 0.48, 0.62)), row("stack", auroc=0.56), row("answer_length", auroc=0.61)]
    page = page_of(scorer.write_report, {"scorer": "scorer", "evaluation": {"rows": rows}}, tmp_path)
    assert "0.480 to 0.620, holds 0.5" in page.text
    assert "At least as high an AUROC as the scorer (0.550): answer length (0.610)." in page.text
    better = [row("scorer", auroc=(0.7, 0.6, 0.8)), row("answer_length", auroc=0.61)]
    assert "Worth a look" not in page_of(scorer.write_report, {"evaluation": {"rows": better}}, tmp_path).text


def test_telling_examples_are_the_confidently_wrong_and_the_unsure_right_ones() -> None:
    given: list[reliability.ExampleFacts] = [
        {"question": "", "answer": str(place), "correct": correct, "confidence": confidence}
        for place, (correct, confidence) in enumerate(
            [(False, 0.2), (False, 0.9), (True, 0.8), (True, 0.1), (False, None), (None, 0.99), (False, 0.5)]
        )
    ]
    assert [one["answer"] for one in scorer.telling(given, most=2)] == ["1", "6", "3", "2"]


# Calibration


def test_calibration_page_states_the_promise_and_how_it_went(drawn: dict[str, Page]) -> None:
    page = drawn["calibration"]
    assert sections(page) == [
        "promises", "check", "curves", "monitor", "caveats", "scores", "splits", "quarantine", "reproduce",
    ]  # fmt: skip
    assert figures_of(page) == [
        "Where questions end",
        "Calibration split",
        "Test split",
        "Stated and observed",
        "Confidence of right and wrong answers",
        "Wealth against the promise",
    ]
    promise = "Of the answers given, at most 10% are wrong, with probability 90% over the calibration data"
    assert f"+0000 {promise} An answer is given" in page.text
    assert "the promise covers both stages together" in page.text
    assert "480 of 1,000 calibration answers (48%) reach it, 7.2% of these are wrong; p = 0.0123" in page.text
    assert "at most 10% 500 250 50% 20 8.0% (5.0% to 12%) held" in page.text
    assert "for all 2 of them together count with 80%" in page.text
    assert "Alarm at label 49." in page.text
    assert "route revise" in page.text


@pytest.mark.usefixtures("no_figures")
def test_a_policy_that_abstains_on_everything_says_why_and_what_is_needed(tmp_path: Path) -> None:
    page = page_of(calibration.write_report, {"targets": [abstaining()]}, tmp_path)
    assert "No threshold keeps the risk at 2.5%: every question gets an abstention" in page.text
    assert "Needs at least 90 accepted calibration answers without an error; there are 40." in page.text
    assert "An answer is given when" not in page.text
    assert "nothing answered" in page.text
    assert "held" not in page.text


@pytest.mark.parametrize(
    ("low", "verdict", "why"),
    [
        (0.09, "exceeded, within chance", "so few answers can show that by chance"),
        (0.11, "exceeded", "The whole interval lies above"),
    ],
)
@pytest.mark.usefixtures("no_figures")
def test_a_broken_promise_is_said_with_what_it_may_mean(low: float, verdict: str, why: str, tmp_path: Path) -> None:
    check = {"total": 500, "answered": 250, "wrong": 34, "risk": 0.136, "low": low, "high": 0.18, "held": False}
    page = page_of(calibration.write_report, {"targets": [target(test=check)]}, tmp_path)
    assert f"14% ({low:.{1 if low < 0.0995 else 0}%} to 18%) {verdict} " in f"{page.text} "
    assert why in page.text


@pytest.mark.usefixtures("no_figures")
def test_without_an_interval_nothing_is_said_about_chance(tmp_path: Path) -> None:
    check = {"total": 500, "answered": 250, "wrong": 34, "risk": 0.136, "low": NAN, "high": NAN, "held": False}
    page = page_of(calibration.write_report, {"targets": [target(test=check)]}, tmp_path)
    assert "14% of the answers given were wrong, more than the promised 10%." in page.text
    assert "chance" not in page.text.split("Promises")[0]


@pytest.mark.usefixtures("no_figures")
def test_confidences_that_are_no_probabilities_have_no_reliability_diagram(tmp_path: Path) -> None:
    facts = {"targets": [target()], "test": {"confidence": np.array([-3.0, 0.5]), "correct": np.array([0.0, 1])}}
    drawn = figures_of(page_of(calibration.write_report, facts, tmp_path))
    assert "Stated and observed" not in drawn
    assert "Confidence of right and wrong answers" in drawn


def test_unscored_test_answers_count_as_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(
        reliability_figures, "risk_coverage", lambda curves, title, **given: seen.update(curves, **given) or ""
    )
    confidence, correct = np.array([0.9, 0.8, 0.1, NAN]), np.array([1.0, 0, 0, 1])
    facts = {"targets": [target()], "test": {"confidence": confidence, "correct": correct}}
    page_of(calibration.write_report, facts, tmp_path)
    np.testing.assert_allclose(seen["test"][0], [0.25, 0.5, 0.75])
    assert seen["marks"] == [(0.5, "risk 10%")]
    facts = {**facts, "targets": [target(), target(target_risk=0.2, threshold=0.1)], "route": "revise"}
    page_of(calibration.write_report, facts, tmp_path)
    assert seen["marks"] == [(0.5, "risk 10%")]  # another threshold of a cascade decides on other answers


@pytest.mark.usefixtures("no_figures")
def test_promises_name_their_task_and_a_loss_that_is_no_error(tmp_path: Path) -> None:
    page = page_of(calibration.write_report, {"targets": [target(task="maths")], "loss": "quality"}, tmp_path)
    assert "The mean loss (1 less the label) of the answers given to task maths is at most 0.1" in page.text


@pytest.mark.usefixtures("no_figures")
def test_a_policy_made_from_feedback_has_no_coverage(tmp_path: Path) -> None:
    page = page_of(calibration.write_report, {"targets": [target(coverage=None)], **_only("curve")}, tmp_path)
    assert "– answered, calibration" in page.text


def _only(name: str) -> dict[str, Any]:
    return {name: calibration_facts()[name]}


# Answers


def test_answers_page_has_all_sections_with_their_numbers(drawn: dict[str, Page]) -> None:
    page = drawn["answers"]
    assert sections(page) == ["kinds", "signals", "splits", "distractors", "examples", "quarantine", "reproduce"]
    assert figures_of(page) == ["Labels", "Lengths", "AUROC of every signal", "Signals"]
    assert "300 answers to 100 questions: 60% of the greedy ones are right" in page.text
    assert "Labelled by token F1, right from 0.50 on" in page.text
    assert "250 tokens a second" in page.text
    assert "sample 200 0 – – – – –" in page.text
    assert "test 15 30 60% 4" in page.text
    assert "60 5 0 0 250" in page.text
    assert "wrong" not in page.text.split("What is 2 + 2?")[1].split("Quarantine")[0]
    assert "sample cluster B (empty)" in page.text
    assert "perplexity 1.250 P(True) –" in page.text


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"kinds": {"greedy": {"correct": 0.95}}}, "95% of the greedy answers are right: with so few wrong ones"),
        ({"kinds": {"greedy": {"correct": 0.05}}}, "5.0% of the greedy answers are right: with so few right ones"),
        ({"kinds": {"sample": {"answers": 100, "cut": 6}}}, "6.0% of the sample answers were cut"),
        ({"questions": 90, "failures": 10}, "10% of the questions were given up"),
        ({"signals": {"p_true": np.full(4, NAN)}}, "P(True) could not be computed for 100% of the answers"),
        ({"aurocs": {"perplexity": {"value": 0.3, "low": 0.2, "high": 0.4}}}, "perplexity points the wrong way"),
    ],
)
@pytest.mark.usefixtures("no_figures")
def test_answers_that_will_disappoint_are_pointed_out(changes: dict[str, Any], note: str, tmp_path: Path) -> None:
    assert note in page_of(answers.write_report, changes, tmp_path).text
    assert "Worth a look" not in page_of(answers.write_report, answers_facts() | {"signals": {}}, tmp_path).text


# Curves and figures


def test_oracle_curve_is_below_every_other() -> None:
    test = held_out()
    coverage, best = risk_curves.oracle_curve(test["residual"])
    for confidence in test["confidences"].values():
        at, risk = risk_curves.risk_curve(confidence, test["residual"])
        assert (np.interp(at, coverage, best) <= risk + 1e-12).all()
    assert best[-1] == pytest.approx(test["residual"].mean())


def test_unscored_answers_are_not_in_a_curve() -> None:
    coverage, risk = risk_curves.risk_curve(np.array([0.9, NAN, 0.1]), np.array([0.0, 1.0, 1.0]))
    np.testing.assert_allclose(coverage, [0.5, 1])
    np.testing.assert_allclose(risk, [0, 0.5])
    assert all(len(part) == 0 for part in risk_curves.risk_curve(np.array([NAN]), np.array([1.0])))


def test_band_holds_the_curve_and_does_not_depend_on_the_order_of_rows() -> None:
    test = held_out(400)
    confidence, residual, groups = np.round(test["probability"], 1), test["residual"], test["groups"]
    found = risk_curves.risk_band(confidence, residual, groups)
    assert found
    coverage, low, high = found
    at, risk = risk_curves.risk_curve(confidence, residual)
    inside = at >= coverage[0]
    assert (np.interp(at[inside], coverage, low) <= risk[inside] + 0.01).all()
    assert (np.interp(at[inside], coverage, high) >= risk[inside] - 0.01).all()
    order = np.random.default_rng(5).permutation(400)
    other = risk_curves.risk_band(confidence[order], residual[order], groups[order])
    assert other
    np.testing.assert_allclose(np.stack(other), np.stack(found))
    assert risk_curves.risk_band(confidence[:19], residual[:19]) is None


def test_band_is_wider_where_the_answers_to_a_question_are_alike() -> None:
    residual = np.repeat([0.0, 1.0, 0.0], 100)
    confidence = np.random.default_rng(1).random(300)
    alone, together = (risk_curves.risk_band(confidence, residual, groups) for groups in (None, np.arange(300) // 20))
    assert alone
    assert together
    assert (together[2] - together[1]).mean() > 2 * (alone[2] - alone[1]).mean()


def test_binned_probabilities_by_hand() -> None:
    """Bins [0, .5) and [.5, 1]: .1 and .3 with one right of two; .5, 1 and 1 with two right of three."""
    probability, correct = np.array([0.1, 0.3, 0.5, 1.0, 1.0, NAN]), np.array([0.0, 1, 0, 1, 1, 0])
    stated, share, count, right = reliability_figures._binned(probability, correct, np.array([0, 0.5, 1]))
    np.testing.assert_allclose(stated, [0.2, 2.5 / 3])
    np.testing.assert_allclose(share, [1 / 2, 2 / 3])
    np.testing.assert_allclose([*count, *right], [2, 3, 1, 2])


def test_a_forest_is_sorted_and_leaves_unknown_values_out() -> None:
    rows = [("low", 0.4, 0.3, 0.5), ("unknown", NAN, NAN, NAN), ("high", 0.9, NAN, NAN)]
    page = Page(reliability_figures.forest(rows, "AUROC", "t"))
    assert "unknown" not in page.text
    assert page.text.index("low") < page.text.index("high")  # drawn from the bottom
    assert "0.900" in page.text


def test_labels_in_figures_are_escaped() -> None:
    curve = (np.array([0.5, 1.0]), np.array([0.1, 0.2]))
    for drawn in (
        reliability_figures.risk_coverage({EVIL: curve}, EVIL, marks=[(0.5, EVIL)]),
        reliability_figures.forest([(EVIL, 0.5, 0.4, 0.6)], EVIL, EVIL),
        scorer_figures.coefficients([EVIL], [1.0], EVIL),
        policy_figures.stages([(EVIL, 1, 2, 3)], EVIL),
        answer_figures.histogram_rows({EVIL: np.ones(3)}, EVIL, EVIL),
    ):
        assert not {"script", "img"} & {tag for tag, _ in Page(drawn).tags}


def test_figures_of_two_hundred_thousand_answers_stay_small() -> None:
    rng = np.random.default_rng(0)
    confidence, residual = rng.random(200_000), (rng.random(200_000) < 0.3).astype(np.float64)
    curve = risk_curves.risk_curve(confidence, residual)
    oracle = risk_curves.oracle_curve(residual)
    assert len(reliability_figures.risk_coverage({"a": curve, "b": curve}, "t", oracle=oracle)) < 60_000
    assert len(reliability_figures.reliability_diagram(confidence, 1 - residual, "t", before=confidence)) < 40_000
    assert len(reliability_figures.score_histograms(confidence, residual < 0.5, "t")) < 30_000
    assert len(policy_figures.wealth(np.exp(np.cumsum(rng.normal(size=200_000)) / 1000), 0.05, "t")) < 60_000


@pytest.mark.parametrize("values", [[0.5], [0.5, 0.5], [0.0, 1.0], [NAN, 0.3]])
def test_any_few_confidences_can_be_drawn(values: list[float]) -> None:
    confidence, correct = np.array(values), np.arange(len(values)) % 2
    for drawn in (
        reliability_figures.reliability_diagram(confidence, correct.astype(np.float64), "t"),
        reliability_figures.score_histograms(confidence, correct.astype(np.bool_), "t", thresholds=[(0.5, "t")]),
        answer_figures.histogram_rows({"a": confidence}, "x", "t"),
        answer_figures.signal_panels({"a": confidence, "b": -confidence}, correct.astype(np.bool_), {"a": 1}, "t"),
        scorer_figures.coefficients(["a"] * len(values), np.nan_to_num(confidence).tolist(), "t"),
        policy_figures.wealth(np.nan_to_num(confidence), 0.05, "t"),
    ):
        assert figures_of(Page(drawn)) == ["t"]
        assert "nan" not in drawn.lower()


@pytest.mark.parametrize("tokens", [[0], [7, 7], [9, 10], [1, 100_000]])
def test_lengths_of_any_range_can_be_drawn(tokens: list[int]) -> None:
    drawn = answer_figures.histogram_rows({"a": np.array(tokens, np.float64)}, "tokens", "t", log=True)
    assert figures_of(Page(drawn)) == ["t"]
    assert "nan" not in drawn.lower()

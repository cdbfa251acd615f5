"""What refining did: counts, oracles, chance, and the debate simulations of the reference under honest names."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from stitch_ray.evaluation.answers import normalise_answer
from stitch_ray.evaluation.refinement import (
    count_options,
    oracle_gated,
    oracle_union,
    random_fix_rate,
    random_reguess,
    refinement,
    same_answer,
    unchanged_rate,
)
from tests import needs

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "stitch.json").read_text())


def test_corrected_and_broken_answers_are_counted_apart() -> None:
    found = refinement([1, 1, 0, 0, 1], [1, 0, 1, 0, 1], [True, False, False, False, True])
    assert (found.corrected, found.broken, found.net) == (1, 1, 0)
    assert (found.draft_accuracy, found.refined_accuracy) == (0.6, 0.6)
    assert found.oracle_union == found.oracle_gated == 0.8
    assert found.unchanged_rate == 0.4
    assert found.fix_rate == 0.5
    assert found.break_rate == pytest.approx(1 / 3)


def test_nothing_to_fix_is_not_a_number_and_impossible_rows_are_refused() -> None:
    assert math.isnan(refinement([1], [1], [True]).fix_rate)
    assert math.isnan(refinement([], [], []).draft_accuracy)
    with pytest.raises(ValueError, match="unchanged answer"):
        refinement([1], [0], [True])
    with pytest.raises(ValueError, match="one length"):
        refinement([1], [0, 1], [False])


def test_oracles_of_graded_labels_differ() -> None:
    """A right draft that became even better counts for the union, and not where the gold left it alone."""
    draft, refined, right = [0.6, 0.1], [0.9, 0.3], [True, False]
    assert oracle_union(draft, refined) == pytest.approx(0.6)
    assert oracle_gated(draft, refined, right) == pytest.approx(0.45)


def test_answers_are_compared_after_normalisation_and_letters_as_they_are() -> None:
    assert same_answer("The  Nile.", "nile")
    assert same_answer("A", " a")
    assert not same_answer("A", "the")
    assert same_answer("anything", None)
    assert unchanged_rate(["A", "B"], ["A", "C"]) == 0.5


def test_chance_depends_on_the_number_of_options() -> None:
    assert random_reguess([5, 5, 2, 2]) == pytest.approx((0.2 + 0.2 + 0.5 + 0.5) / 4)
    assert random_fix_rate([5, 5, 2], [False, True, False]) == pytest.approx((0.25 + 1) / 2)


def test_options_are_read_from_the_question_or_from_a_closed_set_of_answers() -> None:
    listed = "Where is a bank?\nChoices:\nA. bank\nB. library\nC. mall"
    assert count_options([listed, "Why?", "A. is one and nothing else"], [["A"], ["so"], ["x"]]) == [3, None, None]
    assert count_options(["Choose (A) one (B) two", "Vitamin A. Or is it B?"], [["A"], ["B"]]) == [2, None]
    assert count_options(["q"] * 6, [["yes"], ["no"], ["yes"], ["no."], ["Yes"], ["no"]]) == [2] * 6
    assert count_options(["q"] * 3, [["one"], ["two"], ["three"]]) == [None] * 3


@pytest.mark.parametrize("name", ["noop", "perfect", "next_letter", "constant_C"])
def test_the_debate_simulations_of_the_reference_are_reproduced_by_what_they_really_measure(name: str) -> None:
    rows = json.loads(needs.real_data("stitch", "commonsense_qa_predictions.json").read_text())
    gold, drafts = [row["output"] for row in rows], [row["predict"] for row in rows]
    debaters = {
        "noop": drafts,
        "perfect": gold,
        "next_letter": ["ABCDE"[("ABCDE".index(draft) + 1) % 5] for draft in drafts],
        "constant_C": ["C"] * len(rows),
    }
    expected = GOLDEN["debate_simulation_on_fixture"][name]
    refined = debaters[name]
    right = np.array([draft == answer for draft, answer in zip(drafts, gold, strict=True)])
    right_after = np.array([text == answer for text, answer in zip(refined, gold, strict=True)])
    same = [same_answer(draft, text) for draft, text in zip(drafts, refined, strict=True)]
    found = refinement(right, right_after, same)
    assert found.num == GOLDEN["fixture"]["records"]
    assert found.draft_accuracy == pytest.approx(GOLDEN["fixture"]["accuracy"])
    assert found.oracle_union == pytest.approx(expected["accuracy_improved"])
    assert found.refined_accuracy == pytest.approx(expected["honest_ungated"])
    assert found.net == found.corrected - found.broken == round((right_after.mean() - right.mean()) * found.num)
    # The reference debates wrong drafts only, and takes what comes out as the truth.
    gated = [None if fine else text for fine, text in zip(right, refined, strict=True)]
    assert unchanged_rate(drafts, gated) == pytest.approx(expected["em_improved"])
    # Its F1 gives nothing for a letter that is an article.
    counted = [
        same_answer(draft, text) and bool(normalise_answer(draft)) for draft, text in zip(drafts, gated, strict=True)
    ]
    assert np.mean(counted) == pytest.approx(expected["f1_improved"])


def test_the_dialogues_of_the_reference_must_beat_chance_which_is_a_quarter_there() -> None:
    rows = json.loads(needs.real_data("stitch", "commonsense_qa_predictions.json").read_text())
    options = count_options([row["input"] for row in rows], [[row["output"]] for row in rows])
    assert set(options) == {5}
    right = [row["output"] == row["predict"] for row in rows]
    assert random_fix_rate(options, right) == pytest.approx(0.25)

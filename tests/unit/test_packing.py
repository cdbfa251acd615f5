"""Packing puts every example in exactly one row and leaves little of it empty."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stitch_ray.training.packing import pack, utilisation
from tests import needs


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120))
def test_every_item_is_in_one_row_and_no_row_is_too_long(lengths, capacity):
    rows = pack(lengths, capacity)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    sums = sorted(sum(lengths[item] for item in row) for row in rows)
    assert all(0 < total <= capacity for total in sums)
    # Best fit never opens a row while two open ones would fit into one.
    assert len(sums) < 2 or sums[0] + sums[1] > capacity


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 60))
def test_rows_are_those_of_the_plain_algorithm(lengths, capacity):
    """Same number of rows and same fill as the quadratic search for the fullest row that fits."""
    totals = []
    for length in sorted(lengths, reverse=True):
        fitting = [total for total in totals if total + length <= capacity]
        if fitting:
            totals.remove(max(fitting))
            totals.append(max(fitting) + length)
        else:
            totals.append(length)
    assert sorted(sum(lengths[i] for i in row) for row in pack(lengths, capacity)) == sorted(totals)


def test_the_fullest_row_that_fits_is_taken():
    assert pack([6, 5, 4, 3, 1], 10) == [[0, 2], [1, 3, 4]]
    assert pack([7, 6, 3], 10) == [[0, 2], [1]]


def test_nothing_to_pack():
    assert pack([], 10) == []


def test_an_item_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match="item 1 has 11 tokens and a row holds 10"):
        pack([10, 11], 10)


def test_utilisation_is_the_share_that_holds_tokens():
    assert utilisation([[0, 1], [2]], [6, 4, 5], 10) == 0.75


@pytest.mark.parametrize("capacity", [1024, 2048])
def test_alpaca_fills_more_than_95_percent(capacity):
    """Characters stand for tokens, scaled to the mean (251) and cut at the longest (934) of the tokens measured."""
    path = needs.real_data("instructions", "alpaca_en_1k.json")
    rows = json.loads(path.read_text(encoding="utf-8"))
    characters = np.array([sum(len(value) for value in row.values() if isinstance(value, str)) for row in rows])
    lengths = np.clip(characters * 251 / characters.mean(), 1, 934).astype(int)
    assert utilisation(pack(lengths, capacity), lengths, capacity) > 0.95

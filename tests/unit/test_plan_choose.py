"""The plan of batches, what is kept, rank agreement, and which prompts are rated together."""

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stitch_ray.data.corpus import Corpus
from stitch_ray.records import content_hash
from stitch_ray.selection.agreement import ranks, spearman
from stitch_ray.selection.bodies import BODIES_SCHEMA, body_file
from stitch_ray.selection.choose import choose_diverse, keep_count, overlap, rank_by, rank_random
from stitch_ray.selection.plan import (
    Batch,
    Item,
    corpus_items,
    plan_batches,
    plan_table,
    restore_batches,
    rows_a_batch,
)
from stitch_ray.selection.prompt_sets import prompt_sets


def items(count: int, tokens: int = 10) -> list[Item]:
    return [Item(f"{n:06d}", 0, n, (tokens,), (f"e{n}",)) for n in range(count)]


def corpus_of(folder: Path, rows: Sequence[tuple[str, tuple[int, ...]]], cuts: Sequence[int]) -> tuple[Corpus, Path]:
    """A corpus of (content id, tokens a turn) in content order, cut into files, with its bodies."""
    bodies, files = folder / "bodies", []
    bodies.mkdir(parents=True)
    edges = [0, *cuts, len(rows)]
    for number, (start, stop) in enumerate(pairwise(edges)):
        part = rows[start:stop]
        file = folder / f"{number}.parquet"
        pq.write_table(pa.table({"content_id": pa.array([name for name, _ in part], pa.string())}), file)
        turns = [
            {
                "content_id": name,
                "turns": [{"ids": list(range(n)), "truncated": False, "whole": []} for n in lengths],
            }
            for name, lengths in part
        ]
        pq.write_table(pa.Table.from_pylist(turns, schema=BODIES_SCHEMA), body_file(bodies, file))
        files.append(file)
    return Corpus(folder, tuple(files), len(rows), ()), bodies


# The plan


@given(
    lengths=st.lists(st.integers(1, 60_000), max_size=200),
    repeats=st.lists(st.integers(1, 3), min_size=200, max_size=200),
)
def test_batches_cover_every_content_once_in_order_and_stay_within_their_limits(
    lengths: list[int], repeats: list[int]
) -> None:
    found = [
        Item(f"{n:04d}", 0, n, (tokens,), tuple(f"{n}-{k}" for k in range(repeats[n])))
        for n, tokens in enumerate(lengths)
    ]
    batches = plan_batches(found)
    assert [item for batch in batches for item in batch.items] == found
    assert [batch.batch_id for batch in batches] == list(range(len(batches)))
    for batch in batches:
        assert 1 <= len(batch.items) <= 32
        assert len(batch.items) == 1 or sum(item.tokens for item in batch.items) <= 32 * 1024
    assert sum(batch.rows for batch in batches) == sum(len(item.example_ids) for item in found)


def test_a_batch_closes_at_its_limit_of_rows_or_of_tokens() -> None:
    assert [len(batch.items) for batch in plan_batches(items(70))] == [32, 32, 6]
    assert [len(batch.items) for batch in plan_batches(items(40, tokens=2048))] == [16, 16, 8]
    assert [len(batch.items) for batch in plan_batches(items(3, tokens=10**6))] == [1, 1, 1]


@pytest.mark.parametrize(
    ("contents", "rows"), [(0, 32), (64_000, 32), (64_001, 33), (1_000_000, 500), (10**7, 4096), (10**9, 4096)]
)
def test_batches_number_about_two_thousand_within_32_to_4096_rows(contents: int, rows: int) -> None:
    assert rows_a_batch(contents) == rows


@pytest.mark.parametrize("seed", range(5))
def test_the_plan_depends_on_the_contents_not_on_the_order_or_the_files_they_came_in(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    rows = [(content_hash(n // 2 if n < 40 else n), (3 + n % 7, n % 3)) for n in range(150)]  # 20 exact repeats
    rows = [(name, (len(name) + int(name[0], 16), int(name[1], 16))) for name, _ in rows]
    shuffled = sorted(dice.sample(rows, len(rows)))  # the corpus is sorted by content, whatever the input's order
    cuts = sorted(dice.sample(range(1, len(rows)), seed))
    corpus, bodies = corpus_of(tmp_path / "a", shuffled, cuts)
    whole, whole_bodies = corpus_of(tmp_path / "b", sorted(rows), [])
    ids = [f"e{n}" for n in range(len(rows))]
    found = plan_batches(corpus_items(corpus, ids, bodies))
    expected = plan_batches(corpus_items(whole, ids, whole_bodies))
    assert plan_table(found).equals(plan_table(expected))
    assert [i.example_ids for b in found for i in b.items] == [i.example_ids for b in expected for i in b.items]


def test_exact_repeats_are_one_item_even_across_two_files(tmp_path: Path) -> None:
    rows = [("a", (1,)), ("b", (2, 3)), ("b", (2, 3)), ("b", (2, 3)), ("c", (4,))]
    corpus, bodies = corpus_of(tmp_path, rows, [2])
    assert corpus_items(corpus, ["1", "2", "3", "4", "5"], bodies) == [
        Item("a", 0, 0, (1,), ("1",)),
        Item("b", 0, 1, (2, 3), ("2", "3", "4")),
        Item("c", 1, 2, (4,), ("5",)),
    ]


def test_a_plan_read_back_gives_the_same_batches(tmp_path: Path) -> None:
    planned = [Item(f"{n:04d}", n % 3, n, (5, 6) if n % 4 else (7,), (f"e{n}", f"f{n}")) for n in range(100)]
    batches = plan_batches(planned)
    pq.write_table(plan_table(batches), tmp_path / "plan.parquet")
    stored = pq.read_table(tmp_path / "plan.parquet")
    assert restore_batches(stored, planned) == batches
    assert restore_batches(stored, planned[::-1]) == batches
    assert stored.num_rows == sum(len(item.turn_tokens) for item in planned)


def test_a_plan_of_other_contents_is_refused() -> None:
    table = plan_table(plan_batches(items(50)))
    other = [Item(f"x{n:05d}", 0, n, (10,), (f"e{n}",)) for n in range(50)]
    for foreign in (items(49), items(51), other, [*items(49), other[0]], []):
        with pytest.raises(RuntimeError, match="does not belong to this corpus"):
            restore_batches(table, foreign)


def test_a_plan_with_a_content_in_two_batches_is_refused() -> None:
    a, b = items(2)
    table = plan_table([Batch(0, (a,)), Batch(1, (a,))])
    with pytest.raises(RuntimeError, match="does not belong to this corpus"):
        restore_batches(table, [a, b])


# How many are kept


@pytest.mark.parametrize(
    ("rows", "proportion", "kept"),
    [(100, 0.29, 29), (100, 0.57, 57), (10, 0.3, 3), (999, 0.2, 199), (3, 1.0, 3), (1000, 1e-3, 1), (7, 0.999, 6)],
)
def test_a_proportion_is_the_decimal_it_was_written_as_rounded_down(rows: int, proportion: float, kept: int) -> None:
    assert keep_count(rows, proportion, None) == kept


def test_every_percentage_of_a_hundred_rows_keeps_exactly_as_many() -> None:
    assert [keep_count(100, percent / 100, None) for percent in range(1, 101)] == list(range(1, 101))


def test_a_count_is_kept_as_it_is_and_refused_beyond_the_rows() -> None:
    assert keep_count(5, None, 5) == 5
    with pytest.raises(ValueError, match=r"select\.count: 6 asked for, 5 rated"):
        keep_count(5, None, 6)


def test_a_proportion_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"select.proportion: 0.2 of 4 rows keeps none"):
        keep_count(4, 0.2, None)
    with pytest.raises(ValueError, match="proportion or a count"):
        keep_count(4, None, None)


# Which are kept


def test_the_higher_score_comes_first_and_the_smaller_id_among_equals() -> None:
    scores = np.array([1.0, 2.0, 1.0, 2.0, 0.5])
    assert rank_by(scores, ["b", "z", "a", "10", "é"]).tolist() == [3, 1, 2, 0, 4]
    assert rank_by(np.array([0.0, -0.0]), ["b", "a"]).tolist() == [1, 0]
    assert rank_by(np.array([]), []).tolist() == []


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_the_ranking_does_not_depend_on_the_order_of_the_rows(values: list[float], dice: random.Random) -> None:
    names = [f"e{n}" for n in range(len(values))]
    order = dice.sample(range(len(values)), len(values))
    straight = [names[n] for n in rank_by(np.array(values), names)]
    mixed_names = [names[n] for n in order]
    mixed = [mixed_names[n] for n in rank_by(np.array([values[n] for n in order]), mixed_names)]
    assert mixed == straight


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_not_finite_is_never_ranked(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        rank_by(np.array([1.0, bad]), ["a", "b"])


def test_the_random_order_depends_on_ids_and_seed_alone() -> None:
    names = [f"e{n}" for n in range(200)]
    mixed = random.Random(0).sample(names, len(names))
    first = [names[n] for n in rank_random(names, 0)]
    assert [mixed[n] for n in rank_random(mixed, 0)] == first
    assert sorted(first) == sorted(names)
    assert first != [names[n] for n in rank_random(names, 1)]
    assert first != names


def test_the_random_order_takes_every_example_first_about_equally_often() -> None:
    firsts = [int(rank_random(["a", "b", "c", "d"], seed)[0]) for seed in range(2000)]
    assert all(abs(share - 0.25) < 0.04 for share in np.bincount(firsts, minlength=4) / 2000)


def unit(count: int, width: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def test_diverse_passes_over_what_is_too_close_and_keeps_what_is_at_the_cap() -> None:
    vectors = np.array([[1, 0], [1, 0], [0.6, 0.8], [0, 1], [-1, 0]], np.float32)

    def embed(at: Sequence[int]) -> np.ndarray:
        return vectors[list(at)]

    assert choose_diverse([0, 1, 2, 3, 4], 3, embed, 0.9) == [0, 2, 3]
    assert choose_diverse([1, 0, 2, 3, 4], 2, embed, 0.9) == [1, 2]
    assert choose_diverse([0, 1, 2, 3, 4], 5, embed, 0.5) == [0, 3, 4]
    assert choose_diverse([0, 1, 4], 3, embed, 1.0) == [0, 1, 4]


@pytest.mark.parametrize("cap", [0.3, 0.6, 0.95])
def test_diverse_equals_the_slow_greedy_choice_across_chunks_and_respects_the_cap(cap: float) -> None:
    vectors = unit(700, 6)
    order = np.random.default_rng(1).permutation(700).tolist()
    slow: list[int] = []
    for position in order:
        if all(vectors[position] @ vectors[other] <= cap for other in slow):
            slow.append(position)
    found = choose_diverse(order, 700, lambda at: vectors[list(at)], cap)
    assert found == slow
    assert choose_diverse(order, 10, lambda at: vectors[list(at)], cap) == slow[:10]


def test_diverse_returns_fewer_when_the_order_is_exhausted_and_embeds_no_more_than_it_looks_at() -> None:
    asked: list[int] = []

    def embed(at: Sequence[int]) -> np.ndarray:
        asked.extend(at)
        return unit(1, 4).repeat(len(at), 0)

    assert choose_diverse(range(1000), 5, embed, 0.9) == [0]
    assert asked == list(range(1000))
    asked.clear()
    choose_diverse(range(1000), 1, embed, 0.9)
    assert len(asked) < 1000


def test_overlap_is_the_share_of_the_first() -> None:
    assert overlap([1, 2, 3, 4], [3, 4, 5]) == 0.5
    assert overlap([1], []) == overlap([], [1]) == 0.0
    assert overlap([1, 2], [2, 1]) == 1.0


# Rank agreement


def test_equal_values_share_their_mean_rank() -> None:
    assert ranks([10, 20, 20, 5]).tolist() == [2, 3.5, 3.5, 1]
    assert ranks([7, 7, 7]).tolist() == [2, 2, 2]
    assert ranks([]).tolist() == []


def test_spearman_against_hand_values() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # 1 - 6 * (0 + 0 + 1 + 1) / (4 * 15), no ties
    assert spearman([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(0.8)
    # ranks 1, 2.5, 2.5 against 1, 2, 3: covariance 1.5, variances 1.5 and 2
    assert spearman([1, 2, 2], [1, 2, 3]) == pytest.approx(1.5 / np.sqrt(1.5 * 2))


def test_spearman_is_undefined_for_a_constant_or_for_fewer_than_two_values() -> None:
    for a, b in (([1, 1, 1], [1, 2, 3]), ([1], [2])):
        assert np.isnan(spearman(a, b))
    with pytest.raises(ValueError, match="same shape"):
        spearman([1, 2], [1, 2, 3])


@given(
    st.lists(st.tuples(st.integers(-5, 5), st.floats(-1e3, 1e3).map(lambda x: round(x, 1))), min_size=2, max_size=40)
)
def test_spearman_and_ranks_equal_scipy(pairs: list[tuple[int, float]]) -> None:
    from scipy import stats

    a, b = np.array(pairs, dtype=float).T
    np.testing.assert_array_equal(ranks(a), stats.rankdata(a))
    assume(len(set(a)) > 1 and len(set(b)) > 1)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


# Prompts rated together


def covered(run: Path, model: str, prompts: Sequence[str]) -> list[tuple[str, ...]]:
    return [entry.texts for entry in prompt_sets(run, model, prompts)]


def test_the_first_run_rates_all_prompts_as_one_set_and_the_second_uses_it(tmp_path: Path) -> None:
    first = prompt_sets(tmp_path, "m", ["a", "b", "c"])
    assert [(entry.texts, entry.numbers) for entry in first] == [(("a", "b", "c"), (0, 1, 2))]
    assert first[0].hashes == tuple(map(content_hash, "abc"))
    assert prompt_sets(tmp_path, "m", ["a", "b", "c"]) == first


def test_an_added_prompt_is_a_set_of_its_own(tmp_path: Path) -> None:
    first = prompt_sets(tmp_path, "m", ["a", "b"])
    found = prompt_sets(tmp_path, "m", ["c", "a", "b", "d"])
    assert found[0] == first[0]
    assert (found[1].texts, found[1].numbers) == (("c", "d"), (0, 3))
    assert len({entry.name for entry in found}) == 2


def test_fewer_prompts_use_the_sets_begun_before_and_only_those_they_need(tmp_path: Path) -> None:
    prompt_sets(tmp_path, "m", ["a", "b"])
    prompt_sets(tmp_path, "m", ["a", "b", "c"])
    register = (tmp_path / "work" / "prompt_sets.json").read_bytes()
    assert covered(tmp_path, "m", ["a"]) == [("a", "b")]
    assert covered(tmp_path, "m", ["c"]) == [("c",)]
    assert covered(tmp_path, "m", ["c", "b"]) == [("a", "b"), ("c",)]
    assert (tmp_path / "work" / "prompt_sets.json").read_bytes() == register


def test_the_order_of_the_prompts_begins_no_new_set(tmp_path: Path) -> None:
    first = prompt_sets(tmp_path, "m", ["a", "b", "c"])
    assert prompt_sets(tmp_path, "m", ["c", "a", "b"]) == first


def test_two_models_have_their_own_sets(tmp_path: Path) -> None:
    prompt_sets(tmp_path, "m", ["a", "b"])
    assert covered(tmp_path, "n", ["a", "b", "c"]) == [("a", "b", "c")]
    assert covered(tmp_path, "m", ["a", "b", "c"]) == [("a", "b"), ("c",)]
    assert covered(tmp_path, "n", ["a"]) == [("a", "b", "c")]


@given(st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, unique=True), min_size=1, max_size=6))
def test_sets_are_disjoint_and_cover_the_prompts_after_any_history(history: list[list[str]]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for prompts in history:
            texts = [text for of in covered(Path(folder), "m", prompts) for text in of]
            assert len(set(texts)) == len(texts)
            assert set(prompts) <= set(texts)

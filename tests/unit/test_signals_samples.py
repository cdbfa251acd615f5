"""Clusters of answers and the signals made of them, against definitions written out."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch_ray.evaluation.answers import rouge_l
from stitch_ray.reliability.signals.equivalence import ExactEquivalence
from stitch_ray.reliability.signals.samples import (
    Answered,
    Clusters,
    cluster,
    lexical_similarity,
    self_consistency,
    semantic_entropy,
    weighted_semantic_entropy,
)

pytestmark = pytest.mark.numeric

LABELS = st.lists(st.integers(0, 4), min_size=2, max_size=12)


class Table:
    """Answers mean the same where their pair is listed; counts what it is asked."""

    truncated = 0

    def __init__(self, *pairs):
        self.pairs = {frozenset(pair) for pair in pairs}
        self.asked = []
        self.calls = 0

    def relation(self, questions, answers):
        for own in answers:
            assert len(set(own)) == len(own)
            assert all(text.strip() for text in own)

        def same(pairs):
            self.calls += 1
            texts = [(questions[q], answers[q][i], answers[q][j]) for q, i, j in pairs]
            self.asked += texts
            return np.array([frozenset((a, b)) in self.pairs for _, a, b in texts], bool)

        return same


def kuhn(samples, same):
    """Kuhn et al. 2023, Algorithm 1, one answer after another; returns labels and the number of comparisons."""
    classes, labels, compared = [], [], 0
    for one in samples:
        for number, members in enumerate(classes):
            compared += 1
            if one == members[0] or same(members[0], one):
                members.append(one)
                labels.append(number)
                break
        else:
            classes.append([one])
            labels.append(len(classes) - 1)
    return labels, compared


# Clusters


@settings(deadline=None)
@given(st.data())
def test_batched_clusters_are_those_of_the_sequential_algorithm_with_as_few_comparisons(data):
    """Also for a relation that is not transitive."""
    texts = "abcdef"
    pairs = data.draw(st.lists(st.sampled_from(list(itertools.combinations(texts, 2))), max_size=8))
    questions = data.draw(st.lists(st.permutations(texts).map(lambda p: p[:5]), min_size=1, max_size=4))
    table = Table(*pairs)
    found = cluster([Answered(f"q{i}", own) for i, own in enumerate(questions)], table)
    compared = 0
    for own, clusters in zip(questions, found, strict=True):
        labels, number = kuhn(own, lambda a, b: frozenset((a, b)) in table.pairs)
        assert list(clusters.samples) == labels
        compared += number
    assert len(table.asked) == compared
    assert table.calls <= 5


def test_an_answer_joins_by_the_first_member_only():
    table = Table("ab", "bc")
    (found,) = cluster([Answered("q", ["a", "b", "c"])], table)
    assert found.samples == (0, 0, 1)


def test_questions_do_not_mix_and_share_their_rounds():
    table = Table("ab")
    found = cluster([Answered("q", ["a", "b"]), Answered("r", ["b", "a", "c"]), Answered("s", [])], table)
    assert [one.samples for one in found] == [(0, 0), (0, 0, 1), ()]
    assert table.calls == 1
    assert {question for question, _, _ in table.asked} == {"q", "r"}


def test_equal_and_blank_texts_are_never_asked_about():
    table = Table()
    (found,) = cluster([Answered("q", ["a", " a", "a\n", "", " ", "a"], ["", "a "])], table)
    assert found == Clusters(samples=(0, 0, 0, 1, 1, 0), candidates=(1, 0))
    assert table.asked == []
    (found,) = cluster([Answered("q", ["", "a", "b"], ["a"])], table)
    assert found == Clusters(samples=(0, 1, 2), candidates=(1,))
    assert len(table.asked) == 1


def test_a_candidate_joins_a_cluster_and_founds_none():
    table = Table("ax", "bx", "yz")
    (found,) = cluster([Answered("q", ["a", "b", "a"], ["x", "y", "z", "b"])], table)
    assert found == Clusters(samples=(0, 1, 0), candidates=(0, -1, -1, 1))


def test_exact_means_equal_after_normalisation_and_unicode_counts():
    samples = [
        "The Eiffel Tower.",
        "eiffel tower",
        "Eiffelturm",
        "Zürich",
        "zürich!",
        "Zurich",
        "東京",
        "東京。",
        "京都",
    ]
    (found,) = cluster([Answered("q", samples)], ExactEquivalence())
    assert found.samples == (0, 0, 1, 2, 2, 3, 4, 5, 6)  # only ASCII punctuation is no part of an answer


def test_answers_with_nothing_left_after_normalisation_are_told_apart():
    (found,) = cluster([Answered("q", ["A", "a", "the", "+", "-", "A."])], ExactEquivalence())
    assert found.samples[0] == found.samples[1]
    assert len({found.samples[i] for i in (0, 2, 3, 4)}) == 4


# Signals


def lm_polygraph_semantic_entropy(labels):
    """SemanticEntropy with frequencies: the mean over the samples of -log of their class's share."""
    shares = {one: labels.count(one) / len(labels) for one in labels}
    return -sum(math.log(shares[one]) for one in labels) / len(labels)


@settings(deadline=None)
@given(LABELS)
def test_semantic_entropy_follows_lm_polygraph(labels):
    assert semantic_entropy(labels) == pytest.approx(lm_polygraph_semantic_entropy(labels), abs=1e-12)


def test_semantic_entropy_by_hand():
    assert semantic_entropy([0, 0, 0, 0]) == 0.0
    assert math.copysign(1, semantic_entropy([0, 0])) == 1
    assert semantic_entropy([0, 1, 2, 3]) == pytest.approx(math.log(4))
    assert semantic_entropy([0, 0, 1, 2]) == pytest.approx(1.5 * math.log(2))


@settings(deadline=None)
@given(LABELS, st.floats(-50, 0))
def test_equal_likelihoods_weigh_as_frequencies(labels, value):
    assert weighted_semantic_entropy(labels, [value] * len(labels)) == pytest.approx(semantic_entropy(labels), abs=1e-9)


def test_weighted_semantic_entropy_by_hand():
    """Clusters of probability .1 + .3 and .4 among .8 in all: shares one half and one half."""
    found = weighted_semantic_entropy([0, 0, 1], [math.log(0.1), math.log(0.3), math.log(0.4)])
    assert found == pytest.approx(math.log(2))
    assert weighted_semantic_entropy([0, 1], [-2000.0, -1.0]) == 0.0


def test_one_sample_tells_nothing():
    assert math.isnan(semantic_entropy([0]))
    assert math.isnan(semantic_entropy([]))
    assert math.isnan(weighted_semantic_entropy([0], [-1.0]))
    assert math.isnan(lexical_similarity(["a"]))
    samples, candidates = self_consistency(Clusters((0,), (0, -1)))
    assert np.isnan(samples).all()
    np.testing.assert_array_equal(candidates, [1.0, 0.0])
    assert np.isnan(self_consistency(Clusters((), (-1,)))[1]).all()


def test_a_sample_does_not_agree_with_itself_and_a_candidate_is_no_sample():
    samples, candidates = self_consistency(Clusters(samples=(0, 0, 1, 0), candidates=(0, 1, -1)))
    np.testing.assert_allclose(samples, [2 / 3, 2 / 3, 0, 2 / 3])
    np.testing.assert_allclose(candidates, [3 / 4, 1 / 4, 0])


@settings(deadline=None)
@given(
    st.lists(
        st.sampled_from(["the cat sat", "a cat sat", "the dog", "Paris", "paris, France", "東京"]),
        min_size=2,
        max_size=6,
    )
)
def test_lexical_similarity_is_the_mean_rouge_l_of_all_pairs(samples):
    """LM-Polygraph's LexicalSimilarity with rougeL, not negated."""
    pairs = [rouge_l(a, b)[2] for a, b in itertools.combinations(samples, 2)]
    assert lexical_similarity(samples) == pytest.approx(sum(pairs) / len(pairs))


def test_lexical_similarity_by_hand():
    """F of "the cat sat" and "the cat ran" is 2/3, of either with "dogs" 0 (Lin 2004)."""
    assert lexical_similarity(["the cat sat", "the cat ran", "dogs"]) == pytest.approx(2 / 9)
    assert lexical_similarity(["Paris", "paris", "Paris"]) == 1.0

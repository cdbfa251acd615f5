"""Signals that compare the answers sampled for a question: do they say the same thing?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stitch_ray.reliability.signals.equivalence import Equivalence, Pair


@dataclass(frozen=True, slots=True)
class Answered:
    """A question with its sampled answers, and other answers (`candidates`) to be compared with them."""

    question: str
    samples: Sequence[str]
    candidates: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Clusters:
    """Cluster number of every sample and every candidate; -1: a candidate that means the same as no cluster."""

    samples: tuple[int, ...]
    candidates: tuple[int, ...]


def cluster(answered: Sequence[Answered], equivalence: Equivalence) -> list[Clusters]:
    """Answers that mean the same, for many questions together.

    An answer joins the earliest cluster whose first member means the same (Kuhn et al. 2023, Alg. 1), samples in their
    order and candidates after them, which found no cluster. In every round each question's first free sample founds a
    cluster and is compared with all that are free, the rounds of all questions together: the clusters are those of the
    sequential algorithm, from as many comparisons. Texts equal but for white space at their ends are compared once,
    and a blank answer means the same as a blank one only; of neither kind is the relation asked.
    """
    texts = [list(dict.fromkeys(t.strip() for t in (*one.samples, *one.candidates))) for one in answered]
    founders = [len({text.strip() for text in one.samples}) for one in answered]  # the first of `texts`
    labels = [[-1] * len(own) for own in texts]
    filled = [[i for i, text in enumerate(own) if text] for own in texts]
    place = [{i: k for k, i in enumerate(own)} for own in filled]
    related = equivalence.relation(
        [one.question for one in answered], [[texts[q][i] for i in own] for q, own in enumerate(filled)]
    )
    num_clusters = [0] * len(answered)
    growing = [q for q in range(len(answered)) if founders[q]]
    while growing:
        pairs: list[Pair] = []
        for q in growing:
            founder = labels[q].index(-1)
            labels[q][founder] = num_clusters[q]
            num_clusters[q] += 1
            if texts[q][founder]:
                pairs += [(q, founder, i) for i in filled[q] if labels[q][i] == -1]
        if pairs:
            same = related([(q, place[q][i], place[q][j]) for q, i, j in pairs])
            for (q, founder, i), joins in zip(pairs, same, strict=True):
                if joins:
                    labels[q][i] = labels[q][founder]
        growing = [q for q in growing if -1 in labels[q][: founders[q]]]
    found = []
    for one, own, numbers in zip(answered, texts, labels, strict=True):
        of = dict(zip(own, numbers, strict=True))
        found.append(Clusters(tuple(of[t.strip()] for t in one.samples), tuple(of[t.strip()] for t in one.candidates)))
    return found


def semantic_entropy(samples: Sequence[int]) -> float:
    """Entropy (nats) of the clusters' shares of the samples; NaN for fewer than two samples.

    The discrete estimate of Farquhar et al. 2024 (Methods): it needs no probabilities, and is what LM-Polygraph has as
    SemanticEntropy with class probabilities by frequency. One sample would always have entropy 0, the surest value.
    """
    if len(samples) < 2:
        return math.nan
    shares = np.array(list(Counter(samples).values())) / len(samples)
    return float(-(shares * np.log(shares)).sum()) + 0.0  # no negative zero


def weighted_semantic_entropy(samples: Sequence[int], log_probabilities: Sequence[float]) -> float:
    """Semantic entropy with the samples weighted by what the model thinks of them; no signal by default.

    A cluster's probability is the sum over its samples, normalised over all clusters (Farquhar et al. 2024, Methods).
    `log_probabilities`: of the samples (nats); the paper takes the mean over tokens. NaN for fewer than two samples.
    """
    if len(samples) < 2:
        return math.nan
    weights = np.asarray(log_probabilities, np.float64)
    weights = np.exp(weights - weights.max())
    totals = np.bincount(np.asarray(samples), weights=weights) / weights.sum()
    totals = totals[totals > 0]
    return float(-(totals * np.log(totals)).sum()) + 0.0


def self_consistency(clusters: Clusters) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of the samples that mean the same, for every sample and every candidate.

    A sample is compared with the others: NaN if it is alone. A candidate is no sample and is compared with all of
    them: NaN if there is none.
    """
    sizes, num = Counter(clusters.samples), len(clusters.samples)
    own = [(sizes[one] - 1) / (num - 1) if num > 1 else math.nan for one in clusters.samples]
    others = [sizes[one] / num if num else math.nan for one in clusters.candidates]
    return np.array(own, np.float64), np.array(others, np.float64)


def lexical_similarity(samples: Sequence[str]) -> float:
    """Mean ROUGE-L F over all pairs of samples (Fomicheva et al. 2020, Eq. 10); NaN for fewer than two samples."""
    from stitch_ray.evaluation.answers import rouge_l

    if len(samples) < 2:
        return math.nan
    counts = list(Counter(samples).items())
    total = 0.0
    for i, (first, times) in enumerate(counts):
        if times > 1:
            total += times * (times - 1) / 2 * rouge_l(first, first)[2]
        total += sum(times * others * rouge_l(first, second)[2] for second, others in counts[i + 1 :])
    return total / (len(samples) * (len(samples) - 1) / 2)

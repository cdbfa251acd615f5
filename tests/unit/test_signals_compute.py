"""All signals of a batch: from stored statistics or one forward, whatever else is in the batch."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from stitch_ray.config.reliability import SIGNAL_NAMES
from stitch_ray.engines.base import Request, Sampling
from stitch_ray.engines.hf import HfEngine
from stitch_ray.records import Turn
from stitch_ray.reliability.signals.compute import SignalItem, compute_signals, needs_engine, unsupported
from stitch_ray.reliability.signals.equivalence import ExactEquivalence
from stitch_ray.reliability.signals.registry import FROM_SAMPLES, FROM_TOKENS

pytestmark = pytest.mark.numeric

QUESTIONS = ["What colour is the sky?", "Name the sum of two and two.", "What is a cat?"]
TOKENS = sorted(FROM_TOKENS)


@pytest.fixture(scope="module")
def engine(tiny_model):
    before = torch.get_num_threads()
    made = HfEngine(str(tiny_model), dtype="float32", device="cpu", num_threads=1)
    yield made
    made.close()
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def items(engine):
    """A greedy answer, three samples and a distractor that nobody generated, for every question."""
    found = []
    for number, question in enumerate(QUESTIONS):
        turns = (Turn("user", question),)
        sampling = Sampling(max_tokens=8, temperature=1.0, num_samples=3, seed=number, token_stats=True)
        greedy, samples = engine.generate(
            [
                Request(request_id="g", prompt=turns, sampling=Sampling(max_tokens=8, token_stats=True)),
                Request(request_id="s", prompt=turns, sampling=sampling),
            ]
        )
        for kind, drawn in (("greedy", greedy), ("sample", samples)):
            found += [
                SignalItem(
                    answer_id=f"{number}/{kind}-{i}", question_id=str(number), turns=turns, answer=one.text, kind=kind,
                    token_ids=one.token_ids, logprobs=one.logprobs, entropies=one.entropies, margins=one.margins,
                )
                for i, one in enumerate(drawn)
            ]  # fmt: skip
        found.append(
            SignalItem(answer_id=f"{number}/d", question_id=str(number), turns=turns, answer="blue", kind="distractor")
        )
    return found


class Watched:
    """The engine, counting requests by method."""

    def __init__(self, engine, methods=None):
        self.engine = engine
        self.info = dataclasses.replace(engine.info, methods=frozenset(methods or engine.info.methods))
        self.asked = Counter()

    def __getattr__(self, method):
        def call(requests):
            self.asked[method] += len(requests)
            return getattr(self.engine, method)(requests)

        return call


def close(found, wanted):
    assert list(found) == list(wanted)
    for name in wanted:
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-4, rtol=1e-4, err_msg=name)


def test_every_signal_of_every_answer_that_has_one(engine, items):
    found = compute_signals(SIGNAL_NAMES, items, engine=engine, equivalence=ExactEquivalence())
    assert list(found) == list(SIGNAL_NAMES)
    for values in found.values():
        assert values.shape == (len(items),)
        assert values.dtype == np.float64
    blank = np.array([not item.answer.strip() for item in items])
    np.testing.assert_array_equal(np.isnan(found["p_true"]), blank)
    assert not blank.all()
    assert (found["p_true"][~blank] > 0).all()
    assert (found["p_true"][~blank] < 1).all()
    for name in {*SIGNAL_NAMES} - {"p_true", "verbalized_confidence"}:  # a model of this size writes no numbers
        assert (np.isfinite(found[name]) | blank).all(), name
    for number in range(len(QUESTIONS)):
        own = [i for i, item in enumerate(items) if item.question_id == str(number)]
        assert len(set(found["semantic_entropy"][own])) == len(set(found["lexical_similarity"][own])) == 1


def test_stored_statistics_are_used_and_the_rest_is_one_forward_an_answer(engine, items):
    watched = Watched(engine)
    found = compute_signals(TOKENS, items, engine=watched)
    assert watched.asked == {"token_statistics": len(QUESTIONS)}
    bare = [dataclasses.replace(item, logprobs=None, entropies=None, margins=None) for item in items]
    watched = Watched(engine)
    close(compute_signals(TOKENS, bare, engine=watched), found)
    distinct = {(item.turns, item.token_ids or item.answer) for item in items}
    assert watched.asked == {"token_statistics": len(distinct)}


def test_a_signal_does_not_depend_on_its_batch_or_on_other_signals(engine, items):
    together = compute_signals(SIGNAL_NAMES, items, engine=engine, equivalence=ExactEquivalence())
    mine = [i for i, item in enumerate(items) if item.question_id == "1"]
    alone = compute_signals(SIGNAL_NAMES, [items[i] for i in mine], engine=engine, equivalence=ExactEquivalence())
    close(alone, {name: values[mine] for name, values in together.items()})
    for name in SIGNAL_NAMES:
        close(compute_signals([name], items, engine=engine, equivalence=ExactEquivalence()), {name: together[name]})


def test_only_samples_are_compared_with(items):
    texts = ["Paris", "paris", "Rome"]
    turns = items[0].turns
    own = [
        SignalItem(answer_id=str(i), question_id="q", turns=turns, answer=text, kind="sample")
        for i, text in enumerate(texts)
    ]
    others = [
        dataclasses.replace(own[0], answer_id=kind, kind=kind, answer=text)
        for kind, text in (("greedy", "Paris!"), ("distractor", "Rome"), ("answer", "Berlin"))
    ]
    lonely = dataclasses.replace(own[0], answer_id="x", question_id="r", kind="greedy")
    names = sorted(FROM_SAMPLES)
    found = compute_signals(names, [others[0], *own, *others[1:], lonely], equivalence=ExactEquivalence())
    nan = np.nan
    np.testing.assert_allclose(found["self_consistency"], [2 / 3, 1 / 2, 1 / 2, 0, 1 / 3, 0, nan])
    entropy = -(2 / 3 * np.log(2 / 3) + 1 / 3 * np.log(1 / 3))
    np.testing.assert_allclose(found["semantic_entropy"], [entropy] * 6 + [nan])
    np.testing.assert_allclose(found["lexical_similarity"], [1 / 3] * 6 + [nan])


def test_an_empty_answer_is_unscored_by_all_that_read_it(engine, items):
    empty = dataclasses.replace(items[-1], answer="", token_ids=(), logprobs=(), entropies=(), margins=())
    unknown = dataclasses.replace(items[-1], answer="")
    names = [*TOKENS, "p_true", "verbalized_confidence", "answer_length"]
    watched = Watched(engine)
    found = compute_signals(names, [empty, unknown], engine=watched)
    assert not +watched.asked
    for name in names[:-1]:
        assert np.isnan(found[name]).all(), name
    assert found["answer_length"].tolist() == [0, 0]


def test_without_an_engine_unknown_statistics_are_unscored_and_counted(engine, items):
    problems = Counter()
    found = compute_signals([*TOKENS, "answer_length"], items, problems=problems)
    generated = np.array([item.kind != "distractor" for item in items])
    told = np.array([bool(item.token_ids) for item in items])  # an answer that ended at once has no token
    for name in TOKENS:
        np.testing.assert_array_equal(np.isfinite(found[name]), told)
    assert sum(problems.values()) == len(QUESTIONS)
    assert (found["answer_length"][~generated] == 1).all()
    problems.clear()
    compute_signals(["perplexity"], items, engine=Watched(engine, {"generate"}), problems=problems)
    assert sum(problems.values()) == len(QUESTIONS)


def test_an_answer_beyond_the_context_is_unscored_and_leaves_the_others(engine, items):
    long = dataclasses.replace(items[-1], answer="blue " * 2 * engine.info.max_context)
    problems = Counter()
    found = compute_signals(["perplexity", "p_true"], [items[-1], long], engine=engine, problems=problems)
    assert np.isfinite(found["perplexity"]).tolist() == [True, False]
    assert np.isfinite(found["p_true"]).tolist() == [True, False]
    assert sum(problems.values()) == 2
    assert any("exceed the context" in reason for reason in problems)


def test_whether_an_engine_is_needed_is_known_beforehand(items):
    generated = [item for item in items if item.kind != "distractor"]
    assert not needs_engine([*TOKENS, *sorted(FROM_SAMPLES), "answer_length"], generated)
    assert needs_engine(["perplexity"], items)
    assert needs_engine(["answer_length"], items)
    assert not needs_engine(["semantic_entropy"], items)
    assert needs_engine(["p_true"], generated)


def test_unsupported_signals_are_known_before_a_job_starts():
    assert unsupported(SIGNAL_NAMES, "transformers") == []
    assert unsupported(SIGNAL_NAMES, "vllm") == ["mean_token_entropy", "max_token_entropy"]
    assert unsupported(SIGNAL_NAMES, "endpoint") == ["mean_token_entropy", "max_token_entropy", "p_true"]
    assert unsupported(["perplexity"], "endpoint") == []


def test_no_answers_have_no_signals(engine):
    found = compute_signals(SIGNAL_NAMES, [], engine=engine, equivalence=ExactEquivalence())
    assert all(values.shape == (0,) for values in found.values())

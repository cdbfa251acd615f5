"""The forced pass: what a model says about tokens that are already there."""

import numpy as np
import pytest
import torch

from stitch_ray.engines import hf_statistics
from stitch_ray.engines.base import EngineError, Request, Sampling
from stitch_ray.engines.hf import HfEngine
from stitch_ray.records import Turn

pytestmark = pytest.mark.numeric

PROMPTS = [(Turn("user", "What is the sum of two and two?"),), "Name a colour:", "The", (5, 6, 7, 8, 9, 10, 11)]


@pytest.fixture(scope="module")
def engine(tiny_model):
    before = torch.get_num_threads()
    made = HfEngine(str(tiny_model), dtype="float32", device="cpu", num_threads=1, batch_tokens=64)
    yield made
    made.close()
    torch.set_num_threads(before)


def drawn(engine, **sampling):
    """(prompt, generation) with statistics, answers that ended at once left out."""
    settings = Sampling(token_stats=True, max_tokens=12, **sampling)
    requests = [Request(request_id=str(i), prompt=p, sampling=settings) for i, p in enumerate(PROMPTS)]
    found = engine.generate(requests)
    return [(p, one) for p, some in zip(PROMPTS, found, strict=True) for one in some if one.token_ids]


def forced(engine, pairs):
    return engine.token_statistics(
        [Request(request_id=str(i), prompt=p, continuation=c) for i, (p, c) in enumerate(pairs)]
    )


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.4, "top_p": 0.8, "num_samples": 3, "seed": 5}], ids=["greedy", "sampled"]
)
def test_a_forced_pass_tells_what_generating_recorded(engine, sampling):
    answers = drawn(engine, **sampling)
    for (_, one), found in zip(answers, forced(engine, [(p, one.token_ids) for p, one in answers]), strict=True):
        np.testing.assert_allclose(found.logprobs, one.logprobs, atol=1e-5)
        np.testing.assert_allclose(found.entropies, one.entropies, atol=1e-5)
        np.testing.assert_allclose(found.margins, one.margins, atol=1e-5)


def test_the_values_are_those_of_one_unbatched_forward_in_float64(engine):
    pairs = [((5, 6, 7), (8, 9, 10, 11)), ((5,), (12,)), ((20, 21, 22, 23, 24, 25), (5, 5))]
    for (prompt, continuation), found in zip(pairs, forced(engine, pairs), strict=True):
        with torch.inference_mode():
            logits = engine._model(input_ids=torch.tensor([prompt + continuation])).logits[0].double()
        p = logits.softmax(-1)[len(prompt) - 1 : -1].numpy()
        ordered = np.sort(p, axis=-1)
        np.testing.assert_allclose(found.logprobs, np.log(p[range(len(continuation)), continuation]), atol=1e-5)
        np.testing.assert_allclose(found.entropies, -(p * np.log(p)).sum(-1), atol=1e-5)
        np.testing.assert_allclose(found.margins, ordered[:, -1] - ordered[:, -2], atol=1e-5)


def test_statistics_sum_to_the_loglikelihood_and_do_not_depend_on_the_batch(engine, monkeypatch):
    pairs = [(p, c) for p in PROMPTS[:3] for c in (" blue", " the sky is blue and the sun is red")]
    together = forced(engine, pairs)
    sums = engine.loglikelihood([Request(request_id="", prompt=p, continuation=c) for p, c in pairs])
    monkeypatch.setattr(hf_statistics, "_LOG_SOFTMAX_ROWS", 3)
    for pair, found, (total, _) in zip(pairs, together, sums, strict=True):
        assert sum(found.logprobs) == pytest.approx(total, abs=1e-4)
        (alone,) = forced(engine, [pair])
        np.testing.assert_allclose(alone.logprobs, found.logprobs, atol=1e-5)
        np.testing.assert_allclose(alone.entropies, found.entropies, atol=1e-5)


def test_continuations_that_differ_in_the_last_token_share_a_forward(engine):
    rows = []
    hook = engine._model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: rows.append(len(args[0])))
    try:
        requests = [
            Request(request_id="", prompt=(5, 6, 7), continuation=c) for c in ((8,), (9,), (8, 9), (8, 7), (8,))
        ]
        together = engine.loglikelihood(requests)
        assert sum(rows) == 2
        alone = [engine.loglikelihood([one])[0] for one in requests]
    finally:
        hook.remove()
    np.testing.assert_allclose([t for t, _ in together], [t for t, _ in alone], atol=1e-5)
    assert [greedy for _, greedy in together] == [greedy for _, greedy in alone]


def test_an_answer_without_tokens_or_beyond_the_context_is_an_error_in_its_slot(engine):
    long = (5,) * engine.info.max_context
    found = forced(engine, [((5,), (6,)), ((5,), ()), ((5,), long), ((5, 6), (7, 8))])
    assert [isinstance(one, EngineError) for one in found] == [False, True, True, False]
    assert "exceed the context" in found[2].reason
    assert "token_statistics" in engine.info.methods

"""Comparing what is computed twice: by other kernels, in other batches, from weights that lie elsewhere in memory.

The two results differ by rounding, and by how much depends on the processor.
"""

from __future__ import annotations

import math

import pytest
import torch

from stitch_ray.engines.base import Generation

_EPS = torch.finfo(torch.float32).eps
_TERMS = 2000
"""Products summed one after another between a token and its logits: all layers of the tiny models here have fewer."""


def assert_close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """In another order a sum of n float32 changes by at most n * eps times their size; other weights change it more."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=_TERMS * _EPS * wanted.abs().max().item())


def assert_same_greedy(found: Generation, wanted: Generation, bound: float = 1e-4) -> None:
    """The same tokens, with log-probabilities that differ by `bound` at most, up to a toss-up.

    At a toss-up the likeliest two tokens are no further apart than that moves them, and behind it each answer has read
    another token. Both answers greedy and with `token_stats`. `bound`: worst for logits of 1 is 2.4e-4, seen are 1e-6.
    """
    assert found.prompt_tokens == wanted.prompt_tokens
    shorter, longer = sorted((found, wanted), key=lambda one: len(one.token_ids))
    for place, token in enumerate(longer.token_ids):
        # The token that ends an answer is not among its tokens.
        if place == len(shorter.token_ids) or token != shorter.token_ids[place]:
            assert _lead(longer, place) <= 2 * bound, f"another token at {place}, and no toss-up"
            return
        assert longer.logprobs[place] == pytest.approx(shorter.logprobs[place], abs=bound)  # type: ignore[index]
    assert (found.text, found.finish_reason) == (wanted.text, wanted.finish_reason)


def _lead(answer: Generation, place: int) -> float:
    """By how much the log-probability of the token there is above that of the second likeliest."""
    assert answer.logprobs is not None
    assert answer.margins is not None
    probability = math.exp(answer.logprobs[place])
    second = probability - answer.margins[place]
    return math.log(probability / second) if second > 0 else math.inf

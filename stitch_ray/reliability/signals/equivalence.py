"""When two answers to a question mean the same: by their words, by embeddings, or by entailment both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stitch_ray.config.sample_answers import SignalsConfig
from stitch_ray.errors import UserError

Pair = tuple[int, int, int]
"""(question, first, second): two answers to one question by position."""

Relation = Callable[[Sequence[Pair]], NDArray[np.bool_]]
"""Whether both of every pair mean the same, (pairs,)."""


class Equivalence(Protocol):
    """Symmetric, and not necessarily transitive. `truncated` counts the texts that did not fit its model whole."""

    truncated: int

    def relation(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> Relation:
        """The relation among `answers[q]`, for every question q. No answer is blank; those of a question differ."""
        ...


class ExactEquivalence:
    """The same words, without regard to case, ASCII punctuation and articles."""

    truncated = 0

    def relation(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> Relation:
        keys = [[_key(text) for text in own] for own in answers]
        return lambda pairs: np.array([keys[q][i] == keys[q][j] for q, i, j in pairs], np.bool_)


def load_equivalence(
    config: SignalsConfig, *, batch_tokens: int | None = None, device: str | None = None
) -> Equivalence:
    """The relation that a configuration asks for, its model loaded. Raises UserError if that cannot be used.

    `batch_tokens`: tokens of one forward of an NLI model. Torch's threads are left as they are.
    """
    if config.similarity == "exact":
        return ExactEquivalence()
    assert config.encoder is not None
    if config.similarity == "embedding":
        from stitch_ray.reliability.signals.embedding import EmbeddingEquivalence

        return EmbeddingEquivalence(config.encoder, min_cosine=config.min_cosine, device=device)
    from stitch_ray.reliability.signals.entailment import EntailmentEquivalence

    return EntailmentEquivalence(config.encoder, batch_tokens=batch_tokens, device=device)


def cannot_load(encoder: str, reason: str) -> UserError:
    return UserError(f"signals.encoder: {encoder}: {reason}")


def _key(text: str) -> str:
    """An answer such as "A" or "+" has nothing left when normalised, and would mean the same as any other such one."""
    from stitch_ray.evaluation.answers import normalise_answer

    return normalise_answer(text) or text.strip().casefold()

"""The signals by name: which way each points, and what it takes to compute it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from stitch_ray.config.reliability import SignalName

SIGN: Mapping[SignalName, Literal[1, -1]] = {
    "sequence_log_probability": 1,
    "perplexity": -1,
    "mean_token_entropy": -1,
    "max_token_entropy": -1,
    "mean_token_margin": 1,
    "p_true": 1,
    "self_consistency": 1,
    "lexical_similarity": 1,
    "semantic_entropy": -1,
    "verbalized_confidence": 1,
    "answer_length": -1,
}
"""Signal -> 1 where more means surer, -1 where more means less sure: their product is a confidence."""

FROM_TOKENS: frozenset[SignalName] = frozenset(
    {"sequence_log_probability", "perplexity", "mean_token_entropy", "max_token_entropy", "mean_token_margin"}
)
"""Signals of the token statistics of the answer itself: one forward over question and answer, or none at all where
they were kept while the answer was generated."""

FROM_SAMPLES: frozenset[SignalName] = frozenset({"self_consistency", "lexical_similarity", "semantic_entropy"})
"""Signals that compare the answers sampled for one question: extra generations when used online."""

FROM_PROMPTS: frozenset[SignalName] = frozenset({"p_true", "verbalized_confidence"})
"""Signals that ask the model about its answer: one further call each."""

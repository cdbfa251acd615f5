"""How answers were drawn and compared: settings that a confidence depends on beside model, prompt and scorer.

Half as many samples, or longer answers, give the same signals another distribution, and a scorer that learned from one
says nothing true of the other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from stitch_ray.reliability.signals.registry import FROM_SAMPLES

_OF_ANSWERS = ("max_tokens", "stop")
_OF_SAMPLES = ("samples", "temperature", "top_p")
_OF_CLUSTERS = ("similarity", "encoder", "min_cosine")
_CLUSTERED = frozenset({"self_consistency", "semantic_entropy"})


def answering(
    *,
    max_tokens: int,
    stop: Sequence[str],
    samples: int,
    temperature: float,
    top_p: float,
    similarity: str,
    encoder: str | None,
    min_cosine: float,
) -> dict[str, Any]:
    """The settings as JSON. `encoder` is the fingerprint of the model that compares answers."""
    return {
        "max_tokens": max_tokens,
        "stop": list(stop),
        "samples": samples,
        "temperature": temperature,
        "top_p": top_p,
        "similarity": similarity,
        "encoder": encoder,
        "min_cosine": min_cosine if similarity == "embedding" else None,
    }


def common(found: Sequence[Mapping[str, Any] | None]) -> dict[str, Any] | None:
    """What several lots of answers have in common; None where one of them does not tell."""
    known = [one for one in found if one is not None]
    if not known or len(known) < len(found):
        return None
    return {key: value for key, value in known[0].items() if all(one.get(key) == value for one in known)}


def differences(
    was: Mapping[str, Any] | None, now: Mapping[str, Any] | None, signals: Collection[str]
) -> dict[str, tuple[Any, Any]]:
    """Setting -> (was, now) for those that differ and matter to a scorer that needs `signals`; what is not told, does not."""
    keys = [*_OF_ANSWERS]
    if FROM_SAMPLES & set(signals):
        keys += _OF_SAMPLES
    if _CLUSTERED & set(signals):
        keys += _OF_CLUSTERS
    if was is None or now is None:
        return {}
    return {key: (was[key], now[key]) for key in keys if key in was and key in now and was[key] != now[key]}

"""Settings that a confidence depends on: what several lots share, and which differences matter to which scorer."""

from typing import Any

import pytest

from stitch_ray.reliability.answering import answering, common, differences

SETTINGS: dict[str, Any] = {
    "max_tokens": 8,
    "stop": ["\n"],
    "samples": 5,
    "temperature": 1.0,
    "top_p": 1.0,
    "similarity": "exact",
    "encoder": None,
    "min_cosine": 0.85,
}


@pytest.mark.parametrize(
    ("change", "signals", "found"),
    [
        ({"max_tokens": 4}, [], {"max_tokens": (8, 4)}),
        ({"stop": []}, ["perplexity"], {"stop": (["\n"], [])}),
        ({"samples": 4}, ["perplexity"], {}),
        ({"samples": 4}, ["lexical_similarity"], {"samples": (5, 4)}),
        ({"temperature": 0.7, "top_p": 0.9}, ["semantic_entropy"], {"temperature": (1.0, 0.7), "top_p": (1.0, 0.9)}),
        ({"similarity": "nli", "encoder": "e"}, ["lexical_similarity"], {}),
        (
            {"similarity": "nli", "encoder": "e"},
            ["self_consistency"],
            {"similarity": ("exact", "nli"), "encoder": (None, "e")},
        ),
        ({"min_cosine": 0.5}, ["self_consistency"], {}),
    ],
)
def test_only_what_a_signal_depends_on_counts(
    change: dict[str, Any], signals: list[str], found: dict[str, tuple[Any, Any]]
) -> None:
    assert differences(answering(**SETTINGS), answering(**{**SETTINGS, **change}), signals) == found


def test_what_is_not_told_does_not_differ() -> None:
    now = answering(**SETTINGS)
    assert differences(None, now, []) == {}
    assert differences(now, None, []) == {}
    assert differences({"stop": []}, now, []) == {"stop": ([], ["\n"])}


def test_several_lots_tell_what_they_share() -> None:
    one, warmer = answering(**SETTINGS), answering(**{**SETTINGS, "temperature": 2.0})
    shared = common([one, warmer])
    assert shared is not None
    assert "temperature" not in shared
    assert shared["samples"] == 5
    assert common([one, None]) is None
    assert common([]) is None

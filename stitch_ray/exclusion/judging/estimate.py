"""What `exar judge` would ask: `--dry-run`."""

from __future__ import annotations

from stitch_ray.exclusion.judging.preflight import Ready


def describe(ready: Ready) -> str:
    """One fact a line."""
    people = sum(one.answer.human is not None for one in ready.answers)
    return "\n".join(
        [
            f"read   {ready.rows} answers, {ready.seen} of them to questions that the model has learned from, which are left out",
            f"judge  {len(ready.answers)} distinct answers with {ready.config.model.name}",
            f"compare with the rule's labels, and with {people} judgements of people",
        ]
    )

"""What `exar evaluate` would compare: `--dry-run`."""

from __future__ import annotations

from stitch_ray.exclusion.evaluating.pipeline import ways
from stitch_ray.exclusion.evaluating.preflight import Ready


def describe(ready: Ready) -> str:
    """One fact a line."""
    lines = [f"read   {ready.refined.questions.num_rows} questions from {ready.refined.folder}"]
    lines += [f"compare {way.name}" for way in ways(ready)]
    return "\n".join([*lines, *(f"note   {note}" for note in ready.notes)])

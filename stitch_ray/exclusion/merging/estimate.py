"""What `exar merge` would make: `--dry-run`."""

from __future__ import annotations

from stitch_ray.exclusion.merging.pipeline import make
from stitch_ray.exclusion.merging.preflight import Ready


def describe(ready: Ready) -> str:
    """One fact a line; counts are exact."""
    made = make(ready)
    lines = [
        f"read   {len(ready.answers)} answers from {len(ready.config.answers)} run(s) of exar label",
        *(f"drop   {count} {reason}" for reason, count in made.dropped.items()),
    ]
    lines += [f"make   {name}: {count}" for name, count in made.counts().items()]
    return "\n".join(lines)

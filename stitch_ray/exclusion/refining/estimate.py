"""What an `exar refine` run would ask: `--dry-run`."""

from __future__ import annotations

from stitch_ray.data.corpus import read_source
from stitch_ray.data.splits import split_of
from stitch_ray.exclusion.refining.preflight import Ready


def describe(ready: Ready) -> str:
    """One fact a line; rows are read, nothing is asked."""
    config = ready.config
    rows = unusable = 0
    groups: set[str] = set()
    left = config.data.limit
    for source in ready.sources:
        for good, bad in read_source(source, config.data, left):
            rows += len(good) + len(bad)
            left = None if left is None else left - len(good) - len(bad)
            unusable += len(bad)
            groups.update(example.group_id for example in good)
    split = config.split
    asked = {one for one in groups if config.questions in ("all", split_of(one, 0.0, split.test, split.salt))}
    most = config.attempts.max_attempts
    seen = len(asked & ready.learned_from())
    lines = [
        f"read   {rows:,} rows from {len(ready.sources)} source(s), {unusable:,} unusable",
        f"ask    {len(asked):,} {config.questions} questions of {len(groups):,}, {seen:,} of which were trained on",
        f"calls  at most {most} answers and {most} verdicts a question, {2 * most * len(asked):,} together",
        f"judge  {config.validator.kind}, accepts from {config.validator.threshold:g} on",
    ]
    return "\n".join(lines)

"""What a `calibrate` run would read, score and promise: `--dry-run`."""

from __future__ import annotations

from stitch_ray.reliability.calibration import minimal_accepted
from stitch_ray.reliability.risk.preflight import Ready, Update
from stitch_ray.reliability.risk.questions import SPLITS, Material
from stitch_ray.reliability.risk.single import Chosen


def describe(ready: Ready) -> str:
    """One fact a line; counts are exact."""
    config, given = ready.config, ready.given
    if isinstance(given, Update):
        labels = given.labels
        lines = [
            f"read   {labels.rows_in} labels from {len(ready.sources)} source(s), {len(labels.quarantined)} unusable"
        ]
        return "\n".join([*lines, f"update policy {given.policy.version} with {len(given.policy.targets)} promise(s)"])
    counts = _counts(given)
    rows_in = given.answers.rows_in if isinstance(given, Chosen) else given.rows_in
    bad = given.answers.quarantined if isinstance(given, Chosen) else given.quarantined
    lines = [f"read   {rows_in} rows from {len(ready.sources)} source(s), {len(bad)} unusable"]
    lines += [f"drop   {count} {reason}" for reason, count in given.dropped.items()]
    lines += [f"split  {name}: {counts[name]} questions" for name in SPLITS]
    if config.scorer:
        lines.append(f"score  {sum(counts.values())} answers with {config.scorer}")
    for target in config.targets:
        whose = f" for task {target.task}" if target.task else ""
        needed = minimal_accepted(target.risk, target.delta)
        lines.append(
            f"target at most {target.risk:.0%} wrong with probability {1 - target.delta:.0%}{whose}: needs at least "
            f"{needed} of {counts['calibrate']} calibration answers without an error"
        )
    return "\n".join(lines)


def _counts(given: Chosen | Material) -> dict[str, int]:
    if isinstance(given, Chosen):
        return {name: int(given.of_split(name).sum()) for name in SPLITS}
    return {"isotonic": len(given.isotonic), "calibrate": len(given.calibrate), "test": len(given.test)}

"""What `exar run` would do: `--dry-run`."""

from __future__ import annotations

from pathlib import Path

from stitch_ray.data.corpus import read_source
from stitch_ray.exclusion.chain.preflight import Ready
from stitch_ray.exclusion.chain.sides import side_of
from stitch_ray.exclusion.chain.stages import SIDES, Stages


def describe(ready: Ready) -> str:
    """One fact a line; the questions of each side are counted."""
    config = ready.config
    counts = dict.fromkeys(SIDES, 0)
    left = config.data.limit
    for source in ready.sources:
        for good, bad in read_source(source, config.data, left):
            left = None if left is None else left - len(good) - len(bad)
            for example in good:
                counts[side_of(example.group_id, config.split)] += 1
    stages = Stages(config, Path("RUN"))
    zero = "none: the model answers as it is" if config.stage_zero is None else f"fine-tuning on {counts['zero']} rows"
    asked = counts["plus"] + (counts["zero"] if config.predictions.questions == "all" else 0)
    lines = [
        f"split    {', '.join(f'{name} {count}' for name, count in counts.items())} rows",
        f"zero     {zero}",
        f"predict  {asked} rows at {len(config.predictions.temperatures)} temperatures, labelled by rule",
        f"validate fine-tuning ({stages.validator().method}) on DATASET+",
        f"exar     fine-tuning ({stages.exar().method}) on DATASET+",
        f"refine   {counts['test']} rows, at most {config.attempts.max_attempts} attempts each; again with "
        f"{', '.join(config.controls) or 'no controls'}; {config.samples} independent answers each",
    ]
    return "\n".join(lines)

"""The data of a chain, cut in three by the hash of the question: no stage sees what it must not see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from stitch_ray.config.base import DataConfig
from stitch_ray.config.exar import ExarChainSplitConfig
from stitch_ray.data.corpus import read_source
from stitch_ray.data.quarantine import Quarantined
from stitch_ray.data.splits import split_among
from stitch_ray.errors import UserError
from stitch_ray.exclusion.chain.stages import SIDES
from stitch_ray.runs import write_text


def side_of(group_id: str, split: ExarChainSplitConfig) -> str:
    """zero, plus or test; test takes the lower end of the axis, as everywhere."""
    shares: Mapping[str, float] = {"test": split.test, "plus": split.plus, "zero": 1 - split.test - split.plus}
    return split_among(group_id, shares, split.salt)


def write_sides(
    sources: Sequence[str], data: DataConfig, split: ExarChainSplitConfig, files: Mapping[str, Path]
) -> tuple[Counter[str], list[Quarantined]]:
    """Write the usable records of `sources`, as they are, to the file of their side; count them by side.

    Raises UserError if a side has none.
    """
    records: dict[str, list[str]] = {name: [] for name in SIDES}
    bad: list[Quarantined] = []
    left = data.limit
    for source in sources:
        for good, rejected in read_source(source, data, left):
            left = None if left is None else left - len(good) - len(rejected)
            bad += rejected
            for example in good:
                records[side_of(example.group_id, split)].append(example.raw)
    for name, raw in records.items():
        if not raw:
            first = f"; the first unusable row: {bad[0].source}:{bad[0].line}: {bad[0].reason}" if bad else ""
            raise UserError(f"split: no question for {name} among {sum(map(len, records.values()))} rows{first}")
        write_text(files[name], "".join(f"{line}\n" for line in sorted(raw)))
    return Counter({name: len(raw) for name, raw in records.items()}), bad

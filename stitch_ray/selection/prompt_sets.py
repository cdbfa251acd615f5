"""Which rating prompts are rated together, remembered in the run folder.

A model rates all its prompts at once. When prompts are added later, only the new ones are rated, as a set of their own;
when some are left out, the sets rated before are used as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stitch_ray.records import content_hash
from stitch_ray.runs import write_json


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts rated in one go. `numbers` are their places in the list of prompts at that time."""

    texts: tuple[str, ...]
    numbers: tuple[int, ...]

    @property
    def hashes(self) -> tuple[str, ...]:
        return tuple(content_hash(text) for text in self.texts)

    @property
    def name(self) -> str:
        return content_hash(self.hashes)[:8]


def prompt_sets(run: Path, model: str, prompts: Sequence[str]) -> list[PromptSet]:
    """Disjoint sets that cover `prompts`: those of `model` begun before, then one of what is in none of them."""
    register = run / "work" / "prompt_sets.json"
    known = json.loads(register.read_text("utf-8")) if register.exists() else {}
    begun = [PromptSet(tuple(entry["texts"]), tuple(entry["numbers"])) for entry in known.get(model, [])]
    used = [entry for entry in begun if set(entry.texts) & set(prompts)]
    covered = {text for entry in begun for text in entry.texts}
    missing = [number for number, text in enumerate(prompts) if text not in covered]
    if missing:
        new = PromptSet(tuple(prompts[number] for number in missing), tuple(missing))
        entries = [{"texts": entry.texts, "numbers": entry.numbers} for entry in (*begun, new)]
        write_json(register, {**known, model: entries})
        used.append(new)
    return used

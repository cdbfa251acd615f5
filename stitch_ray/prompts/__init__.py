"""Prompt texts as files and the one loader for them. No prompt text lives in code."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from stitch_ray.errors import UserError


def load_prompts(path: str | None, default: str, count: int) -> list[str]:
    """The first `count` non-blank lines of the file `path`, or of the built-in `default`. Raises UserError."""
    source = path or f"the built-in {default}"
    try:
        text = (
            Path(path).read_text("utf-8") if path else resources.files(__package__).joinpath(default).read_text("utf-8")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"rating.prompts: cannot read {source}: {error}") from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if len(prompts) < count:
        raise UserError(f"rating.num_prompts: {count} prompts asked for, {source} has {len(prompts)}")
    chosen = prompts[:count]
    if len(set(chosen)) != count:
        raise UserError(f"rating.prompts: {source} repeats a prompt within the first {count}")
    return chosen

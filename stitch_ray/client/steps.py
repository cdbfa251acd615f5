"""The steps of a trace: what was drafted, what each speaker of the dialogue made of it, and how it was rated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stitch_ray.client.words import percent, word_diff

Step = Mapping[str, Any]

_DOING = {
    "draft": "the primary has drafted an answer",
    "score": "the draft is rated",
    "refine": "the auxiliaries refine it",
    "rescore": "the refined answer is rated",
    "decision": "decided",
}


@dataclass(frozen=True, slots=True)
class Version:
    """An answer on its way, which nobody had checked. `number` 0: the draft. `text` None: texts were not asked for;
    `before`: the text of the version before it.
    """

    number: int
    speaker: str
    text: str | None
    before: str | None
    comment: str | None
    changed: bool
    attempts: int


def is_turn(step: Step) -> bool:
    return "speaker" in step and "number" in step


def versions(trace: Iterable[Step]) -> Iterator[Version]:
    """The draft, then every turn."""
    before: str | None = None
    for step in trace:
        draft = step.get("stage") == "draft"
        if not draft and not is_turn(step):
            continue
        text = step.get("text")
        yield Version(
            number=0 if draft else step["number"],
            speaker="primary" if draft else step["speaker"],
            text=text,
            before=before,
            comment=step.get("comment") or None,
            changed=not draft and bool(step.get("changed")),
            attempts=step.get("attempts") or 1,
        )
        before = text if text is not None else before


def dialogue_lines(trace: Iterable[Step]) -> Iterator[str]:
    """The dialogue in plain text; removed words stand in [-…-], added ones in {+…+}."""
    for version in versions(trace):
        title = "draft" if version.number == 0 else f"turn {version.number}"
        what = "" if version.number == 0 else ", changed" if version.changed else ", kept"
        yield f"{title} of {version.speaker} (unchecked{what})"
        if version.text is not None:
            yield f"  {_marked(version)}"
        if version.comment:
            yield f"  # {version.comment}"


def progress_line(event: str, data: Step) -> str:
    """What an event of a stream says, in one line and without texts of models."""
    if event == "restart":
        return "the connection broke; asking again"
    if is_turn(data):
        return f"turn {data['number']}: {data['speaker']} {'changed' if data.get('changed') else 'kept'} the answer"
    stage, confidence = str(data.get("stage", event)), data.get("confidence")
    rated = "" if confidence is None else f": confidence {percent(confidence)}"
    return _DOING.get(stage, stage) + rated


def _marked(version: Version) -> str:
    assert version.text is not None
    if version.before is None or not version.changed:
        return version.text
    marks = {"same": "{}", "removed": "[-{}-]", "added": "{{+{}+}}"}
    parts = []
    for kind, text in word_diff(version.before, version.text):
        words = text.rstrip()
        parts.append(marks[kind].format(words) + (text[len(words) :] or " "))
    return "".join(parts).strip()

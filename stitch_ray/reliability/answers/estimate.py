"""What a `sample-answers` run would read and ask, as text: `--dry-run`."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from stitch_ray.config.reliability import ANSWER_SPLITS
from stitch_ray.data.corpus import read_source
from stitch_ray.data.quarantine import BadRow
from stitch_ray.data.splits import split_among
from stitch_ray.errors import UserError
from stitch_ray.reliability.answers.preflight import Ready
from stitch_ray.reliability.answers.questions import prompt_ids, question_of

_SAMPLE = 256


@dataclass(slots=True)
class Found:
    """Counts of the whole data; `prompts`: lengths in tokens of a sample of the prompts."""

    rows: int = 0
    unusable: int = 0
    repeats: int = 0
    splits: Counter[str] = field(default_factory=Counter)
    prompts: list[int] = field(default_factory=list)


def describe(ready: Ready) -> str:
    """Questions are counted, prompt tokens extrapolated from the first 256. Raises UserError if there is no question."""
    config, found = ready.config, _read(ready)
    questions = sum(found.splits.values())
    if not questions:
        raise UserError(f"data.paths: no question to ask in {', '.join(ready.sources)}")
    each = config.samples.num + config.samples.greedy
    lines = [
        f"read   {found.rows} rows from {len(ready.sources)} source(s), {found.unusable} unusable, "
        f"{found.repeats} that ask the same again",
        f"ask    {ready.name}: {questions} questions, {questions * each} answers, "
        f"at most {questions * each * config.samples.max_tokens} tokens generated",
    ]
    if found.prompts:
        mean = sum(found.prompts) / len(found.prompts)
        lines.append(f"       about {mean * questions:.0f} tokens of prompts, {max(found.prompts)} in the longest")
    if config.distractors:
        number = found.splits["train"] if config.distractors.questions == "train" else questions
        lines.append(
            f"       and {config.distractors.num} wrong answers to each of {number} questions, in one reply a question"
        )
    lines.append(f"split  {', '.join(f'{name} {found.splits[name]}' for name in ANSWER_SPLITS)} questions")
    if config.labels.metric != "none":
        lines.append(f"label  {config.labels.metric}, correct from {config.labels.threshold:g}")
    if config.signals.names:
        lines.append(f"signal {', '.join(config.signals.names)}")
    return "\n".join(lines)


def _read(ready: Ready) -> Found:
    data, split = ready.config.data, ready.config.split
    found, seen = Found(), set()
    template = ready.prompter.chat_template() if ready.prompter else None
    for source in ready.sources:
        left = None if data.limit is None else data.limit - found.rows
        for good, bad in read_source(source, data, left):
            found.rows += len(good) + len(bad)
            found.unusable += len(bad)
            for example in good:
                try:
                    question = question_of(example, example.content_id)
                    if template is not None and len(found.prompts) < _SAMPLE:
                        found.prompts.append(len(prompt_ids(question.turns, template)))
                except BadRow:
                    found.unusable += 1
                    continue
                found.repeats += question.asked in seen
                if question.asked not in seen:
                    found.splits[split_among(question.group_id, split.shares, split.salt)] += 1
                seen.add(question.asked)
    return found

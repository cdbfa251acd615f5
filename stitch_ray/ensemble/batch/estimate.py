"""What a `predict` run would read and ask, as text: `--dry-run`."""

from __future__ import annotations

from collections import Counter

from stitch_ray.config.reliability import ANSWER_SPLITS
from stitch_ray.data.corpus import read_source
from stitch_ray.data.quarantine import BadRow
from stitch_ray.data.splits import split_among
from stitch_ray.ensemble.batch.preflight import Ready
from stitch_ray.errors import UserError
from stitch_ray.reliability.answers.questions import question_of


def describe(ready: Ready) -> str:
    """Questions are counted; calls are the most there can be. Raises UserError if there is no question."""
    config = ready.config
    rows, unusable, splits = _read(ready)
    wanted = {name: splits[name] for name in (config.splits or ANSWER_SPLITS)}
    questions = sum(wanted.values())
    if not questions:
        raise UserError(f"data.paths: no question to ask in {', '.join(ready.sources)}")
    lines = [
        f"read    {rows} rows from {len(ready.sources)} source(s), {unusable} unusable",
        f"ask     {ready.name}: {questions} questions, {config.concurrency} at a time",
        f"split   {', '.join(f'{name} {count}' for name, count in wanted.items())} questions",
    ]
    if config.ensemble is not None:
        lines.append(f"refine  {_refinement(ready)}")
        lines.append(f"score   {', '.join(sorted(ready.signals)) or 'question and answer alone'}")
    if ready.policy is not None:
        target = next(one for one in ready.policy.targets if config.target_risk in (None, one.target_risk))
        at = "nothing" if target.threshold is None else f"from confidence {target.threshold:.4g} on"
        lines.append(f"answer  {at}: at most {target.target_risk:.4g} wrong with probability {1 - target.delta:.4g}")
    if config.labels.metric != "none":
        lines.append(f"label   {config.labels.metric}, correct from {config.labels.threshold:g}")
    return "\n".join(lines)


def _refinement(ready: Ready) -> str:
    ensemble = ready.config.ensemble
    assert ensemble is not None
    if ensemble.route == "none":
        return "nothing: what is not sure enough gets an abstention"
    who = " and ".join(member.name for member in ensemble.auxiliaries)
    which = "every answer" if ready.config.calibration else "what is not sure enough"
    if ensemble.route == "exclude":
        return f"{which}, {who} in at most {ensemble.exclude.max_attempts} further answers"
    return f"{which}, {who} in at most {ensemble.dialogue.max_turns} turns"


def _read(ready: Ready) -> tuple[int, int, Counter[str]]:
    """Rows, unusable ones, and questions by split."""
    data, split = ready.config.data, ready.config.split
    rows = unusable = 0
    splits: Counter[str] = Counter()
    seen = set()
    for source in ready.sources:
        left = None if data.limit is None else data.limit - rows
        for good, bad in read_source(source, data, left):
            rows += len(good) + len(bad)
            unusable += len(bad)
            for example in good:
                try:
                    question = question_of(example, example.content_id)
                except BadRow:
                    unusable += 1
                    continue
                if question.asked not in seen:
                    splits[split_among(question.group_id, split.shares, split.salt)] += 1
                seen.add(question.asked)
    return rows, unusable, splits

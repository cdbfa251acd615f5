"""A question as models and scorer see it: the same turns, context and hash as `sample-answers` had them."""

from __future__ import annotations

from functools import lru_cache

from stitch_ray.data.quarantine import BadRow
from stitch_ray.ensemble.types import Question
from stitch_ray.records import Example, Turn
from stitch_ray.reliability.answers.questions import Question as Asked
from stitch_ray.reliability.answers.questions import question_of
from stitch_ray.reliability.answers.sampling import sample_seed

__all__ = ["Asked", "asked", "seed_for", "unasked"]


@lru_cache(maxsize=256)
def asked(question: Question) -> Asked:
    """What is asked: `turns` for the model, `question` and `context` for the scorer, `asked` for seeds.

    Turns before the question are part of the scorer's context. Raises ValueError for a blank question, and for text
    that is no Unicode (half of a surrogate pair). Remembered: every stage and turn of an answer looks at it again.
    """
    if not question.question.strip():
        raise ValueError("question is empty")
    _check_text("question", question.question)
    _check_text("context", question.context or "")
    for turn in question.history:
        _check_text("history", turn.content)
    example = Example(
        messages=(*question.history, Turn("user", question.question), Turn("assistant", "")),
        source="",
        line=0,
        raw="",
        context=question.context,
        task=question.task,
    )
    try:
        return question_of(example, question.example_id)
    except BadRow as error:
        raise ValueError(str(error)) from error


def unasked(planned: Asked) -> Question:
    """The question of a planned row, of which `asked` makes the same turns, context and hash again.

    Raises ValueError where turns follow the last question, which a question cannot hold.
    """
    turns, question = planned.turns, planned.question
    users = [number for number, turn in enumerate(turns) if turn.role == "user"]
    first, last = users[0], users[-1]
    if last != len(turns) - 1:
        raise ValueError("turns follow the last question")
    shown = turns[first].content  # with the context behind it, after a blank line
    ends = [len(shown)] if first != last else [len(question)]
    ends += [at for at in range(len(shown)) if first != last and shown.startswith("\n\n", at)]
    for end in ends:
        history = (*turns[:first], *([Turn("user", shown[:end])] if first != last else []), *turns[first + 1 : last])
        candidate = Question(
            example_id=planned.example_id,
            question=question,
            context=shown[end + 2 :] or None,
            task=planned.task,
            history=history,
        )
        again = asked(candidate)
        if again.turns == turns and again.context == planned.context:
            return candidate
    raise ValueError("the turns do not hold the question as it was asked")


def seed_for(asked: str, stage: str, attempt: int, seed: int) -> int:
    """A seed below 2**60 that depends on what is asked (its hash), stage and attempt: not on when, where or beside what."""
    return sample_seed(seed, asked, stage, attempt)


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half of a surrogate pair at character {error.start}") from error

"""Made questions with short answers, of which a small model learns some and not others: for the demo and tests."""

from __future__ import annotations

from random import Random

_DIGITS = (5, 7, 9)


def short_questions(num_rows: int, seed: int = 0) -> list[dict[str, str]]:
    """`num_rows` distinct rows `id, task, question, answer`: three in five ask for the median of some digits, which a
    model of some hundred thousand parameters learns in a minute; the others for a remainder, which it can only guess.

    A larger set of the same seed begins with the smaller one.
    """
    rng = Random(f"short questions {seed}")
    found: dict[str, tuple[str, str]] = {}
    while len(found) < num_rows:
        if rng.random() < 0.6:
            digits = rng.choices("0123456789", k=rng.choice(_DIGITS))
            question, row = f"median of {''.join(digits)}", ("median", sorted(digits)[len(digits) // 2])
        else:
            number = rng.randrange(1000, 10000)
            question, row = f"remainder of {number} by 7", ("remainder", str(number % 7))
        found.setdefault(question, row)
    return [
        {"id": f"short-{seed}-{index:05d}", "task": task, "question": question, "answer": answer}
        for index, (question, (task, answer)) in enumerate(found.items())
    ]

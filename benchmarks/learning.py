"""What the losses of `finetune` are worth: three made tasks trained apart, mixed, balanced, and with CoBa.

    python -m benchmarks.learning [--seeds 5] [--processes 2]

A small Llama with random weights is trained by the product's own worker (one process, gloo). A seed stands for other
examples, other initial weights and another order; all methods of a seed share them. Test questions are held out by
`split_of`, as in a job. An answer counts if it is right to the last token.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from stitch_ray.records import Example, Turn

Pair = tuple[str, str]
SPLITS = ("train", "validation", "test")


def _digits(rng: Random, n: int) -> str:
    return "".join(rng.choices("0123456789", k=n))


def sort_digits(rng: Random) -> Pair:
    digits = _digits(rng, 6)
    return f"sort {digits}", "".join(sorted(digits))


def reverse(rng: Random) -> Pair:
    digits = _digits(rng, 6)
    return f"reverse {digits}", digits[::-1]


def shift(rng: Random) -> Pair:
    digits = _digits(rng, 5)
    return f"shift {digits}", "".join(str((int(digit) + 3) % 10) for digit in digits)


def subtract(rng: Random) -> Pair:
    low, high = sorted((rng.randrange(150), rng.randrange(150)))
    return f"{high} - {low}", f"{high - low}"


def count(rng: Random) -> Pair:
    digits = _digits(rng, 6)
    return f"count odd {digits}", str(sum(int(digit) % 2 for digit in digits))


def largest(rng: Random) -> Pair:
    digits = _digits(rng, 6)
    return f"largest {digits}", max(digits)


_WAYS = ("code of {}", "{} stands for", "look up {}", "what is {}", "{} ?", "tell me {}")


def facts(rng: Random) -> Pair:
    key = rng.randrange(100)
    value = Random(key).randrange(1000)
    return rng.choice(_WAYS).format(f"{key:02d}"), f"{value:03d}"


def add(rng: Random) -> Pair:
    a, b = rng.randrange(100), rng.randrange(100)
    return f"{a:02d} + {b:02d}", f"{a + b:03d}"


def digit_sum(rng: Random) -> Pair:
    digits = _digits(rng, 4)
    return f"sum {digits}", f"{sum(map(int, digits)):02d}"


def distinct(rng: Random) -> Pair:
    digits = _digits(rng, 6)
    return f"distinct {digits}", str(len(set(digits)))


def median(rng: Random) -> Pair:
    digits = _digits(rng, 7)
    return f"median {digits}", sorted(digits)[3]


def rotate(rng: Random) -> Pair:
    digits = _digits(rng, 7)
    k = int(digits[0]) % 5
    return f"rotate {digits}", digits[1 + k :] + digits[1 : 1 + k]


MADE: dict[str, Callable[[Random], Pair]] = {
    f.__name__: f for f in (sort_digits, reverse, shift, subtract, count, largest, facts, add, digit_sum, distinct, median, rotate)
}


def make_rows(make: Callable[[Random], Pair], number: int, seed: int) -> list[Example]:
    """`number` distinct questions, or as many as 50 tries each find."""
    rng, found = Random(f"{seed} {make.__name__}"), {}
    for _ in range(50 * number):
        question, answer = make(rng)
        found.setdefault(question, answer)
        if len(found) == number:
            break
    return [
        Example(messages=(Turn("user", q), Turn("assistant", a)), source="made", line=i, raw="{}")
        for i, (q, a) in enumerate(found.items(), start=1)
    ]

"""A made instruction corpus in the Alpaca format: for demos and tests, with nobody else's text in it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta
from random import Random
from typing import Any, NamedTuple

BAD_SHARE = 0.25
_ROWS_PER_BAD_ROW = round(1 / BAD_SHARE)


class _Task(NamedTuple):
    instruction: str
    output: str
    input: str = ""


def instruction_corpus(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
    """`num_rows` rows with `id, task, instruction, input, output, quality, defect`.

    One row in every four consecutive ones has a degraded answer: `quality` is `bad` and `defect` is `wrong`,
    `truncated`, `off_topic` or `repeated` (`none` for `good` rows). A larger corpus of the same seed begins with the
    smaller one. Facts about the made-up towns are the same for every seed, so a model trained on one seed can be
    tested on another. Questions are drawn anew when they repeat, but a large corpus does repeat some.
    """
    if num_rows < 0:
        raise ValueError(f"num_rows is {num_rows}; it cannot be negative")
    rows: list[dict[str, Any]] = []
    asked: set[tuple[str, str]] = set()
    for index in range(num_rows):
        rng = Random(f"{seed}/{index}")
        kind = rng.choice(tuple(TASKS))
        task = TASKS[kind](rng)
        for _ in range(20):
            if (task.instruction, task.input) not in asked:
                break
            task = TASKS[kind](rng)
        asked.add((task.instruction, task.input))
        block, place = divmod(index, _ROWS_PER_BAD_ROW)
        bad = Random(f"{seed}/bad/{block}").randrange(_ROWS_PER_BAD_ROW) == place
        defect, output = _degrade(kind, task.output, rng) if bad else ("none", task.output)
        rows.append(
            {
                "id": f"synthetic-{seed}-{index:06d}",
                "task": kind,
                "instruction": task.instruction,
                "input": task.input,
                "output": output,
                "quality": "bad" if bad else "good",
                "defect": defect,
            }
        )
    return rows


def _degrade(kind: str, answer: str, rng: Random) -> tuple[str, str]:
    """(defect, spoilt answer); the spoilt answer differs from `answer`."""
    words = answer.split(" ")
    defects = ["wrong", "off_topic", "repeated"] + ["truncated"] * (len(words) >= 6)
    defect = rng.choice(defects)
    if defect == "truncated":
        return defect, " ".join(words[: rng.randint(2, len(words) // 2)])
    if defect == "repeated":
        return defect, " ".join([" ".join(words[: rng.randint(1, 6)])] * rng.randint(4, 12))
    while True:
        source = kind if defect == "wrong" else rng.choice([other for other in TASKS if other != kind])
        spoilt = TASKS[source](rng).output
        if spoilt != answer:
            return defect, spoilt


_PEOPLE = ("Ada", "Bruno", "Chidi", "Dalia", "Emil", "Farah", "Goran", "Hana", "Ines", "Jonas", "Kofi", "Lena")
_GOODS = ("apples", "candles", "notebooks", "lamps", "ropes", "cups", "seeds", "bricks", "maps", "bells")
_WORDS = [
    "anchor",
    "basket",
    "canyon",
    "dragon",
    "engine",
    "forest",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kettle",
    "lantern",
    "meadow",
    "needle",
    "orchard",
    "pepper",
    "quartz",
    "ribbon",
    "saddle",
    "tunnel",
    "umbrella",
    "valley",
    "window",
    "yellow",
    "zipper",
    "bottle",
    "copper",
    "ladder",
    "mirror",
    "pocket",
]
_UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("kilograms", "grams", 1000),
    ("litres", "millilitres", 1000),
    ("days", "hours", 24),
    ("weeks", "days", 7),
)
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_DEEDS = (
    ("painted", "the old fence"),
    ("repaired", "the broken clock"),
    ("wrote", "a long letter"),
    ("carried", "the heavy boxes"),
    ("sold", "two silver rings"),
    ("cooked", "a pot of soup"),
    ("found", "the missing key"),
    ("built", "a small bridge"),
)
_PLACES = {
    "a kitchen": ("a stove", "a sink", "a kettle", "a pan", "a cutting board", "a spoon", "a fridge", "a bowl"),
    "a school": ("a desk", "a chalkboard", "a teacher", "a library", "a timetable", "a bell", "a map", "a gym"),
    "a harbour": ("a crane", "a pier", "a ferry", "a rope", "a lighthouse", "a buoy", "a fishing boat", "a gull"),
    "a workshop": ("a hammer", "a saw", "a vice", "a drill", "a workbench", "a file", "a ruler", "a clamp"),
    "a garden": ("a spade", "a hedge", "a rose bush", "a bench", "a watering can", "a path", "a pond", "a rake"),
}
_CHORES = {
    "make a pot of tea": (
        "Fill the kettle with fresh water and bring it to the boil.",
        "Warm the pot with a little hot water and pour it away.",
        "Add one spoon of tea leaves for every cup.",
        "Pour the boiling water over the leaves.",
        "Wait for about four minutes.",
        "Stir once and pour the tea through a strainer.",
    ),
    "plant a young tree": (
        "Choose a sunny place with enough room for the roots.",
        "Dig a hole twice as wide as the root ball.",
        "Set the tree upright in the middle of the hole.",
        "Fill the hole with soil and press it down gently.",
        "Tie the trunk loosely to a stake.",
        "Water the tree well and cover the soil with leaves.",
    ),
    "repair a flat bicycle tyre": (
        "Turn the bicycle over and take the wheel off.",
        "Lift one side of the tyre off the rim and pull out the tube.",
        "Pump up the tube and look for the hole.",
        "Roughen the place around the hole and spread the glue.",
        "Wait until the glue is almost dry and press on the patch.",
        "Put the tube and the tyre back and pump up the wheel.",
    ),
    "clean a window": (
        "Mix warm water with a few drops of soap.",
        "Wipe the dust off the frame with a dry cloth.",
        "Wash the glass from top to bottom with a sponge.",
        "Pull the water off with a rubber blade.",
        "Dry the edges with a soft cloth.",
    ),
}


class _Town(NamedTuple):
    country: str
    river: str
    founded: int
    product: str


def _found_towns() -> dict[str, _Town]:
    rng = Random("towns")
    heads, tails = ("Bel", "Dor", "Kel", "Mar", "Nor", "Tal", "Vas", "Zun"), ("dale", "grad", "mira", "port", "wick")
    countries, rivers = ("Ostria", "Velland", "Quorra", "Mirhal"), ("Issel", "Orva", "Tamur", "Lind", "Brenna")
    products = ("glass", "wool", "cheese", "clocks", "paper", "boats")
    return {
        head + tail: _Town(rng.choice(countries), rng.choice(rivers), rng.randint(900, 1900), rng.choice(products))
        for head in heads
        for tail in tails
    }


_TOWNS = _found_towns()


def _arithmetic(rng: Random) -> _Task:
    left, right = rng.randint(2, 99), rng.randint(2, 99)
    sign = rng.choice("+-*")
    result = {"+": left + right, "-": left - right, "*": left * right}[sign]
    ask = rng.choice(("What is {}?", "Calculate {}.", "Work out {}."))
    return _Task(ask.format(f"{left} {sign} {right}"), f"{left} {sign} {right} = {result}")


def _long_sum(rng: Random) -> _Task:
    numbers = [rng.randint(10, 99) for _ in range(rng.randint(3, 8))]
    total, lines = numbers[0], [f"Start with {numbers[0]}."]
    for step, number in enumerate(numbers[1:], 1):
        lines.append(f"Step {step}: {total} + {number} = {total + number}.")
        total += number
    lines.append(f"The sum is {total}.")
    return _Task("Add the numbers and show every step.", "\n".join(lines), ", ".join(map(str, numbers)))


def _word_problem(rng: Random) -> _Task:
    name, goods = rng.choice(_PEOPLE), rng.choice(_GOODS)
    boxes, each, given = rng.randint(2, 9), rng.randint(3, 12), rng.randint(1, 5)
    question = (
        f"{name} buys {boxes} boxes with {each} {goods} each and gives {given} {goods} away. "
        f"How many {goods} does {name} have left?"
    )
    answer = (
        f"First count what was bought: {boxes} boxes with {each} {goods} are {boxes} * {each} = {boxes * each}. "
        f"Then take away the {given} that were given away: {boxes * each} - {given} = {boxes * each - given}. "
        f"{name} has {boxes * each - given} {goods} left."
    )
    return _Task(question, answer)


def _sort_words(rng: Random) -> _Task:
    words = rng.sample(_WORDS, rng.randint(3, 8))
    ask = rng.choice(("Sort these words by the alphabet.", "Put the words into alphabetical order."))
    return _Task(ask, ", ".join(sorted(words)), ", ".join(words))


def _reverse(rng: Random) -> _Task:
    if rng.random() < 0.5:
        word = rng.choice(_WORDS)
        return _Task(f'Write the word "{word}" backwards.', word[::-1])
    words = rng.sample(_WORDS, rng.randint(3, 6))
    return _Task("Write the list in reverse order.", ", ".join(reversed(words)), ", ".join(words))


def _count_letters(rng: Random) -> _Task:
    word = rng.choice(_WORDS)
    if rng.random() < 0.5:
        return _Task(f'How many letters does the word "{word}" have?', str(len(word)))
    letter = rng.choice(word)
    spelled = ", ".join(f"{place}: {found}" for place, found in enumerate(word, 1))
    answer = f'Spelled out, the word is {spelled}. The letter "{letter}" appears {word.count(letter)} time(s).'
    return _Task(f'How often does the letter "{letter}" appear in "{word}"?', answer)


def _date_shift(rng: Random) -> _Task:
    start = date(2030, 1, 1) + timedelta(days=rng.randrange(3000))
    days = rng.randint(2, 60)
    if rng.random() < 0.5:
        end = start + timedelta(days=days)
        return _Task(f"Which date is {days} days after {start.isoformat()}?", f"{end.isoformat()}")
    today, later = rng.randrange(7), rng.randint(2, 30)
    answer = (
        f"A week has 7 days, and {later} days leave a remainder of {later % 7}. "
        f"{later % 7} days after {_DAYS[today]} comes {_DAYS[(today + later) % 7]}."
    )
    return _Task(f"Today is {_DAYS[today]}. Which day of the week is it in {later} days?", answer)


def _convert_units(rng: Random) -> _Task:
    large, small, factor = rng.choice(_UNITS)
    count = rng.randint(2, 40)
    answer = f"{count} {large} = {count * factor} {small}."
    if rng.random() < 0.5:
        answer = f"One of the {large} is {factor} {small}, so {count} * {factor} = {count * factor}. " + answer
    return _Task(f"Convert {count} {large} to {small}.", answer)


def _compare(rng: Random) -> _Task:
    if rng.random() < 0.5:
        left, right = rng.sample(range(100, 10000), 2)
        return _Task(f"Which number is larger, {left} or {right}?", str(max(left, right)))
    large, small, factor = rng.choice(_UNITS)
    count = rng.randint(2, 9)
    other = count * factor + rng.choice((-1, 1)) * rng.randint(1, factor - 1)
    more = f"{other} {small}" if other > count * factor else f"{count} {large}"
    answer = f"{count} {large} are {count * factor} {small}. Compared with {other} {small}, the larger one is {more}."
    return _Task(f"What is more: {count} {large} or {other} {small}?", answer)


def _fact(rng: Random) -> _Task:
    name = rng.choice(tuple(_TOWNS))
    town = _TOWNS[name]
    choices = (
        (f"In which country is {name}?", f"{name} is in {town.country}."),
        (f"On which river does {name} lie?", f"{name} lies on the river {town.river}."),
        (f"When was {name} founded?", f"{name} was founded in the year {town.founded}."),
        (f"What is {name} known for?", f"{name} is known for its {town.product}."),
        (
            f"Tell me about {name}.",
            f"{name} is a town in {town.country}. It lies on the river {town.river} and was founded in the year "
            f"{town.founded}. People there are known for making {town.product}.",
        ),
    )
    return _Task(*rng.choice(choices))


def _rewrite(rng: Random) -> _Task:
    name, (verb, thing) = rng.choice(_PEOPLE), rng.choice(_DEEDS)
    when = rng.choice(("yesterday", "on Monday", "last week", "in the morning", "before lunch"))
    sentence = f"{name} {verb} {thing} {when}."
    choices = (
        ("Write the sentence in capital letters.", sentence.upper()),
        (
            f"Begin the sentence with the words that say when {name} did it.",
            f"{when.capitalize()}, {sentence[: -len(when) - 2]}.",
        ),
        ("Turn the sentence into a question that starts with who.", f"Who {verb} {thing} {when}?"),
        ("Make the sentence more formal.", f"It is hereby reported that {name} {verb} {thing} {when}."),
    )
    ask, answer = rng.choice(choices)
    return _Task(ask, answer, sentence)


def _list_things(rng: Random) -> _Task:
    place = rng.choice(tuple(_PLACES))
    things = rng.sample(_PLACES[place], rng.randint(3, 7))
    answer = "\n".join(f"{number}. {thing}" for number, thing in enumerate(things, 1))
    return _Task(f"List {len(things)} things that one finds in {place}.", answer)


def _explain_steps(rng: Random) -> _Task:
    chore, name = rng.choice(tuple(_CHORES)), rng.choice(_PEOPLE)
    steps = _CHORES[chore]
    number = rng.randint(3, len(steps))
    lines = [f"{place}. {step}" for place, step in enumerate(steps[:number], 1)]
    ask = rng.choice(("Explain to {} in {} steps how to {}.", "Help {}: name the first {} steps to {}."))
    closing = f"Now {name} knows how to {chore}." if number == len(steps) else f"{name} can go on from there."
    return _Task(ask.format(name, number, chore), "\n".join([f"Here is how to {chore}:", *lines, closing]))


def _find_in_report(rng: Random) -> _Task:
    days = rng.sample(_DAYS, rng.randint(3, 6))
    sold = {day: (rng.choice(_PEOPLE), rng.randint(5, 95), rng.choice(_GOODS)) for day in days}
    report = " ".join(f"On {day}, {name} sold {count} {goods}." for day, (name, count, goods) in sold.items())
    day = rng.choice(days)
    name, count, goods = sold[day]
    return _Task(f"Read the report. Who sold what on {day}?", f"{name} sold {count} {goods} on {day}.", report)


def _sequence(rng: Random) -> _Task:
    start, step, length = rng.randint(1, 50), rng.randint(2, 15), rng.randint(4, 6)
    shown = [start + step * place for place in range(length)]
    following = shown[-1] + step
    answer = f"Every number is {step} more than the one before, so the next one is {shown[-1]} + {step} = {following}."
    return _Task("Which number comes next?", answer, ", ".join(map(str, shown)))


TASKS: dict[str, Callable[[Random], _Task]] = {
    "arithmetic": _arithmetic,
    "long_sum": _long_sum,
    "word_problem": _word_problem,
    "sort_words": _sort_words,
    "reverse": _reverse,
    "count_letters": _count_letters,
    "date_shift": _date_shift,
    "convert_units": _convert_units,
    "compare": _compare,
    "fact": _fact,
    "rewrite": _rewrite,
    "list_things": _list_things,
    "explain_steps": _explain_steps,
    "find_in_report": _find_in_report,
    "sequence": _sequence,
}

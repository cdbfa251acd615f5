"""How well an answer agrees with a reference: exact match, token F1, ROUGE-L and multiple choice, on texts alone.

Every score is in [0, 1], 1 is full agreement, and no text raises. With several references take the best score.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

RougeConvention = Literal["rouge_score", "rouge_101"]

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise_answer(text: str) -> str:
    """Lower case without ASCII punctuation, English articles and superfluous white space (SQuAD, Rajpurkar 2016)."""
    bare = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(bare.split())


def exact_match(prediction: str, reference: str) -> float:
    """1 if both are equal after normalisation. "A", "the" and "" all normalise to nothing and are equal."""
    return float(normalise_answer(prediction) == normalise_answer(reference))


def token_f1(prediction: str, reference: str) -> float:
    """F1 of the multisets of normalised words; where either has no word left, exact match (SQuAD 2.0's own rule)."""
    ours, theirs = normalise_answer(prediction).split(), normalise_answer(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def rouge_l(
    prediction: str, reference: str, *, convention: RougeConvention = "rouge_score"
) -> tuple[float, float, float]:
    """Precision, recall and F of the longest common subsequence of words (Lin 2004, Sec. 3).

    Precision is the share of the prediction's words, recall that of the reference's.

    rouge_score: as in the package of that name without stemming. Words are runs of a-z and 0-9 in lower case.
    rouge_101: as `rouge` 1.0.1 has it: case and punctuation count, sentences end at every full stop, distinct words
    are counted, a reference sentence scores the union of its LCS with all sentences of the prediction, and F has 1e-8
    in its denominator, so that it never quite reaches 1.

    Texts without a single word score 1 if they are the same (or both blank), else 0.
    """
    ours, theirs = _words(prediction, convention), _words(reference, convention)
    if not any(map(any, ours)) or not any(map(any, theirs)):
        same = float(prediction.strip(" .\n\t") == reference.strip(" .\n\t"))
        return same, same, same
    if convention == "rouge_101":
        common = _union_lcs(ours, theirs)
        precision = common / len({word for sentence in ours for word in sentence})
        recall = common / len({word for sentence in theirs for word in sentence})
        return precision, recall, 2 * precision * recall / (precision + recall + 1e-8)
    common = lcs_length(ours[0], theirs[0])
    return common / len(ours[0]), common / len(theirs[0]), 2 * common / (len(ours[0]) + len(theirs[0]))


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bit-parallel dynamic programming (Hyyrö 2004, Fig. 5)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    ones = (1 << len(first)) - 1
    row = ones
    for word in second:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & ones
    return len(first) - row.bit_count()


def choice_accuracy(prediction: str, reference: str, options: Mapping[str, str] | Sequence[str]) -> float:
    """1 if the prediction chooses the option that the reference names by its label or its text.

    options: label -> text, or texts labelled A, B, C … A prediction that chooses nothing, or several things, is wrong.
    Raises ValueError if the reference is none of the options.
    """
    texts = _labelled(options)
    right = reference.strip() if reference.strip() in texts else _by_equal_text(reference, texts)
    if right is None:
        raise ValueError(f"the reference {reference!r} is neither label nor text of an option: {', '.join(texts)}")
    chosen = extract_choice(prediction, texts)
    if chosen is None:
        return 0.0
    by_text = normalise_answer(prediction) == normalise_answer(texts[right])  # of options with one text, any is meant
    return float(chosen == right or by_text)


def extract_choice(prediction: str, options: Mapping[str, str] | Sequence[str]) -> str | None:
    """Label of the option that a free text chooses; None if it chooses none or cannot be told.

    Tried in this order: the text is a label or an option's text; it begins with a label ("B.", "(B)", "B bank"); it
    says so ("the answer is B", the last one counts); one label stands by itself, or the last word is one ("Based on …,
    D"); one option's text is contained in it. A label inside a word, or the article "A", is none.
    """
    texts = _labelled(options)
    stripped = prediction.strip()
    bare = stripped.strip(string.punctuation + string.whitespace)
    for label in texts:
        if bare == label or bare.casefold() == label.casefold():
            return label
    return (
        _by_equal_text(stripped, texts)
        or _at_start(stripped, texts)
        or _as_said(stripped, texts)
        or _alone(stripped, texts)
        or _by_contained_text(stripped, texts)
    )


def _words(text: str, convention: RougeConvention) -> list[list[str]]:
    """Words of every sentence."""
    if convention == "rouge_score":
        return [re.findall(r"[a-z0-9]+", text.lower())]
    # A sentence that is all blanks is one empty word, which the package counts.
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def _union_lcs(prediction: list[list[str]], reference: list[list[str]]) -> int:
    """Distinct words in any LCS of a sentence of the reference and one of the prediction."""
    return len({word for theirs in reference for ours in prediction for word in _lcs_words(theirs, ours)})


def _lcs_words(first: list[str], second: list[str]) -> list[str]:
    """Words of one LCS, last first. Which one, where there are several, is as in `rouge` 1.0.1."""
    table = [[0] * (len(second) + 1)]
    for word in first:
        above, row = table[-1], [0]
        for j, other in enumerate(second):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        table.append(row)
    words, i, j = [], len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            i, j = i - 1, j - 1
            words.append(first[i])
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words


def _labelled(options: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    return dict(options) if isinstance(options, Mapping) else dict(zip(string.ascii_uppercase, options, strict=False))


def _by_equal_text(text: str, texts: Mapping[str, str]) -> str | None:
    wanted = normalise_answer(text)
    return next((label for label, option in texts.items() if wanted and normalise_answer(option) == wanted), None)


def _at_start(text: str, texts: Mapping[str, str]) -> str | None:
    """ "B. bank", "(B) bank", "B: …"; "B bank" only with the option's own text, as "A bank" may be an article."""
    found = re.match(rf"[\W_]*({_any(texts)})(?![\w'’])(\s*[.):\]*]|\s*$)?", text)
    if found is None:
        return None
    if found[2] is not None:
        return found[1]
    option = normalise_answer(texts[found[1]])
    return found[1] if option and normalise_answer(text[found.end(1) :]) == option else None


def _as_said(text: str, texts: Mapping[str, str]) -> str | None:
    cue = r"\b(?i:answer)\b(?:\s+(?:is|was|should be|must be|would be|will be))?(?:\s+(?:option|choice|letter))?"
    found = re.findall(rf"{cue}[\s:=\-–—*(\['\"`]*({_any(texts)}){_NOT_AN_ARTICLE}", text, flags=re.ASCII)
    return found[-1] if found else None


def _alone(text: str, texts: Mapping[str, str]) -> str | None:
    places = list(re.finditer(rf"(?<![\w'’])({_any(texts)}){_NOT_AN_ARTICLE}", text))
    labels = {place[1] for place in places}
    if len(labels) == 1:
        return labels.pop()
    if not places or re.search(r"\w", text[places[-1].end() :]):
        return None
    between = text[places[-2].end() : places[-1].start()]  # "C or D" chooses nothing
    return None if re.fullmatch(r"[\W_]*(and|or)?[\W_]*", between) else places[-1][1]


def _by_contained_text(text: str, texts: Mapping[str, str]) -> str | None:
    padded = f" {normalise_answer(text)} "
    options = {label: normalise_answer(option) for label, option in texts.items()}
    found = {label: option for label, option in options.items() if option and f" {option} " in padded}
    longest = {
        label: option
        for label, option in found.items()
        if not any(option != other and f" {option} " in f" {other} " for other in found.values())
    }
    return next(iter(longest)) if len(set(longest.values())) == 1 else None


# Behind a label: no further letter, and behind "A" and "I" none of the words that make an article or a pronoun of them.
_NOT_AN_ARTICLE = r"(?![\w'’])(?!(?<=[AI])\s+(?!(?:is|as|and|or|because|since)\b)[a-z])"


def _any(texts: Mapping[str, str]) -> str:
    return "|".join(re.escape(label) for label in sorted(texts, key=len, reverse=True))

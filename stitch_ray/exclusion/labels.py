"""The rule that calls an answer CORRECT or WRONG from its agreement with the gold answer. Pure: texts and numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stitch_ray.evaluation import answers

Label = Literal["CORRECT", "WRONG"]
CORRECT: Label = "CORRECT"
WRONG: Label = "WRONG"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Bounds of the rule; the defaults are those that the published DATASET+ files were labelled with.

    All but `bert_with_rouge` have to be exceeded: the published script later allowed .6 itself, the files do not.
    `convention`: the ROUGE-L that is meant, that of the published files or `rouge_score`'s; see `rouge_l`.
    """

    convention: answers.RougeConvention = "rouge_101"
    rouge_f: float = 0.5
    bert_with_rouge: float = 0.5
    rouge_p_or_r: float = 0.6
    bert: float = 0.9


def label(
    rouge_p: float, rouge_r: float, rouge_f: float, bert_f: float | None, exact: bool, *, rule: Rule = Rule()
) -> Label:
    """CORRECT if one of these holds, else WRONG:

    the texts are the same (`exact`, case-sensitive); ROUGE-L F > .5 and BERTScore F >= .5; ROUGE-L precision or recall
    > .6; BERTScore F > .9. `bert_f` None: there is no BERTScore, and ROUGE-L decides alone. All scores in [0, 1].
    """
    if exact or rouge_p > rule.rouge_p_or_r or rouge_r > rule.rouge_p_or_r:
        return CORRECT
    if bert_f is None:
        return CORRECT if rouge_f > rule.rouge_f else WRONG
    return CORRECT if bert_f > rule.bert or (rouge_f > rule.rouge_f and bert_f >= rule.bert_with_rouge) else WRONG


def rouge_l(
    gold: str, prediction: str, convention: answers.RougeConvention = "rouge_101"
) -> tuple[float, float, float]:
    """Precision, recall and F of ROUGE-L.

    rouge_101: as in the published files: the gold answer stands where `rouge` 1.0.1 expects the hypothesis, so that
    "precision" is the share of the *gold* answer's words and "recall" of the prediction's.
    rouge_score: as usual: precision is the share of the prediction's words.

    A blank text shares nothing with any other (the published files put the word "empty" in its place).
    """
    if convention == "rouge_101":
        return answers.rouge_l(gold, prediction, convention=convention)
    return answers.rouge_l(prediction, gold, convention=convention)


def read_label(text: str) -> Label | None:
    """The label that a cell or a model's reply names, in any case; None for anything else ("INCORRECT", "correct?")."""
    name = text.strip().rstrip(".").upper()
    return {"CORRECT": CORRECT, "WRONG": WRONG}.get(name)

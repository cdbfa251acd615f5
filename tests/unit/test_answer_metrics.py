"""Answer metrics against published values and the definitions; see stitch_ray/evaluation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openpyxl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stitch_ray.errors import UserError
from stitch_ray.evaluation.answers import (
    choice_accuracy,
    exact_match,
    extract_choice,
    lcs_length,
    normalise_answer,
    rouge_l,
    token_f1,
)
from stitch_ray.evaluation.bert_score import BertScorer, bert_score
from tests import needs

pytestmark = pytest.mark.numeric

words = st.lists(st.sampled_from(["a", "The", "cat", "cat.", "sat", ".", "", "Ä"]), max_size=8).map(" ".join)
metrics = {
    "exact_match": exact_match,
    "token_f1": token_f1,
    "rouge_score": lambda ours, theirs: rouge_l(ours, theirs)[2],
    "rouge_101": lambda ours, theirs: rouge_l(ours, theirs, convention="rouge_101")[2],
}


@pytest.mark.parametrize(
    ("prediction", "reference", "match", "f1"),
    [
        # computed with Stitch's em_and_f1.py on these pairs; F1 of the empty ones by the official SQuAD 2.0 script
        ("Denver Broncos", "The Denver Broncos", 1, 1),
        ("Broncos", "Denver Broncos", 0, 2 / 3),
        ("308 BC", "308", 0, 2 / 3),
        ("24–10", "24-10", 0, 0),
        ("red red blue", "red blue blue", 0, 2 / 3),
        ("Saint Bernadette Soubirous in 1858", "Saint Bernadette Soubirous", 0, 0.75),
        ("A", "A", 1, 1),
        ("", "A", 1, 1),
        ("", "B", 0, 0),
    ],
)
def test_exact_match_and_f1_of_squad(prediction: str, reference: str, match: float, f1: float) -> None:
    assert exact_match(prediction, reference) == match
    assert token_f1(prediction, reference) == pytest.approx(f1)


def test_normalisation_drops_case_punctuation_articles_and_space() -> None:
    assert normalise_answer("  The quick,  brown-Fox an  END. ") == "quick brownfox end"


@pytest.mark.parametrize(
    ("prediction", "reference", "old", "new"),
    [
        # F of the packages rouge 1.0.1 and rouge_score 0.1.2 (no stemmer), as both print them
        ("Denver Broncos", "Denver Broncos", 0.999999995, 1),
        ("Broncos", "Denver Broncos", 0.6666666622, 2 / 3),
        ("denver broncos", "Denver Broncos", 0, 1),
        ("Denver Broncos.", "Denver Broncos", 0.999999995, 1),
        ("The Denver Broncos", "Denver Broncos", 0.7999999952, 0.8),
        ("Broncos Denver", "Denver Broncos", 0.499999995, 0.5),
        ("Obama", "Denver Broncos", 0, 0),
        ("the cat sat on the mat", "the mat on the cat sat", 0.599999995, 0.5),
        ("the mat on the cat sat", "the cat sat on the mat", 0.399999995, 0.5),
        ("the the the cat", "the cat", 0.999999995, 2 / 3),
    ],
)
def test_rouge_l_of_both_packages(prediction: str, reference: str, old: float, new: float) -> None:
    assert rouge_l(prediction, reference, convention="rouge_101")[2] == pytest.approx(old, abs=1e-10)
    assert rouge_l(prediction, reference)[2] == pytest.approx(new, abs=1e-12)


def test_rouge_precision_is_of_the_prediction_and_recall_of_the_reference() -> None:
    assert rouge_l("the cat sat", "the cat") == pytest.approx((2 / 3, 1, 0.8))
    assert rouge_l("the cat sat", "the cat", convention="rouge_101")[:2] == pytest.approx((2 / 3, 1))
    # Lin 2004, Sec. 3.1: "police killed the gunman" against "police kill the gunman" and "the gunman kill police"
    assert rouge_l("police kill the gunman", "police killed the gunman")[1] == 0.75
    assert rouge_l("the gunman kill police", "police killed the gunman")[1] == 0.5


def test_rouge_101_joins_the_sentences_of_the_prediction() -> None:
    # Lin 2004, Sec. 3.2: union LCS of w1 w2 w3 w4 w5 with two candidate sentences is w1 w2 w3 w5
    precision, recall, _ = rouge_l("w1 w2 w6 w7 w8.w1 w3 w8 w9 w5", "w1 w2 w3 w4 w5", convention="rouge_101")
    assert recall == 4 / 5
    assert precision == 4 / 8  # 8 distinct words


def test_rouge_101_on_the_published_answers_of_exar() -> None:
    folder = needs.real_data("exar")
    compared = 0
    for file in sorted(folder.glob("*/*_preds_metrics_t0.6_deberta.xlsx")):
        rows = openpyxl.load_workbook(file, read_only=True).worksheets[0].iter_rows(values_only=True)
        names = next(rows)
        for row in (dict(zip(names, values, strict=True)) for values in rows):
            gold = str(row.get("response", row.get("answer_text")))
            # published with the gold as hypothesis, and "empty" in place of an empty answer
            published = row["RG_L_P"], row["RG_L_R"], row["RG_L_F1"]
            ours = rouge_l(gold, row["Generated_Response"] or "empty", convention="rouge_101")
            assert ours == pytest.approx(published, abs=1e-14)
            compared += 1
    assert compared > 1000


@pytest.mark.parametrize("metric", metrics.values(), ids=metrics)
@pytest.mark.parametrize(("ours", "theirs", "score"), [("", "", 1), ("  ", "", 1), ("", "cat", 0), ("cat", " ", 0)])
def test_empty_answers_have_a_score(metric, ours: str, theirs: str, score: float) -> None:
    assert metric(ours, theirs) == score


def test_texts_without_latin_words_do_not_agree_by_being_unreadable() -> None:
    assert rouge_l("北京", "上海")[2] == 0
    assert rouge_l("北京", "北京")[2] == 1


@pytest.mark.parametrize("metric", metrics.values(), ids=metrics)
@given(ours=words, theirs=words)
def test_scores_are_bounded_and_full_for_equal_texts(metric, ours: str, theirs: str) -> None:
    assert 0 <= metric(ours, theirs) <= 1
    assert metric(ours, ours) == pytest.approx(1)


@settings(max_examples=200)
@given(st.text("abc", max_size=12), st.text("abc", max_size=12))
def test_lcs_length_is_that_of_the_table(first: str, second: str) -> None:
    table = np.zeros((len(first) + 1, len(second) + 1), int)
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    assert lcs_length(list(first), list(second)) == table[-1, -1]


OPTIONS = ["bank", "library", "department store", "mall", "New York"]


@pytest.mark.parametrize(
    ("prediction", "label"),
    [
        ("D", "D"),
        ("d", "D"),
        (" (B). ", "B"),
        ("**C**", "C"),
        ("B. library", "B"),
        ("B library", "B"),
        ("A bank", "A"),
        ("Answer: C", "C"),
        ("Certainly! The answer is A", "A"),
        ("The answer is A because a revolving door is there.", "A"),
        ("Based on the question, D", "D"),
        ("Based on all I know, the correct answer is option (E), not A.", "E"),
        ("A and C are wrong, so it must be D.", "D"),
        ("I think it is B", "B"),
        ("library", "B"),
        ("The department store!", "C"),
        ("You would find one in a mall.", "D"),
        ("Apple", None),
        ("A library or a bank", None),
        ("C or D", None),
        ("A dog", None),
        ("", None),
        ("none of these", None),
    ],
)
def test_choice_is_extracted_from_free_text(prediction: str, label: str | None) -> None:
    assert extract_choice(prediction, OPTIONS) == label
    assert choice_accuracy(prediction, "D", OPTIONS) == (label == "D")
    assert choice_accuracy(prediction, "mall", OPTIONS) == (label == "D")


def test_choice_with_other_labels_and_equal_texts() -> None:
    numbered = {"1": "iron", "2": "copper", "3": "iron"}
    assert extract_choice("The answer is 2", numbered) == "2"
    assert choice_accuracy("iron", "3", numbered) == 1
    assert choice_accuracy("1", "3", numbered) == 0
    with pytest.raises(ValueError, match="neither label nor text"):
        choice_accuracy("1", "gold", numbered)


def test_bert_score_is_the_greedy_match_of_the_paper() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = str(needs.minilm())
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    pairs = [("the cat sat on the mat", "a cat was on a rug"), ("Paris", "the capital of France"), ("yes", "no")]

    def embedded(text: str, layer: int) -> np.ndarray:
        with torch.no_grad():
            out = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        vectors = out.hidden_states[layer][0].double().numpy()
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    for layer, last in ((6, None), (3, 3)):
        ours = bert_score(*zip(*pairs, strict=True), folder, layer=last, num_threads=1)  # type: ignore[arg-type]
        for (prediction, reference), scores in zip(pairs, ours, strict=True):
            similarity = embedded(prediction, layer) @ embedded(reference, layer).T
            precision, recall = similarity.max(1)[1:-1].mean(), similarity.max(0)[1:-1].mean()
            expected = precision, recall, 2 * precision * recall / (precision + recall)
            assert scores == pytest.approx(expected, abs=1e-5)


def test_bert_score_depends_on_the_pair_alone() -> None:
    scorer = BertScorer(str(needs.minilm()), batch_tokens=40, num_threads=1)
    ours = ["one", "", "a much longer answer with many words in it", "", "word " * 600]
    theirs = ["two", "", "short", "x", "word"]
    together = scorer.score(ours, theirs)
    alone = np.concatenate([scorer.score([one], [other]) for one, other in zip(ours, theirs, strict=True)])
    assert together == pytest.approx(alone, abs=1e-5)
    assert together[1].tolist() == [1, 1, 1]
    assert together[3].tolist() == [0, 0, 0]
    assert np.isfinite(together).all()
    assert together.max() <= 1


def test_bert_score_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be loaded|no usable tokenizer"):
        BertScorer(str(tmp_path))
    with pytest.raises(UserError, match="has layers 0 to 6, not 7"):
        BertScorer(str(needs.minilm()), layer=7)

"""Equivalence by embeddings and by entailment, batched over questions, against one comparison at a time."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

from stitch_ray.config.sample_answers import SignalsConfig
from stitch_ray.errors import UserError
from stitch_ray.reliability.signals.entailment import EntailmentEquivalence
from stitch_ray.reliability.signals.equivalence import ExactEquivalence, load_equivalence
from stitch_ray.reliability.signals.samples import Answered, cluster
from tests import needs

pytestmark = pytest.mark.numeric

WORDS = ["what", "is", "it", "the", "cat", "dog", "a", "red", "blue", "sat", "ran", "zürich", "東京"]
QUESTIONS = ["what is it", "what", "is the cat red what is the dog"]
ANSWERS = [["the cat", "a cat", "dog"], ["red", "blue", "the red dog sat", "zürich"], ["東京", "it ran"]]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_nli(folder, labels=("contradiction", "neutral", "entailment"), positions=64):
    """A BERT with large random weights, so that it says all sorts of things."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), "utf-8")
    tokenizer = BertTokenizerFast(str(folder / "vocab.txt"))
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(WORDS) + 5, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=positions, initializer_range=0.4, num_labels=len(labels),
        id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)},
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer


@pytest.fixture(scope="module")
def nli(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "nli"
    model, tokenizer = make_nli(folder, ("Contradiction", "ENTAILMENT", "neutral"))
    return str(folder), model, tokenizer


def all_pairs(answers):
    return [(q, i, j) for q, own in enumerate(answers) for i in range(len(own)) for j in range(len(own)) if i != j]


def entails(model, tokenizer, first, second):
    with torch.inference_mode():
        return model(**tokenizer(first, second, return_tensors="pt")).logits[0].argmax().item() == 1


def test_entailment_both_ways_equals_one_forward_a_pair(nli):
    folder, model, tokenizer = nli
    pairs = all_pairs(ANSWERS)
    texts = [(f"{QUESTIONS[q]} {ANSWERS[q][i]}", f"{QUESTIONS[q]} {ANSWERS[q][j]}") for q, i, j in pairs]
    one_way = [entails(model, tokenizer, a, b) for a, b in texts]
    wanted = [here and entails(model, tokenizer, b, a) for here, (a, b) in zip(one_way, texts, strict=True)]
    assert 0 < sum(wanted) < sum(one_way) < len(pairs), "the model must not say the same of all"
    for batch_tokens in (1, 60, 10_000):
        relation = EntailmentEquivalence(folder, batch_tokens=batch_tokens, device="cpu").relation(QUESTIONS, ANSWERS)
        assert relation(pairs).tolist() == wanted
    assert relation([]).tolist() == []


def test_only_what_entails_one_way_is_asked_the_other_way(nli):
    folder, *_ = nli
    equivalence = EntailmentEquivalence(folder, device="cpu")
    rows = []
    equivalence._model.register_forward_hook(
        lambda _m, _a, kwargs, _o: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    pairs = all_pairs(ANSWERS)
    same = equivalence.relation(QUESTIONS, ANSWERS)(pairs)
    assert len(pairs) < sum(rows) < 2 * len(pairs)
    assert len(rows) == 2
    assert same.sum() <= sum(rows) - len(pairs)


def test_a_question_too_long_is_left_out_and_counted(tmp_path):
    model, tokenizer = make_nli(tmp_path, positions=16)
    equivalence = EntailmentEquivalence(str(tmp_path), device="cpu")
    long = " ".join(["what is it"] * 10)
    pairs = all_pairs(ANSWERS)
    shortened = equivalence.relation([long] * 3, ANSWERS)(pairs)
    assert equivalence.truncated >= len(pairs)
    with torch.inference_mode():
        wanted = [
            all(
                model(**tokenizer(*pair, return_tensors="pt")).logits[0].argmax().item() == 2
                for pair in ((a, b), (b, a))
            )
            for a, b in ((ANSWERS[q][i], ANSWERS[q][j]) for q, i, j in pairs)
        ]
    assert shortened.tolist() == wanted
    before = equivalence.truncated
    assert len(equivalence.relation(["what"], [["cat " * 30, "dog " * 30]])([(0, 0, 1)])) == 1
    assert equivalence.truncated > before


@pytest.mark.parametrize(
    "labels", [("LABEL_0", "LABEL_1", "LABEL_2"), ("not_entailment", "other"), ("entail", "entailment")]
)
def test_a_classifier_that_is_no_nli_model_is_refused(tmp_path, labels):
    make_nli(tmp_path, labels)
    with pytest.raises(UserError, match=r"signals.encoder: .*has the labels .*named entailment"):
        EntailmentEquivalence(str(tmp_path))


@pytest.mark.parametrize("similarity", ["embedding", "nli"])
def test_a_folder_without_a_model_is_refused(tmp_path, similarity):
    config = SignalsConfig(names=["semantic_entropy"], similarity=similarity, encoder=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"signals.encoder: .*none"):
        load_equivalence(config)


def test_exact_needs_no_model():
    assert isinstance(load_equivalence(SignalsConfig(names=["semantic_entropy"])), ExactEquivalence)


# Embeddings


@pytest.fixture(scope="module")
def minilm():
    return str(needs.minilm())


def load(encoder, min_cosine):
    return load_equivalence(
        SignalsConfig(names=["semantic_entropy"], similarity="embedding", encoder=encoder, min_cosine=min_cosine),
        device="cpu",
    )


def test_close_embeddings_mean_the_same_and_every_text_is_embedded_once(minilm):
    equivalence = load(minilm, 0.8)
    texts = []
    encode = equivalence._model.encode
    equivalence._model.encode = lambda some, **settings: texts.extend(some) or encode(some, **settings)
    answered = [
        Answered("Who?", ["Barack Obama", "President Barack Obama", "Angela Merkel"], ["Obama, Barack", ""]),
        Answered("Whose?", ["Angela Merkel", "a bowl of soup", "Angela Merkel"], ["Barack Obama"]),
    ]
    people, whose = cluster(answered, equivalence)
    assert people.samples == (0, 0, 1)
    assert people.candidates == (0, -1)
    assert whose.samples == (0, 1, 0)
    assert whose.candidates == (-1,)
    assert sorted(texts) == sorted(set(texts))
    assert equivalence.truncated == 0


def test_cosines_are_those_of_embeddings_one_by_one(minilm):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(minilm, device="cpu")
    answers = [["red", "dark red", "crimson"], ["the cat sat on the mat", "a cat was sitting on a mat"]]
    vectors = [[model.encode([t], normalize_embeddings=True)[0] for t in own] for own in answers]
    pairs = all_pairs(answers)
    cosines = np.array([vectors[q][i] @ vectors[q][j] for q, i, j in pairs])
    for low in (0.5, 0.7, 0.85):
        same = load(minilm, low).relation(["", ""], answers)(pairs)
        assert same.tolist() == (cosines >= low).tolist()


def test_a_plain_encoder_is_averaged_over_tokens_and_made_unit_length(nli):
    folder, model, tokenizer = nli
    answers = [["the cat", "a red dog sat", "it ran"]]
    with torch.inference_mode():
        hidden = [
            model.bert(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0).numpy() for t in answers[0]
        ]
    assert all(abs(np.linalg.norm(one) - 1) > 0.1 for one in hidden)
    pairs = all_pairs(answers)
    cosines = np.array(
        [hidden[i] @ hidden[j] / np.linalg.norm(hidden[i]) / np.linalg.norm(hidden[j]) for _, i, j in pairs]
    )
    middle = float(np.sort(cosines)[[1, 2]].mean())
    assert load(folder, middle).relation([""], answers)(pairs).tolist() == (cosines >= middle).tolist()


def test_a_text_beyond_the_encoder_is_counted(minilm):
    equivalence = load(minilm, 0.8)
    equivalence.relation(["q"], [["word " * 400, "word"]])
    assert equivalence.truncated == 1

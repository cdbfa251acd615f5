"""Answers that mean the same because each entails the other (Kuhn et al. 2023, Sec. 3.2; Farquhar et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from stitch_ray.engines.hf_inputs import batches
from stitch_ray.engines.pretrained import context_length, default_batch_tokens, first_line
from stitch_ray.reliability.signals.equivalence import Pair, Relation, cannot_load

TextPair = tuple[str, str]


class EntailmentEquivalence:
    """Entailment is the likeliest label in both directions, each answer read behind its question.

    `encoder` is a sequence classification model with a label "entailment". Raises UserError for any other.
    Where question and answers are too long together, the answers alone are compared, by their beginnings if need be.
    """

    def __init__(self, encoder: str, *, batch_tokens: int | None = None, device: str | None = None) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(encoder)
            model = AutoModelForSequenceClassification.from_pretrained(encoder, use_safetensors=True)
        except (OSError, ValueError, KeyError) as error:
            raise cannot_load(encoder, f"is no classifier that can be loaded ({first_line(error)})") from error
        labels = {index: label.lower() for index, label in model.config.id2label.items()}
        entailment = [index for index, label in labels.items() if label in ("entailment", "entail", "entails")]
        if len(entailment) != 1:
            raise cannot_load(
                encoder, f"has the labels {', '.join(labels.values())}, and an NLI model has one named entailment"
            )
        if self._tokenizer.pad_token is None:
            raise cannot_load(encoder, "its tokenizer has no padding token")
        self._entailment = entailment[0]
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._model: Any = model.to(where).eval()
        self._batch_tokens = batch_tokens or default_batch_tokens(where.type)
        self._longest = min(self._tokenizer.model_max_length, _positions(model))
        self.truncated = 0

    def relation(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> Relation:
        """One stream of pairs a direction, over all questions; the second direction only where the first entails."""

        def same(pairs: Sequence[Pair]) -> NDArray[np.bool_]:
            found = self._entails(questions, [(q, answers[q][i], answers[q][j]) for q, i, j in pairs])
            open_ones = np.flatnonzero(found)
            back = [(q, answers[q][j], answers[q][i]) for q, i, j in (pairs[k] for k in open_ones)]
            found[open_ones] = self._entails(questions, back)
            return found

        return same

    def _entails(self, questions: Sequence[str], asked: Sequence[tuple[int, str, str]]) -> NDArray[np.bool_]:
        """Whether the first answer entails the second, (asked,)."""
        found = np.zeros(len(asked), np.bool_)
        if not asked:
            return found
        inputs = self._encoded(questions, asked)
        with torch.inference_mode():
            for indices in batches([len(one["input_ids"]) for one in inputs], self._batch_tokens):
                batch = self._tokenizer.pad([inputs[i] for i in indices], return_tensors="pt").to(self._model.device)
                logits = self._model(**batch).logits.float()
                if logits.isnan().any():
                    raise RuntimeError("the NLI model computes NaN; load it in float32")
                found[indices] = (logits.argmax(-1) == self._entailment).cpu().numpy()
        return found

    def _encoded(self, questions: Sequence[str], asked: Sequence[tuple[int, str, str]]) -> list[dict[str, list[int]]]:
        whole = self._pairs([(f"{questions[q]} {a}", f"{questions[q]} {b}") for q, a, b in asked])
        long = [k for k, one in enumerate(whole) if len(one["input_ids"]) > self._longest]
        if long:
            self.truncated += len(long)
            alone = self._pairs([asked[k][1:] for k in long], truncation="longest_first", max_length=self._longest)
            for k, one in zip(long, alone, strict=True):
                whole[k] = one
        return whole

    def _pairs(self, pairs: Sequence[TextPair], **truncation: Any) -> list[dict[str, list[int]]]:
        columns = self._tokenizer([a for a, _ in pairs], [b for _, b in pairs], verbose=False, **truncation)
        return [{name: values[k] for name, values in columns.items()} for k in range(len(pairs))]


def _positions(model: Any) -> int:
    """Longest input: RoBERTa and its kin number positions from the padding id on and lose as many of them."""
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding = getattr(embeddings, "padding_idx", None)
    return context_length(model.config) - (0 if padding is None else padding + 1)

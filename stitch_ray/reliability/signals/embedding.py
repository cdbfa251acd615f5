"""Answers that mean the same because their sentence embeddings are close."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stitch_ray.reliability.signals.equivalence import Pair, Relation, cannot_load


class EmbeddingEquivalence:
    """Cosine of the answers' embeddings at least `min_cosine`. The question is left out: it would bring all close.

    `encoder` is a SentenceTransformer, or any encoder of Hugging Face, whose last hidden state is then averaged.
    Raises UserError if it cannot be loaded. A text longer than the encoder takes is compared by its beginning.
    """

    def __init__(self, encoder: str, *, min_cosine: float = 0.85, device: str | None = None) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise cannot_load(encoder, "needs sentence-transformers; pip install stitch-ray[diverse]") from error
        try:
            self._model = SentenceTransformer(encoder, device=device, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise cannot_load(encoder, f"is no encoder that can be loaded ({error})") from error
        self._min_cosine = min_cosine
        self.truncated = 0

    def relation(self, questions: Sequence[str], answers: Sequence[Sequence[str]]) -> Relation:
        """Embeds every distinct answer of all questions once, sorted by length."""
        texts = list(dict.fromkeys(text for own in answers for text in own))
        place = {text: i for i, text in enumerate(texts)}
        vectors = self._embed(texts)

        def same(pairs: Sequence[Pair]) -> NDArray[np.bool_]:
            first = [place[answers[q][i]] for q, i, _ in pairs]
            second = [place[answers[q][j]] for q, _, j in pairs]
            cosines = np.einsum("ij,ij->i", vectors[first], vectors[second])
            return np.asarray(cosines >= self._min_cosine, np.bool_)

        return same

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit-length, (texts, width)."""
        if not texts:
            return np.empty((0, 0), np.float32)
        lengths = [len(ids) for ids in self._model.tokenizer(list(texts), verbose=False)["input_ids"]]
        longest = self._model.max_seq_length
        self.truncated += sum(length > longest for length in lengths) if longest else 0
        vectors = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, np.float32)

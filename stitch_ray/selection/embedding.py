"""Sentence embeddings for diverse selection, by sentence-transformers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stitch_ray.errors import UserError


class TextEmbedder:
    """Unit-length embeddings of texts. Raises UserError if `encoder` is no SentenceTransformer."""

    def __init__(self, encoder: str) -> None:
        from sentence_transformers import SentenceTransformer

        try:
            self._model = SentenceTransformer(encoder)
        except (OSError, ValueError) as error:
            raise UserError(f"select.diversity.encoder: {encoder} cannot be loaded: {error}") from error

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """texts -> (texts, width)."""
        vectors = self._model.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float32)

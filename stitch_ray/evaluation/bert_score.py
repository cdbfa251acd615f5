"""BERTScore: greedy matching of contextual token embeddings (Zhang et al. 2020, Eqs. 1-3), with any encoder."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel

from stitch_ray.engines.pretrained import context_length, first_line, load_tokenizer
from stitch_ray.errors import UserError

_PAIRS_AT_ONCE = 2048  # bounds the token embeddings held


def bert_score(
    predictions: Sequence[str],
    references: Sequence[str],
    encoder: str,
    *,
    layer: int | None = None,
    batch_tokens: int = 8192,
    num_threads: int | None = None,
    device: str | None = None,
) -> NDArray[np.float64]:
    """(n, 3): precision, recall and F of every prediction against its reference; see `BertScorer`."""
    scorer = BertScorer(encoder, layer=layer, batch_tokens=batch_tokens, num_threads=num_threads, device=device)
    return scorer.score(predictions, references)


class BertScorer:
    """An encoder that scores pairs of texts.

    layer: which hidden states are compared, 0 the embeddings; None: the last. `batch_tokens`: tokens, padding
    included, of one forward. No idf weights and no rescaling. As in the authors' package, special tokens such as [CLS]
    may be matched, and are not averaged over; a text that is too long for the encoder is cut at its end.

    Raises UserError for an encoder that cannot be loaded or has no such layer.
    """

    def __init__(
        self,
        encoder: str,
        *,
        layer: int | None = None,
        batch_tokens: int = 8192,
        num_threads: int | None = None,
        device: str | None = None,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._tokenizer = load_tokenizer(encoder)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        try:
            model = AutoModel.from_pretrained(encoder, use_safetensors=True, dtype=torch.float32)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"labels.encoder: {encoder}: cannot be loaded ({first_line(error)})") from error
        self._model = (model.encoder if model.config.is_encoder_decoder else model).to(self._device).eval()
        layers = model.config.get_text_config().num_hidden_layers
        if layer is not None and not 0 <= layer <= layers:
            raise UserError(f"layer: {encoder} has layers 0 to {layers}, not {layer}")
        self._layer = layer
        self._batch_tokens = batch_tokens
        self._max_tokens = min(_max_positions(model.config), self._tokenizer.model_max_length)

    def score(self, predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
        """(n, 3): precision, recall and F, at most 1. A blank text scores 0, two of them 1."""
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions and {len(references)} references")
        pairs = [(ours.strip(), theirs.strip()) for ours, theirs in zip(predictions, references, strict=True)]
        scores = np.empty((len(pairs), 3))
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            some = pairs[start : start + _PAIRS_AT_ONCE]
            texts = self._embed(sorted({text for pair in some for text in pair if text}))
            for row, (ours, theirs) in enumerate(some, start):
                blank = not ours or not theirs
                scores[row] = float(ours == theirs) if blank else _match(*texts[ours], *texts[theirs])
        return scores

    def _embed(self, texts: Sequence[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Text -> unit-length token embeddings (tokens, width) and which tokens are not special (tokens,)."""
        encoded = [
            self._tokenizer(text, truncation=True, max_length=self._max_tokens, return_special_tokens_mask=True)
            for text in texts
        ]
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        for batch in _batches([len(one["input_ids"]) for one in encoded], self._batch_tokens):
            longest = max(len(encoded[index]["input_ids"]) for index in batch)
            ids = torch.zeros(len(batch), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            if self._tokenizer.pad_token_id is not None:
                ids.fill_(self._tokenizer.pad_token_id)  # RoBERTa's positions are counted from the padding id
            for row, index in enumerate(batch):
                own = torch.tensor(encoded[index]["input_ids"])
                ids[row, : len(own)], mask[row, : len(own)] = own, 1
            with torch.inference_mode():
                out = self._model(
                    input_ids=ids.to(self._device),
                    attention_mask=mask.to(self._device),
                    output_hidden_states=self._layer is not None,
                )
            hidden = out.last_hidden_state if self._layer is None else out.hidden_states[self._layer]
            hidden = torch.nn.functional.normalize(hidden.float(), dim=-1).cpu()
            for row, index in enumerate(batch):
                special = torch.tensor(encoded[index]["special_tokens_mask"], dtype=torch.bool)
                found[texts[index]] = hidden[row, : len(special)].clone(), ~special
        return found


def _match(
    ours: torch.Tensor, our_words: torch.Tensor, theirs: torch.Tensor, their_words: torch.Tensor
) -> tuple[float, float, float]:
    """Eqs. 1-3. Texts that the tokenizer turns into no token at all share nothing."""
    if not our_words.any() or not their_words.any():
        return 0.0, 0.0, 0.0
    similarity = ours @ theirs.T
    precision = min(1.0, float(similarity.amax(1)[our_words].mean()))  # rounding may exceed 1
    recall = min(1.0, float(similarity.amax(0)[their_words].mean()))
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0


def _batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in batches of like lengths whose padded size is at most `budget`, or of one index."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: (lengths[index], index)):
        if batches and lengths[index] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _max_positions(config: object) -> int:
    """RoBERTa and its kin lose the positions up to the padding id."""
    reserved = (getattr(config, "pad_token_id", None) or 0) + 1
    roberta = getattr(config, "model_type", "") in ("roberta", "xlm-roberta", "camembert", "longformer")
    return context_length(config) - (reserved if roberta else 0)

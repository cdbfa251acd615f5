"""The scorer's encoder at work: answers in, one number an answer out."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification
from transformers.utils.logging import disable_progress_bar

from stitch_ray.engines.hf import attend_as_defined
from stitch_ray.engines.pretrained import context_length, default_batch_tokens, first_line, load_tokenizer
from stitch_ray.errors import UserError
from stitch_ray.reliability.scorer.encoder import as_score, encoder_fingerprint, loss_of
from stitch_ray.reliability.scorer.inputs import InputTooLong, PairIds, ScoreInput, encode_pairs

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class EncoderScores:
    """What the encoder said to n answers. `logits`: (n,), NaN where it said nothing; `reasons`: row -> why.

    `tokens` were read in `forwards` passes; answers whose ids are the same are read once.
    """

    logits: Floats
    reasons: Mapping[int, str]
    tokens: int
    forwards: int


class SequenceClassificationScorer:
    """A Hugging Face sequence classifier with one output, as `train-scorer` writes it to `model/`.

    `batch_tokens`: tokens of one forward, padding included; default: what suits the device. `max_length`: longest input; default: what the model takes.
    On CPU, `num_threads` fixes torch's threads. Scores depend on the other answers of a call by rounding alone (1e-6 was
    seen), and not on their order: on one machine the same set of answers gives the same bits.

    Raises UserError for a folder that holds no such model.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        batch_tokens: int | None = None,
        max_length: int | None = None,
        num_threads: int | None = None,
        device: str | None = None,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_tokens = batch_tokens or default_batch_tokens(self.device.type)
        self.loss = loss_of(folder)
        self._model = _load(folder).to(self.device).eval()
        self._tokenizer = load_tokenizer(str(folder))
        self._pad_id = _padding(self._model, folder)
        self._segments = _tells_segments(self._model)
        longest = longest_input(self._model)
        self.max_length = max_length or longest
        if self.max_length > longest:
            raise UserError(f"max_length: {self.max_length} exceeds the {longest} tokens that {folder} takes")
        self.fingerprint = encoder_fingerprint(folder, self.loss, self.max_length)

    def score(self, inputs: Sequence[ScoreInput]) -> Floats:
        """(n,): with loss bce the sigmoid of the logit, with mse the logit. NaN where an input is too long."""
        return as_score(self.read(inputs).logits, self.loss)

    def read(self, inputs: Sequence[ScoreInput]) -> EncoderScores:
        """The logits, and what reading took."""
        pairs = encode_pairs(self._tokenizer, inputs, self.max_length)
        rows: dict[PairIds, list[int]] = {}
        reasons: dict[int, str] = {}
        for row, pair in enumerate(pairs):
            if isinstance(pair, InputTooLong):
                reasons[row] = str(pair)
            else:
                rows.setdefault(pair, []).append(row)
        logits = np.full(len(inputs), np.nan)
        forwards = 0
        for batch in batches(sorted(rows, key=lambda pair: (len(pair.ids), pair.ids, pair.second)), self.batch_tokens):
            forwards += 1
            for pair, logit in zip(batch, self._forward(batch), strict=True):
                logits[rows[pair]] = logit if np.isfinite(logit) else np.nan
                if not np.isfinite(logit):
                    reasons |= dict.fromkeys(rows[pair], f"the encoder gave {logit}")
        return EncoderScores(logits, reasons, sum(len(pair.ids) for pair in rows), forwards)

    @torch.inference_mode()
    def _forward(self, batch: Sequence[PairIds]) -> Floats:
        width = max(len(pair.ids) for pair in batch)
        ids = np.full((len(batch), width), self._pad_id, np.int64)
        mask, types = np.zeros_like(ids), np.zeros_like(ids)
        for row, pair in enumerate(batch):
            length = len(pair.ids)
            ids[row, :length] = pair.ids
            mask[row, :length] = 1
            types[row, pair.second : length] = 1
        arrays = {"input_ids": ids, "attention_mask": mask}
        if self._segments:
            arrays["token_type_ids"] = types
        tensors = {name: torch.from_numpy(values).to(self.device) for name, values in arrays.items()}
        logits: Floats = self._model(**tensors).logits[:, 0].double().cpu().numpy()
        return logits


def batches(pairs: Sequence[PairIds], batch_tokens: int) -> Iterator[Sequence[PairIds]]:
    """Cut `pairs`, sorted by length, where a padded batch would exceed `batch_tokens`. One alone may exceed it."""
    start = 0
    for stop in range(1, len(pairs) + 1):
        if stop == len(pairs) or len(pairs[stop].ids) * (stop + 1 - start) > batch_tokens:
            yield pairs[start:stop]
            start = stop


def longest_input(model: Any) -> int:
    """Tokens that the model takes. RoBERTa and its kin count positions from behind the padding id."""
    longest = context_length(model.config)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            longest = min(longest, module.num_embeddings - offset)
    return longest


def _load(folder: str | Path) -> Any:
    disable_progress_bar()
    try:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            str(folder), use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: cannot be loaded as a classifier ({first_line(error)})") from error
    if found["missing_keys"] or model.config.num_labels != 1:
        missing = sorted(found["missing_keys"])[:3]
        lacking = f"it lacks {', '.join(missing)}" if missing else f"it has {model.config.num_labels} outputs"
        raise UserError(f"{folder}: expected a classifier with one output, and {lacking}; train it with train-scorer")
    attend_as_defined(model)
    return model


def _tells_segments(model: Any) -> bool:
    takes = "token_type_ids" in inspect.signature(model.forward).parameters
    return takes and getattr(model.config, "type_vocab_size", 0) > 1


def _padding(model: Any, folder: str | Path) -> int:
    pad_id = model.config.get_text_config().pad_token_id
    if pad_id is None:
        raise UserError(f"{folder}: config.json has no pad_token_id, which batches need")
    return int(pad_id)

"""The Transformers engine: any Hugging Face causal language model, on CPU or one GPU."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from stitch_ray.engines import hf_text
from stitch_ray.engines.base import EngineError, EngineInfo, Generation, RatingBatch, Request
from stitch_ray.engines.fingerprint import model_fingerprint
from stitch_ray.engines.pretrained import context_length, default_batch_tokens, first_line, load_tokenizer
from stitch_ray.engines.rating import CachedRater, DocumentRater, PlainRater
from stitch_ray.errors import UserError

log = logging.getLogger(__name__)

_METHODS = frozenset({"rate", "generate", "loglikelihood", "embed"})
_CHECK_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1.5e-1}
"""Largest difference of log-probabilities over the ratings that the start-up check lets a faster path show."""


class HfEngine:
    """Loads `path` and rates, generates, scores continuations and embeds.

    Rating takes the fastest of the three ways in `rating.py` that, on a small check made at start-up, agrees with the
    plain one; `rating_path` tells which. On CPU, `num_threads` fixes torch's threads so that results do not depend on
    the machine. Raises UserError for a path that holds no usable model.
    """

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        num_threads: int | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_tokens = batch_tokens or default_batch_tokens(self.device.type)
        self._tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        self._model = _load_model(path, dtype, trust_remote_code).to(self.device).eval()
        context = context_length(self._model.config)
        self.info = EngineInfo(
            model=name or Path(path).name,
            fingerprint=model_fingerprint(path),
            dtype=str(self._model.dtype).removeprefix("torch."),
            max_context=min(max_tokens or context, context),
            num_parameters=sum(parameter.numel() for parameter in self._model.parameters()),
            methods=_METHODS,
        )
        self.rating_path = "plain"
        self._rater: PlainRater | CachedRater | DocumentRater | None = None

    def rate(self, batch: RatingBatch) -> NDArray[np.float32]:
        """Logits of the rating tokens, shape (bodies, prompts, ratings). A NaN in one body stays in that body."""
        longest = max((len(body) for body in batch.bodies), default=0)
        sides = max(len(batch.head(k)) + len(batch.tail(k)) for k in range(batch.num_prompts))
        if longest + sides > self.info.max_context:
            raise ValueError(f"a sequence of {longest + sides} tokens exceeds the context of {self.info.max_context}")
        if self._rater is None:
            self._rater = self._fastest_rater(len(batch.rating_ids))
        return self._rater.rate(batch)

    def generate(self, requests: Sequence[Request]) -> list[list[Generation] | EngineError]:
        return hf_text.generate(
            self._model,
            self._tokenizer,
            requests,
            token_budget=4 * self.batch_tokens,
            max_context=self.info.max_context,
        )

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool] | EngineError]:
        return hf_text.loglikelihood(
            self._model,
            self._tokenizer,
            requests,
            token_budget=4 * self.batch_tokens,
            max_context=self.info.max_context,
        )

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return hf_text.embed(
            self._model, self._tokenizer, texts, token_budget=4 * self.batch_tokens, max_context=self.info.max_context
        )

    def close(self) -> None:
        """Free the weights."""
        self._rater = None
        self._model = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _fastest_rater(self, num_ratings: int) -> PlainRater | CachedRater | DocumentRater:
        plain = PlainRater(self._model)
        for name, make in (("documents", DocumentRater), ("cached", CachedRater)):
            try:
                rater: CachedRater | DocumentRater = make(self._model, self.batch_tokens)
                difference = self._disagreement(rater, plain, num_ratings)
            except Exception as error:  # any model-specific failure means: not this way
                log.warning(
                    "%s: rating path %s does not run (%s: %s)", self.info.model, name, type(error).__name__, error
                )
                continue
            if difference <= _CHECK_TOLERANCE.get(self._model.dtype, 1e-4):
                log.info("%s: rating path %s, check %.1e", self.info.model, name, difference)
                self.rating_path = name
                return rater
            log.warning("%s: rating path %s is off by %.1e, not used", self.info.model, name, difference)
        log.warning("%s: rated one sequence at a time", self.info.model)
        return plain

    def _disagreement(self, rater: CachedRater | DocumentRater, plain: PlainRater, num_ratings: int) -> float:
        """Largest difference to the plain path in both layouts, on short made-up sequences."""
        generator = torch.Generator().manual_seed(0)
        top = min(self._model.get_output_embeddings().weight.shape[0], len(self._tokenizer))

        def ids(length: int) -> tuple[int, ...]:
            return tuple(torch.randint(0, top, (length,), generator=generator).tolist())

        rating_ids = ids(num_ratings)
        bodies, sides = (ids(9), ids(23), ids(14)), (ids(7), ids(4))
        worst = 0.0
        for heads, tails in ((sides, (ids(3),)), (((),), sides)):
            batch = RatingBatch(heads=heads, bodies=bodies, tails=tails, rating_ids=rating_ids)
            worst = max(worst, float(np.abs(_log_softmax(rater.rate(batch)) - _log_softmax(plain.rate(batch))).max()))
        return worst if np.isfinite(worst) else float("inf")


def _load_model(path: str, dtype: str, trust_remote_code: bool) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"models: {path}: cannot be loaded ({first_line(error)})") from error


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    z = logits.astype(np.float64)
    z -= z.max(axis=-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))

"""The Transformers engine: any Hugging Face causal language model, on CPU or one GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from stitch_ray.engines import hf_text
from stitch_ray.engines.base import EngineError, EngineInfo, Generation, RatingBatch, Request
from stitch_ray.engines.fingerprint import model_fingerprint
from stitch_ray.engines.pretrained import context_length, default_batch_tokens, first_line, load_tokenizer
from stitch_ray.engines.rating import PlainRater, Rater, fastest_rater, plain_beyond
from stitch_ray.errors import UserError

_METHODS = frozenset({"rate", "generate", "loglikelihood", "embed"})


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
        self._rater: Rater | None = None
        self._plain_beyond = plain_beyond(self._model)

    def rate(self, batch: RatingBatch) -> NDArray[np.float32]:
        """Logits of the rating tokens, shape (bodies, prompts, ratings). A NaN in one body stays in that body."""
        longest = max((len(body) for body in batch.bodies), default=0)
        sides = max(len(batch.head(k)) + len(batch.tail(k)) for k in range(batch.num_prompts))
        if longest + sides > self.info.max_context:
            raise ValueError(f"a sequence of {longest + sides} tokens exceeds the context of {self.info.max_context}")
        if self._rater is None:
            self.rating_path, self._rater = fastest_rater(self._model, self.batch_tokens, len(batch.rating_ids))
        if longest + sides > self._plain_beyond:
            return PlainRater(self._model).rate(batch)
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


def _load_model(path: str, dtype: str, trust_remote_code: bool) -> Any:
    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"models: {path}: cannot be loaded ({first_line(error)})") from error
    attend_as_defined(model)
    return model


def attend_as_defined(model: Any) -> None:
    """Keep Gemma 2's soft-capping of attention scores: "sdpa", the default, drops it (transformers issue 32877)."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")

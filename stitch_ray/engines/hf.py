"""The Transformers engine: any Hugging Face causal language model, on CPU or one GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from stitch_ray.engines import hf_statistics, hf_text
from stitch_ray.engines.base import EngineError, EngineInfo, Generation, RatingBatch, Request, TokenStatistics
from stitch_ray.engines.fingerprint import model_fingerprint
from stitch_ray.engines.hf_adapters import (
    adapter_base,
    attach_adapters,
    detach_adapter,
    is_adapter,
    tokenizer_path,
)
from stitch_ray.engines.pretrained import context_length, default_batch_tokens, first_line, load_tokenizer
from stitch_ray.engines.rating import PlainRater, Rater, fastest_rater, plain_beyond
from stitch_ray.errors import UserError
from stitch_ray.records import content_hash

_METHODS = frozenset({"rate", "generate", "loglikelihood", "token_statistics", "embed"})

Answer = TypeVar("Answer")


class HfEngine:
    """Loads `path` and rates, generates, scores continuations and embeds.

    Rating takes the fastest of the three ways in `rating.py` that, on a small check made at start-up, agrees with the
    plain one; `rating_path` tells which. On CPU, `num_threads` fixes torch's threads: how many cores the machine has does
    not change the rounding then, though what processor it is may.

    `adapters`, name -> folder, are LoRA adapters of the model at `path`; `Request.adapter` names the one that answers,
    None the model alone, as do `rate` and `embed`. Where `path` itself is an adapter's folder, its base model is loaded
    and the adapter is part of the model, for everything. Raises UserError for a path that holds no usable model, and
    for an adapter that does not fit. `load_adapter` and `unload_adapter` change the adapters later: `info.adapters` tells
    those that are there, while `info.fingerprint` stays that of what the engine was made with.
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
        adapters: Mapping[str, str] | None = None,
    ) -> None:
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_tokens = batch_tokens or default_batch_tokens(self.device.type)
        own = is_adapter(path)
        if own and adapters:
            raise UserError(f"adapters: {path} is an adapter itself; name its base model as path, and all as adapters")
        base = adapter_base(path) if own else path
        self._tokenizer = load_tokenizer(tokenizer_path(path, base), trust_remote_code=trust_remote_code)
        self._model = load_model(base, dtype, trust_remote_code=trust_remote_code).to(self.device).eval()
        num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        fingerprint = model_fingerprint(path)
        if own:
            attach_adapters(self._model, {"default": path}, base)
            fingerprint = content_hash([fingerprint, model_fingerprint(base)])
        self._base = None if own else base
        # PEFT changes the layers in place, so that `self._model` stays the plain Transformers model to everyone
        self._adapters = attach_adapters(self._model, adapters, base) if adapters else None
        if adapters:
            fingerprint = content_hash([fingerprint, {one: model_fingerprint(at) for one, at in adapters.items()}])
        context = context_length(self._model.config)
        self.info = EngineInfo(
            model=name or Path(path).name,
            fingerprint=fingerprint,
            dtype=str(self._model.dtype).removeprefix("torch."),
            max_context=min(max_tokens or context, context),
            num_parameters=num_parameters,
            methods=_METHODS,
            adapters=tuple(adapters or ()),
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
        with self._answering(None):
            if self._rater is None:
                self.rating_path, self._rater = fastest_rater(self._model, self.batch_tokens, len(batch.rating_ids))
            if longest + sides > self._plain_beyond:
                return PlainRater(self._model).rate(batch)
            return self._rater.rate(batch)

    def generate(self, requests: Sequence[Request]) -> list[list[Generation] | EngineError]:
        return self._generate(requests, None)

    def generate_unless(
        self, requests: Sequence[Request], cancelled: Callable[[int], bool]
    ) -> list[list[Generation] | EngineError]:
        return self._generate(requests, cancelled)

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool] | EngineError]:
        return self._by_adapter(
            requests, lambda some, _: hf_statistics.loglikelihood(self._model, self._tokenizer, some, **self._limits())
        )

    def token_statistics(self, requests: Sequence[Request]) -> list[TokenStatistics | EngineError]:
        return self._by_adapter(
            requests,
            lambda some, _: hf_statistics.token_statistics(self._model, self._tokenizer, some, **self._limits()),
        )

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with self._answering(None):
            return hf_text.embed(self._model, self._tokenizer, texts, **self._limits())

    def load_adapter(self, name: str, path: str) -> None:
        """Put one more LoRA adapter beside the others. Raises UserError, and leaves all as it was, if it does not fit."""
        if self._base is None:
            raise UserError(f"adapters: {self.info.model} is an adapter itself; load its base model to carry {name!r}")
        if name in self.info.adapters:
            raise UserError(f"adapters: {name!r} is loaded already; unload it first")
        self._adapters = attach_adapters(self._model, {name: path}, self._base, self._adapters)
        self._adapters_are((*self.info.adapters, name))

    def unload_adapter(self, name: str) -> None:
        """Free the weights of one adapter. Raises UserError if it is not there."""
        if name not in self.info.adapters:
            raise UserError(f"adapters: no {name!r} to unload; loaded: {', '.join(self.info.adapters) or 'none'}")
        self._adapters = detach_adapter(self._adapters, name)
        self._adapters_are(tuple(one for one in self.info.adapters if one != name))

    def close(self) -> None:
        """Free the weights."""
        self._rater = None
        self._model = None
        self._adapters = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _limits(self) -> dict[str, int]:
        return {"token_budget": 4 * self.batch_tokens, "max_context": self.info.max_context}

    def _adapters_are(self, names: tuple[str, ...]) -> None:
        self.info = replace(self.info, adapters=names)
        self._rater = None  # it was checked against layers that have just been replaced

    def _generate(
        self, requests: Sequence[Request], cancelled: Callable[[int], bool] | None
    ) -> list[list[Generation] | EngineError]:
        def answer(some: list[Request], slots: list[int]) -> list[list[Generation] | EngineError]:
            asked = None if cancelled is None else lambda index: cancelled(slots[index])
            return hf_text.generate(self._model, self._tokenizer, some, cancelled=asked, **self._limits())

        return self._by_adapter(requests, answer)

    def _by_adapter(
        self, requests: Sequence[Request], answer: Callable[[list[Request], list[int]], list[Answer | EngineError]]
    ) -> list[Answer | EngineError]:
        """Answers in the order of `requests`, one adapter after another. `answer` also gets the places of its share."""
        if not self.info.adapters:
            return answer(list(requests), list(range(len(requests))))
        answers: dict[int, Answer | EngineError] = {}
        slots: dict[str | None, list[int]] = {}
        for slot, request in enumerate(requests):
            if request.adapter is None or request.adapter in self.info.adapters:
                slots.setdefault(request.adapter, []).append(slot)
            else:
                known = ", ".join(self.info.adapters)
                answers[slot] = EngineError(request.request_id, f"no adapter {request.adapter!r}; known: {known}")
        for adapter, together in slots.items():
            with self._answering(adapter):
                some = answer([replace(requests[slot], adapter=None) for slot in together], together)
            answers.update(zip(together, some, strict=True))
        return [answers[slot] for slot in range(len(requests))]

    @contextmanager
    def _answering(self, adapter: str | None) -> Iterator[None]:
        """Inside, `adapter` is part of the model, or none of `adapters` is."""
        if self._adapters is None:
            yield
        elif adapter is None:
            with self._adapters.disable_adapter():
                yield
        else:
            self._adapters.set_adapter(adapter, inference_mode=True)
            yield


def load_model(path: str, dtype: str, *, trust_remote_code: bool = False, key: str = "models", **options: Any) -> Any:
    """The causal language model at `path`, weights from safetensors only; `options` go to `from_pretrained`.

    Raises UserError, beginning with `key`, if it cannot be loaded.
    """
    disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            **options,
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{key}: {path}: cannot be loaded ({first_line(error)})") from error
    attend_as_defined(model)
    return model


def attend_as_defined(model: Any) -> None:
    """Keep Gemma 2's soft-capping of attention scores: "sdpa", the default, drops it (transformers issue 32877)."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")

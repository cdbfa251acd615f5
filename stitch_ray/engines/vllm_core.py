"""vLLM's engine core: whole batches, or one step at a time."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jinja2 import TemplateError

from stitch_ray.engines.base import Ids

Refuse = Callable[[int, Exception], None]


class VllmCore:
    """What is run are (token ids, SamplingParams); the parameters must ask for log-probabilities, which tell a NaN.

    vLLM does not clear KV blocks between requests, and its CPU attention multiplies what an earlier request left in a
    block by weight 0, so that one NaN spreads to requests that share or inherit a block. Hence every NaN is to be
    computed again, alone, on a cleared cache: `run` does so, and whoever takes steps has `run_again`.
    """

    def __init__(self, llm: Any, name: str) -> None:
        self._llm = llm
        self._name = name

    def run(self, prompts: Sequence[tuple[Ids, Any]], refuse: Refuse) -> list[Any]:
        """One output for every prompt, in order; None for those that vLLM refused, which `refuse` is told."""
        outputs = self._run_together(prompts, refuse)
        suspects = [index for index, output in enumerate(outputs) if output is not None and has_nan(output)]
        if suspects:
            for index, output in zip(suspects, self.run_again([prompts[index] for index in suspects]), strict=True):
                outputs[index] = output
        return outputs

    def run_again(self, prompts: Iterable[tuple[Ids, Any]]) -> list[Any]:
        """Outputs of prompts that were computed before, none of which can see what another leaves behind."""
        outputs = []
        for prompt in prompts:
            self._clear_cache()
            outputs += self._run_together([prompt], raise_refused)
        self._clear_cache()
        return outputs

    def add(self, request_id: str, ids: Ids, params: Any) -> None:
        """Let a request, whose id no other one has, take part from the next step on. Raises one of `refusals`."""
        from vllm.inputs import tokens_input
        from vllm.sampling_params import RequestOutputKind

        params.output_kind = RequestOutputKind.FINAL_ONLY
        self._engine.add_request(request_id, tokens_input(list(ids)), params)

    def step(self) -> list[Any]:
        """The outputs that one step has finished."""
        return [output for output in self._engine.step() if output.finished]

    def abort(self, request_ids: Iterable[str]) -> None:
        self._engine.abort_request(list(request_ids))

    def close(self) -> None:
        """Free the model and its cache. May be called twice."""
        if self._llm is None:
            return
        llm, self._llm = self._llm, None
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()

    @property
    def _engine(self) -> Any:
        if self._llm is None:
            raise RuntimeError(f"engine {self._name} is closed")
        return self._llm.llm_engine

    def _clear_cache(self) -> None:
        self._llm.reset_prefix_cache()
        self._llm.collective_rpc(_zero_kv_cache)

    def _run_together(self, prompts: Sequence[tuple[Ids, Any]], refuse: Refuse) -> list[Any]:
        from vllm import TokensPrompt

        engine = self._engine
        outputs: list[Any] = [None] * len(prompts)
        running: list[int] = []
        started: list[str] = []
        refused = refusals()
        try:
            for index, (ids, params) in enumerate(prompts):
                try:
                    prompt = TokensPrompt(prompt_token_ids=list(ids))
                    started += self._llm.enqueue([prompt], params, use_tqdm=False)
                    running.append(index)
                except refused as error:
                    refuse(index, error)
            finished = self._llm.wait_for_completion(use_tqdm=False)  # in the order of enqueue
        except BaseException:
            # or the next call would run, and return, what this one left behind
            engine.abort_request(started, internal=True)
            raise
        for index, output in zip(running, finished, strict=True):
            outputs[index] = output
        return outputs


def has_nan(output: Any) -> bool:
    return any(math.isnan(completion.cumulative_logprob) for completion in output.outputs)


def _zero_kv_cache(worker: Any) -> None:
    """Runs in every vLLM worker. A layer's cache is a tensor, or several for state-space layers."""
    for cache in worker.model_runner.kv_caches:
        for tensor in cache if isinstance(cache, list | tuple) else (cache,):
            tensor.zero_()


def refusals() -> tuple[type[Exception], ...]:
    """What is raised for a request that cannot be served."""
    from vllm.exceptions import VLLMClientError

    return (ValueError, TemplateError, VLLMClientError)


def raise_refused(_index: int, error: Exception) -> None:
    raise ValueError(str(error)) from error

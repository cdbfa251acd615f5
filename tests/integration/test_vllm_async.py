"""Continuous batching under vLLM: what the synchronous engine answers, for requests that come and go."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jsonschema
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stitch_ray.engines.base import EngineError, Request, Sampling
from stitch_ray.engines.vllm_async import AsyncVllmEngine
from stitch_ray.engines.vllm_engine import VllmEngine
from tests.rounding import assert_same_greedy

pytestmark = [pytest.mark.vllm, pytest.mark.numeric]

SCHEMA = {
    "type": "object",
    "properties": {"agree": {"type": "boolean"}, "answer": {"enum": ["yes", "no", "unknown"]}},
    "required": ["agree", "answer"],
    "additionalProperties": False,
}
LONG = Sampling(max_tokens=150, temperature=1.0, seed=1, json_schema='{"type": "string", "minLength": 2000}')
TEXTS = ["What is the sum of two and two?", "Name a colour.", "Is water wet?", "A"]

T = TypeVar("T")


@pytest.fixture(scope="module")
def nan_token(tiny_model: Path) -> int:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return len(tokenizer) - 1


@pytest.fixture(scope="module")
def inner(tiny_model: Path, nan_token: int, tmp_path_factory: pytest.TempPathFactory) -> VllmEngine:
    """Of the tiny model, with NaN for the embedding of its last token."""
    folder = tmp_path_factory.mktemp("models") / "with_nan"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[nan_token] = float("nan")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    fast_start = {"enforce_eager": True, "kv_cache_memory_bytes": 64 * 2**20}
    return VllmEngine(str(folder), name="tiny", dtype="float32", engine_kwargs=fast_start)


@pytest.fixture(scope="module")
def engine(inner: VllmEngine) -> Iterator[AsyncVllmEngine]:
    engine = AsyncVllmEngine(inner)
    yield engine

    async def close() -> None:
        running = asyncio.create_task(engine.generate(ask("endless", LONG)))
        while not inner.core._engine.has_unfinished_requests():
            await asyncio.sleep(0.001)
        await engine.close()
        with pytest.raises(EngineError, match="is closed") as caught:
            await running
        assert caught.value.retryable
        with pytest.raises(EngineError, match="is closed"):
            await engine.generate(ask("late"))

    asyncio.run(close())
    with pytest.raises(RuntimeError, match="closed"):
        inner.generate([ask("late")])


@pytest.fixture
def steps(inner: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of outputs that every step of the engine finished."""
    seen: list[int] = []
    step = inner.core.step

    def counted() -> list[Any]:
        outputs = step()
        seen.append(len(outputs))
        return outputs

    monkeypatch.setattr(inner.core, "step", counted)
    return seen


def ask(prompt: Any, sampling: Sampling = Sampling(max_tokens=8), **more: Any) -> Request:
    return Request(request_id=f"id of {prompt}", prompt=prompt, sampling=sampling, **more)


def run(work: Callable[[], Awaitable[T]]) -> T:
    async def within() -> T:
        async with asyncio.timeout(300):
            return await work()

    return asyncio.run(within())


def test_answers_equal_those_of_the_synchronous_engine(engine: AsyncVllmEngine) -> None:
    greedy = [ask(text, Sampling(max_tokens=12, token_stats=True, num_samples=2)) for text in TEXTS]
    sampled = [ask(text, Sampling(max_tokens=12, temperature=1.0, seed=3, num_samples=3)) for text in TEXTS]

    async def work() -> tuple[Any, Any]:
        found = await asyncio.gather(*(engine.generate(request) for request in [*greedy, *sampled]))
        return found, await engine.call(lambda inner: inner.generate([*greedy, *sampled]))

    found, wanted = run(work)
    for some, others in zip(found[: len(greedy)], wanted, strict=False):
        for one, other in zip(some, others, strict=True):
            assert_same_greedy(one, other)
    for some, others in zip(found[len(greedy) :], wanted[len(greedy) :], strict=True):
        assert [(one.text, one.token_ids, one.finish_reason) for one in some] == [
            (one.text, one.token_ids, one.finish_reason) for one in others
        ]
    assert len(found[0]) == 2
    assert len({one.token_ids for one in found[-1]}) == 3


def test_continuations_are_scored_as_by_the_synchronous_engine(engine: AsyncVllmEngine) -> None:
    requests = [ask(text, continuation=" Yes it is") for text in TEXTS]

    async def work() -> Any:
        return (
            await asyncio.gather(*(engine.loglikelihood(request) for request in requests)),
            await asyncio.gather(*(engine.token_statistics(request) for request in requests)),
            await engine.call(lambda inner: (inner.loglikelihood(requests), inner.token_statistics(requests))),
        )

    totals, statistics, (wanted_totals, wanted_statistics) = run(work)
    np.testing.assert_allclose([t for t, _ in totals], [t for t, _ in wanted_totals], atol=1e-3)
    for found, wanted in zip(statistics, wanted_statistics, strict=True):
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-3)
        np.testing.assert_allclose(found.margins, wanted.margins, atol=1e-3)


def test_a_short_request_overtakes_a_long_one(engine: AsyncVllmEngine, steps: list[int]) -> None:
    async def work() -> int:
        long = asyncio.create_task(engine.generate(ask("long", LONG)))
        while not steps:
            await asyncio.sleep(0.001)
        await engine.generate(ask("short", Sampling(max_tokens=3)))
        assert not long.done()
        (answer,) = await long
        return len(answer.token_ids)

    assert run(work) == LONG.max_tokens


def test_a_cancelled_request_is_aborted(engine: AsyncVllmEngine, steps: list[int]) -> None:
    async def work() -> None:
        long = asyncio.create_task(engine.generate(ask("long", LONG)))
        several = asyncio.create_task(engine.generate(ask("several", Sampling(**settings))))
        while not steps:
            await asyncio.sleep(0.001)
        for task in (long, several):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        # a call waits until nothing runs
        assert await engine.call(lambda inner: inner.core._engine.get_num_unfinished_requests()) == 0

    settings: Any = {"max_tokens": 150, "temperature": 1.0, "num_samples": 2, "json_schema": LONG.json_schema}
    run(work)
    assert sum(steps) == 0


def test_json_of_a_schema_comes_in_one_piece_of_a_stream(engine: AsyncVllmEngine) -> None:
    sampling = Sampling(max_tokens=60, temperature=1.0, seed=5, json_schema=json.dumps(SCHEMA))

    async def work() -> list[str]:
        return [piece for text in TEXTS async for piece in engine.stream(ask(text, sampling))]

    pieces = run(work)
    assert len(pieces) == len(TEXTS)
    for piece in pieces:
        jsonschema.validate(json.loads(piece), SCHEMA)


def test_bad_requests_fail_alone(engine: AsyncVllmEngine, nan_token: int) -> None:
    bad = {
        "NaN": ask((5, nan_token)),
        "prompt tokens": ask(()),
        "no adapters": ask("x", adapter="blue"),
        "objekt": ask("x", Sampling(json_schema='{"type": "objekt"}')),
    }
    good = [ask(text) for text in TEXTS]

    async def work() -> Any:
        wanted = await engine.call(lambda inner: inner.generate(good))
        for _ in range(2):  # what NaN leaves in the cache reaches nobody
            found = await asyncio.gather(
                *(engine.generate(request) for request in [*bad.values(), *good]), return_exceptions=True
            )
            for reason, error in zip(bad, found, strict=False):
                assert isinstance(error, EngineError)
                assert reason in error.reason
                assert error.request_id == bad[reason].request_id
                assert not error.retryable
            assert [one[0].token_ids for one in found[len(bad) :]] == [one[0].token_ids for one in wanted]

    run(work)


def test_a_failing_step_fails_what_ran_and_the_engine_goes_on(
    engine: AsyncVllmEngine, inner: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        step = inner.core.step
        monkeypatch.setattr(inner.core, "step", lambda: 1 / 0)
        with pytest.raises(EngineError, match="ZeroDivisionError") as caught:
            await engine.generate(ask("A"))
        assert caught.value.retryable
        monkeypatch.setattr(inner.core, "step", step)
        (answer,) = await engine.generate(ask("A"))
        assert (await engine.call(lambda inner: inner.generate([ask("A")])))[0] == [answer]

    run(work)

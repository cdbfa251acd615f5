import asyncio
import threading

import pytest
import torch

from stitch_ray.engines.base import EngineError, EngineInfo, Generation, Request, Sampling, TokenStatistics
from stitch_ray.engines.batching import BatchingEngine, estimated_tokens
from stitch_ray.engines.hf import HfEngine
from stitch_ray.records import Turn
from tests.rounding import assert_same_greedy

pytestmark = pytest.mark.numeric

INFO = EngineInfo(
    model="scripted", fingerprint="f", dtype="float32", max_context=100, num_parameters=1, methods=frozenset()
)


class ScriptedEngine:
    """Answers a prompt with itself. A prompt of "block" holds the thread until `release` is set."""

    def __init__(self):
        self.info = INFO
        self.batches = []
        self.threads = set()
        self.entered = threading.Event()
        self.release = threading.Event()
        self.num_closed = 0

    def _answer(self, method, requests, answer):
        self.threads.add(threading.get_ident())
        self.batches.append((method, [request.prompt for request in requests]))
        if requests[0].prompt == "block":
            self.entered.set()
            assert self.release.wait(10)
        if any(request.prompt == "crash" for request in requests):
            raise RuntimeError("device lost")
        return [
            EngineError(request.request_id, "refused") if request.prompt == "bad" else answer(request)
            for request in requests
        ]

    def generate(self, requests):
        return self._answer("generate", requests, lambda request: [reply(request.prompt)])

    def loglikelihood(self, requests):
        return self._answer("loglikelihood", requests, lambda request: (-1.0, True))

    def token_statistics(self, requests):
        statistics = TokenStatistics(logprobs=(-1.0,), entropies=None, margins=(0.5,))
        return self._answer("token_statistics", requests, lambda request: statistics)

    def close(self):
        self.threads.add(threading.get_ident())
        self.num_closed += 1


def reply(text):
    return Generation(text=text, token_ids=(), finish_reason="stop", prompt_tokens=1)


def ask(prompt, **more):
    return Request(request_id=f"id-{prompt}", prompt=prompt, **more)


class Blocked:
    """A batching engine whose thread is held by a first request, so that what follows waits together."""

    def __init__(self, **options):
        self.inner = ScriptedEngine()
        self.engine = BatchingEngine(self.inner, **options)

    async def __aenter__(self):
        self.first = asyncio.create_task(self.engine.generate(ask("block")))
        await asyncio.to_thread(self.inner.entered.wait, 10)
        return self

    async def __aexit__(self, *_):
        self.inner.release.set()
        await self.engine.close()

    async def waiting(self, *coroutines):
        """Tasks of `coroutines`, all in the queue."""
        before = self.engine.waiting
        tasks = [asyncio.create_task(one) for one in coroutines]
        while self.engine.waiting < before + len(tasks):
            await asyncio.sleep(0)
        return tasks


def test_what_waits_together_is_answered_together_in_order_and_nothing_waits_to_fill():
    async def run():
        async with Blocked(max_batch=3) as blocked:
            tasks = await blocked.waiting(*(blocked.engine.generate(ask(str(i))) for i in range(5)))
            assert blocked.engine.waiting == 5
            blocked.inner.release.set()
            answers = [(await task)[0].text for task in tasks]
            assert blocked.engine.waiting == 0
        return blocked.inner, answers

    inner, answers = asyncio.run(run())
    assert answers == ["0", "1", "2", "3", "4"]
    assert [prompts for _, prompts in inner.batches] == [["block"], ["0", "1", "2"], ["3", "4"]]
    assert threading.get_ident() not in inner.threads
    assert len(inner.threads) == 1


def test_batches_are_of_one_method_and_adapter_and_the_oldest_goes_first():
    async def run():
        async with Blocked() as blocked:
            engine = blocked.engine
            tasks = await blocked.waiting(
                engine.loglikelihood(ask("a", continuation="x")),
                engine.generate(ask("b")),
                engine.token_statistics(ask("c", continuation="x")),
                engine.loglikelihood(ask("d", continuation="x")),
                engine.generate(ask("e", adapter="blue")),
                engine.generate(ask("f")),
            )
            blocked.inner.release.set()
            return blocked.inner.batches, await asyncio.gather(*tasks)

    batches, answers = asyncio.run(run())
    assert batches[1:] == [
        ("loglikelihood", ["a", "d"]),
        ("generate", ["b", "f"]),
        ("token_statistics", ["c"]),
        ("generate", ["e"]),
    ]
    assert answers[0] == (-1.0, True)
    assert answers[2].margins == (0.5,)


def test_a_batch_keeps_to_its_tokens_and_takes_a_larger_request_alone():
    async def run():
        small = Sampling(max_tokens=10)
        async with Blocked(batch_tokens=30) as blocked:
            tasks = await blocked.waiting(
                *(blocked.engine.generate(ask(p, sampling=small)) for p in ("a", "b", "large" * 100, "c"))
            )
            blocked.inner.release.set()
            await asyncio.gather(*tasks)
            return [[prompt[0] for prompt in prompts] for _, prompts in blocked.inner.batches[1:]]

    assert asyncio.run(run()) == [["a", "b"], ["l"], ["c"]]


def test_tokens_are_estimated_from_prompt_samples_and_continuation():
    hot = Sampling(max_tokens=10, temperature=1.0, num_samples=3)
    assert estimated_tokens(ask((1, 2, 3), sampling=hot)) == 3 * (3 + 10)
    assert estimated_tokens(ask((1, 2, 3), sampling=Sampling(max_tokens=10, num_samples=3))) == 13
    assert estimated_tokens(ask((1, 2, 3), continuation=(4, 5)), "loglikelihood") == 5
    assert estimated_tokens(ask((Turn("user", "x" * 300),), sampling=hot)) > 300


def test_a_cancelled_request_leaves_the_queue_and_the_others_stay():
    async def run():
        async with Blocked() as blocked:
            first, second = await blocked.waiting(blocked.engine.generate(ask("a")), blocked.engine.generate(ask("b")))
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert blocked.engine.waiting == 1
            blocked.first.cancel()  # its result comes later, for nobody
            blocked.inner.release.set()
            assert (await second)[0].text == "b"
            return blocked.inner.batches

    assert asyncio.run(run())[1:] == [("generate", ["b"])]


def test_a_refused_request_fails_alone_and_a_failing_engine_fails_its_batch_and_lives_on():
    async def run():
        async with Blocked(max_batch=2) as blocked:
            engine = blocked.engine
            tasks = await blocked.waiting(*(engine.generate(ask(p)) for p in ("bad", "good", "crash", "beside")))
            blocked.inner.release.set()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            return [*results, (await engine.generate(ask("after")))[0]]

    bad, good, crash, beside, after = asyncio.run(run())
    assert (bad.request_id, bad.reason, bad.retryable) == ("id-bad", "refused", False)
    assert good[0].text == "good"
    for name, error in (("id-crash", crash), ("id-beside", beside)):
        assert (error.request_id, error.retryable) == (name, True)
        assert error.reason == "the engine failed: RuntimeError: device lost"
    assert after.text == "after"


def test_a_call_runs_alone_in_the_thread_of_the_engine_and_raises_what_it_raises():
    def fail(_):
        raise KeyError("mine")

    async def run():
        async with Blocked() as blocked:
            tasks = await blocked.waiting(
                blocked.engine.call(lambda engine: (engine, threading.get_ident())),
                blocked.engine.call(fail),
                blocked.engine.call(lambda _: EngineError("x", "a value like any other")),
            )
            blocked.inner.release.set()
            (engine, thread), error, value = await asyncio.gather(*tasks, return_exceptions=True)
            assert engine is blocked.inner
            assert {thread} == blocked.inner.threads
            assert isinstance(error, KeyError)
            assert value.reason == "a value like any other"

    asyncio.run(run())


def test_closing_fails_what_waits_closes_the_engine_in_its_thread_and_refuses_what_comes():
    async def run():
        blocked = Blocked()
        async with blocked:
            tasks = await blocked.waiting(blocked.engine.generate(ask("a")), blocked.engine.call(str))
            closing = asyncio.create_task(blocked.engine.close())
            await asyncio.sleep(0)
            blocked.inner.release.set()
            await closing
            for error in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(error, EngineError)
                assert (error.reason, error.retryable) == ("the engine is closed", True)
            assert (await blocked.first)[0].text == "block"
            with pytest.raises(EngineError, match="is closed"):
                await blocked.engine.generate(ask("late"))
        assert blocked.inner.num_closed == 1
        assert len(blocked.inner.threads) == 1

    asyncio.run(run())


def test_a_stream_is_the_whole_answer():
    async def run():
        engine = BatchingEngine(ScriptedEngine())
        pieces = [piece async for piece in engine.stream(ask("hello"))]
        with pytest.raises(EngineError, match="one answer"):
            await anext(engine.stream(ask("hello", sampling=Sampling(num_samples=2))))
        await engine.close()
        return pieces

    assert asyncio.run(run()) == ["hello"]


@pytest.mark.parametrize("how", ["cancelled", "closed"])
def test_an_engine_that_can_be_interrupted_is(how):
    """It begins an answer without end."""

    class Interruptible(ScriptedEngine):
        def generate_unless(self, requests, cancelled):
            self.entered.set()
            while not cancelled(0):
                assert not self.release.wait(0.001)
            return [EngineError(request.request_id, "cancelled") for request in requests]

    async def run():
        inner = Interruptible()
        engine = BatchingEngine(inner)
        task = asyncio.create_task(engine.generate(ask("a")))
        await asyncio.to_thread(inner.entered.wait, 10)
        if how == "cancelled":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await engine.loglikelihood(ask("b", continuation="x")) == (-1.0, True)
        await asyncio.wait_for(engine.close(), 10)
        if how == "closed":
            with pytest.raises(EngineError) as caught:
                await task
            assert caught.value.retryable

    asyncio.run(run())


# Over a real model


@pytest.fixture(scope="module")
def hf(tiny_model):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield HfEngine(str(tiny_model), device="cpu", dtype="float32")
    torch.set_num_threads(before)


def questions():
    schema = '{"type":"object","properties":{"a":{"type":"boolean"}},"required":["a"]}'
    settings = [
        Sampling(max_tokens=9, token_stats=True),
        Sampling(max_tokens=9, temperature=1.0, seed=3, num_samples=2),
        Sampling(max_tokens=30, temperature=1.0, seed=4, json_schema=schema),
    ]
    texts = ("What is the sum of two and two?", "Name a colour", "A much longer question about nothing at all, " * 3)
    return [Request(request_id=f"{i}-{k}", prompt=t, sampling=s) for i, t in enumerate(texts) for k, s in
            enumerate(settings)]  # fmt: skip


@pytest.mark.parametrize("max_batch", [1, 4, 32])
def test_answers_do_not_depend_on_the_batches_they_came_in(hf, max_batch, monkeypatch):
    monkeypatch.setattr(hf, "close", lambda: None)  # the next case needs it again
    requests = questions()
    alone = [hf.generate([request])[0] for request in requests]

    async def run():
        engine = BatchingEngine(hf, max_batch=max_batch)
        try:
            return await asyncio.gather(*(engine.generate(request) for request in requests))
        finally:
            await engine.close()

    for request, found, wanted in zip(requests, asyncio.run(run()), alone, strict=True):
        if request.sampling.temperature == 0:
            assert_same_greedy(found[0], wanted[0])
            continue
        assert [(one.text, one.token_ids, one.finish_reason) for one in found] == [
            (one.text, one.token_ids, one.finish_reason) for one in wanted
        ]


def test_a_cancelled_answer_ends_at_its_next_token_and_its_neighbour_is_unharmed(hf):
    """Asked before every token, `cancelled` turns true while the first request is being answered."""
    steps = []

    def cancelled(index):
        steps.append(index)
        return index == 0 and steps.count(0) > 2

    # no end before max_tokens: nobody but the canceller stops the first
    schema = '{"type":"string","minLength":200}'
    long, short = (Sampling(max_tokens=60, temperature=1.0, seed=i, json_schema=schema) for i in (1, 2))
    requests = [Request(request_id="long", prompt="A", sampling=long), Request(request_id="b", prompt="B", sampling=short)]  # fmt: skip
    first, second = hf.generate_unless(requests, cancelled)
    assert isinstance(first, EngineError)
    assert first.reason == "cancelled"
    assert steps.count(0) == 3
    assert second == hf.generate(requests[1:])[0]

"""The endpoint engine against a real local server that fails in the ways servers do."""

from __future__ import annotations

import asyncio
import email.utils
import pickle
import re
import threading
import time
from typing import Any

import pytest

from stitch_ray.config.reliability import EndpointConfig
from stitch_ray.engines import openai_api
from stitch_ray.engines.base import EngineError, Generation, Request, Sampling
from stitch_ray.engines.openai_api import OpenAIEngine, check_endpoint, endpoint_fingerprint
from stitch_ray.errors import UserError
from stitch_ray.records import Turn
from tests.fake_endpoint import FakeEndpoint, Fault, serving


def engine(endpoint: FakeEndpoint, *, longest_wait_s: float = 5, **options: Any) -> OpenAIEngine:
    config = EndpointConfig(url=endpoint.url, model="fake", **{"timeout_s": 5, **options})
    return OpenAIEngine(config, first_wait_s=0.01, longest_wait_s=longest_wait_s)


def asked(question: str = "why?", **sampling: Any) -> Request:
    return Request(request_id=question, prompt=(Turn("user", question),), sampling=Sampling(**sampling))


def text(result: list[Generation] | EngineError) -> str:
    assert isinstance(result, list), result
    return result[0].text


def test_requests_are_answered_in_order_and_concurrency_at_a_time() -> None:
    three_at_once = threading.Barrier(3, timeout=20)

    def answer(question: str) -> str:
        three_at_once.wait()
        return f"to {question}"

    with serving(answer) as endpoint:
        arrived: list[int] = []
        questions = [str(number) for number in range(12)]
        results = engine(endpoint, concurrency=3, timeout_s=30).generate_many(
            [asked(question) for question in questions], on_result=lambda index, _: arrived.append(index)
        )
    assert [text(result) for result in results] == [f"to {question}" for question in questions]
    assert sorted(arrived) == list(range(12))
    assert endpoint.most_at_once == 3


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=408),
        Fault(status=409),
        Fault(status=429),
        Fault(status=500),
        Fault(status=503),
        Fault(stall_s=60),
        Fault(truncated=True),
        Fault(dropped=True),
        Fault(raw="<html>busy</html>"),
        Fault(raw="{}"),
    ],
    ids=["408", "409", "429", "500", "503", "stall", "truncated", "dropped", "html", "empty-object"],
)
def test_what_may_pass_is_tried_again(fault: Fault) -> None:
    timeout_s = 0.3 if fault.stall_s else 5.0
    with serving("fine", faults=[fault, fault]) as endpoint:
        assert text(engine(endpoint, timeout_s=timeout_s).generate_many([asked()])[0]) == "fine"
        assert len(endpoint.seen) == 3
        endpoint.faults[:] = [fault] * 2
        (failed,) = engine(endpoint, timeout_s=timeout_s, max_retries=1).generate_many([asked()])
        assert len(endpoint.seen) == 5
    assert isinstance(failed, EngineError)
    assert failed.retryable
    assert pickle.loads(pickle.dumps(failed)).reason == failed.reason


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_what_will_not_pass_fails_at_once_and_alone(status: int) -> None:
    with serving("fine", faults=[Fault(status=status, message="no such thing")]) as endpoint:
        results = engine(endpoint, concurrency=1).generate_many([asked("a"), asked("b")])
    assert isinstance(results[0], EngineError)
    assert (results[0].request_id, results[0].reason) == ("a", f"HTTP {status}: no such thing")
    assert not results[0].retryable
    assert text(results[1]) == "fine"
    assert len(endpoint.seen) == 2


def test_a_used_up_quota_is_no_passing_429() -> None:
    with serving(faults=[Fault(status=429, code="insufficient_quota", message="pay first")]) as endpoint:
        (failed,) = engine(endpoint).generate_many([asked()])
    assert isinstance(failed, EngineError)
    assert not failed.retryable
    assert len(endpoint.seen) == 1


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds between attempts, noted in place of being waited for."""
    noted: list[float] = []

    class Asyncio:
        """The engine's own view of the module: everything but sleeping is as it was."""

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

        @staticmethod
        async def sleep(seconds: float) -> None:
            noted.append(seconds)

    monkeypatch.setattr(openai_api, "asyncio", Asyncio())
    return noted


def test_retry_after_is_honoured(waits: list[float]) -> None:
    with serving(faults=[Fault(status=429, headers=(("Retry-After", "4"),))]) as endpoint:
        (result,) = engine(endpoint).generate_many([asked()])
    assert text(result) == "yes"
    (wait,) = waits
    assert 4 <= wait <= 4.01  # and up to `first_wait_s` more


@pytest.mark.parametrize("as_date", [False, True])
def test_a_server_that_wants_to_be_left_alone_for_an_hour_is(as_date: bool) -> None:
    header = email.utils.formatdate(time.time() + 3600, usegmt=True) if as_date else "3600"
    with serving(faults=[Fault(status=503, headers=(("Retry-After", header),))]) as endpoint:
        (failed,) = engine(endpoint).generate_many([asked()])
    assert isinstance(failed, EngineError)
    assert re.fullmatch(r"HTTP 503: injected; the server asks to wait (3600|35\d\d\.?\d*) s", failed.reason)
    assert failed.retryable
    assert len(endpoint.seen) == 1


def test_waits_double_between_attempts_up_to_the_longest_and_are_half_of_that_at_least(waits: list[float]) -> None:
    with serving(faults=[Fault(status=500)] * 5) as endpoint:
        config = EndpointConfig(url=endpoint.url, model="fake", max_retries=5)
        OpenAIEngine(config, first_wait_s=1, longest_wait_s=6).generate_many([asked()])
    most = [1, 2, 4, 6, 6]
    assert len(waits) == len(most)
    assert [bound / 2 <= wait <= bound for wait, bound in zip(waits, most, strict=True)] == [True] * 5


@pytest.mark.parametrize("gives_n", ["honoured", "ignored", "refused"])
def test_samples_come_in_one_call_or_one_by_one_with_seeds_of_their_own(gives_n: str) -> None:
    def answer(body: dict[str, Any], number: int) -> str:
        return f"{body['seed']}-{number}"

    with serving(answer, gives_n=gives_n) as endpoint:
        several = engine(endpoint)
        first, second = several.generate_many([asked("a", num_samples=3, temperature=1, seed=5)] * 2)
    assert isinstance(first, list)
    assert isinstance(second, list)
    assert len({sample.text for sample in first}) == len(first) == len(second) == 3
    if gives_n == "honoured":
        assert [seen["body"]["n"] for seen in endpoint.seen] == [3, 3]
    else:
        assert [sample.text for sample in second] == [sample.text for sample in first]


def test_one_by_one_is_remembered() -> None:
    with serving(gives_n="ignored") as endpoint:
        engine(endpoint, concurrency=1).generate_many([asked("a", num_samples=3, temperature=1)] * 2)
    assert [seen["body"].get("n") for seen in endpoint.seen] == [3, None, None, None, None, None]


def test_at_temperature_zero_one_answer_is_repeated() -> None:
    with serving() as endpoint:
        (result,) = engine(endpoint).generate_many([asked("a", num_samples=3)])
    assert isinstance(result, list)
    assert len(result) == 3
    assert len(endpoint.seen) == 1


def test_token_values_are_those_of_the_text() -> None:
    with serving("one two three") as endpoint:
        some = engine(endpoint)
        whole, cut, plain = some.generate_many(
            [asked(token_stats=True), asked(token_stats=True, stop=(" three",)), asked()]
        )
        endpoint.with_logprobs = False
        (without,) = some.generate_many([asked(token_stats=True)])
    assert isinstance(whole, list)
    assert whole[0].logprobs == pytest.approx([-0.35667494] * 3)  # ln 0.7, and none for the end-of-sequence token
    assert whole[0].margins == pytest.approx([0.5] * 3)  # 0.7 - 0.2, though the server lists them the other way round
    assert whole[0].entropies is None
    assert whole[0].token_ids == ()
    assert whole[0].prompt_tokens == 7
    assert isinstance(cut, list)
    assert (cut[0].text, len(cut[0].logprobs or ())) == ("one two", 2)
    for other in (plain, without):
        assert isinstance(other, list)
        assert other[0].logprobs is None
        assert other[0].margins is None


def test_request_carries_what_was_asked_for() -> None:
    request = Request(
        request_id="x",
        prompt=(Turn("system", "be brief"), Turn("user", "why?")),
        sampling=Sampling(max_tokens=9, temperature=0.5, top_p=0.8, stop=("\n",), json_schema='{"type": "object"}'),
    )
    with serving() as endpoint:
        engine(endpoint).generate_many([request])
    assert endpoint.seen[0]["body"] == {
        "model": "fake",
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "why?"}],
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.8,
        "stop": ["\n"],
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": {"type": "object"}, "strict": True},
        },
    }


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ({"message": {"role": "assistant", "content": None, "refusal": "I must not"}}, "withheld"),
        ({"message": {"role": "assistant", "content": ""}, "finish_reason": "content_filter"}, "withheld"),
        ({"message": {"role": "assistant", "content": "x"}, "finish_reason": "tool_calls"}, "tool_calls"),
    ],
)
def test_a_withheld_answer_is_no_empty_answer(choice: dict[str, Any], reason: str) -> None:
    with serving(lambda _body, _number: choice) as endpoint:
        (failed,) = engine(endpoint, max_retries=0).generate_many([asked()])
    assert isinstance(failed, EngineError)
    assert reason in failed.reason


def test_an_empty_answer_is_an_answer() -> None:
    with serving("") as endpoint:
        (result,) = engine(endpoint).generate_many([asked(token_stats=True)])
    assert isinstance(result, list)
    assert (result[0].text, result[0].logprobs) == ("", ())


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (Request(request_id="x", prompt="text"), "conversations only"),
        (Request(request_id="x", prompt=(1, 2)), "conversations only"),
        (Request(request_id="x", prompt=()), "conversations only"),
        (Request(request_id="x", prompt=(Turn("user", "q"),), adapter="a"), "no adapters"),
        (Request(request_id="x", prompt=(Turn("user", "\ud800"),)), "surrogates"),
        (Request(request_id="x", prompt=(Turn("user", "q"),), sampling=Sampling(json_schema="{")), "Expecting"),
    ],
)
def test_what_an_endpoint_cannot_do_is_refused_before_it_is_sent(request_: Request, reason: str) -> None:
    with serving() as endpoint:
        (failed,) = engine(endpoint).generate_many([request_])
    assert isinstance(failed, EngineError)
    assert reason in failed.reason
    assert not failed.retryable
    assert endpoint.seen == []


def test_cancelling_aborts_the_request_at_the_server() -> None:
    with serving(faults=[Fault(stall_s=60)]) as endpoint:

        async def cancelled() -> None:
            some = engine(endpoint, timeout_s=60)
            task = asyncio.create_task(some.generate(asked()))
            while not endpoint.seen:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            while not endpoint.abandoned:
                await asyncio.sleep(0.01)
            assert (await some.generate(asked()))[0].text == "yes"  # its place is free again
            await some.close()

        asyncio.run(asyncio.wait_for(cancelled(), 20))


def test_an_error_of_the_callback_ends_the_call() -> None:
    def stop(_index: int, _result: object) -> None:
        raise KeyError("enough")

    with serving(delay_s=0.05) as endpoint:
        with pytest.raises(KeyError, match="enough"):
            engine(endpoint, concurrency=2).generate_many([asked()] * 20, on_result=stop)
        assert len(endpoint.seen) <= 4


def test_stream_gives_the_answer_in_pieces() -> None:
    async def pieces(some: OpenAIEngine) -> list[str]:
        try:
            return [piece async for piece in some.stream(asked())]
        finally:
            await some.close()

    with serving("one two three four", faults=[Fault(status=500)]) as endpoint:
        assert asyncio.run(pieces(engine(endpoint))) == ["one", " two", " three", " four"]
        endpoint.faults[:] = [Fault(truncated=True)]
        with pytest.raises(EngineError) as caught:
            asyncio.run(pieces(engine(endpoint)))
    assert caught.value.retryable


def test_token_comes_from_the_named_variable_and_goes_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-another-server")
    monkeypatch.setenv("MY_TOKEN", "sk-mine")
    with serving(faults=[Fault(status=401, message="sk-mine is not known")]) as endpoint:
        mine = engine(endpoint, api_key_env="MY_TOKEN")
        failed, _ = mine.generate_many([asked("a"), asked("b")])
        engine(endpoint).generate_many([asked()])
    headers = [{name.lower(): value for name, value in seen["headers"].items()} for seen in endpoint.seen]
    assert [one.get("authorization") for one in headers] == ["Bearer sk-mine", "Bearer sk-mine", None]
    assert "another-server" not in str(headers)
    assert "sk-mine" not in f"{mine!r} {mine.info!r} {failed!r}"


def test_missing_token_and_bad_url_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(UserError, match="MY_TOKEN is not set"):
        OpenAIEngine(EndpointConfig(url="http://x/v1", model="m", api_key_env="MY_TOKEN"))
    with pytest.raises(UserError, match=r"endpoint\.url"):
        OpenAIEngine(EndpointConfig(url="localhost:8000", model="m"))


def test_fingerprint_is_of_url_and_model() -> None:
    one = EndpointConfig(url="http://x/v1", model="m")
    assert endpoint_fingerprint(one) == endpoint_fingerprint(EndpointConfig(url="http://x/v1/", model="m", name="n"))
    assert endpoint_fingerprint(one) != endpoint_fingerprint(EndpointConfig(url="http://x/v1", model="other"))
    assert endpoint_fingerprint(one) != endpoint_fingerprint(EndpointConfig(url="http://y/v1", model="m"))
    assert "loglikelihood" not in OpenAIEngine(one).info.methods


def test_reachability_is_checked_beforehand() -> None:
    with serving() as endpoint:
        config = EndpointConfig(url=endpoint.url, model="fake")
        check_endpoint(config)
        endpoint.faults[:] = [Fault(status=404)]
        check_endpoint(config)
        endpoint.faults[:] = [Fault(status=401)]
        with pytest.raises(UserError, match="api_key_env"):
            check_endpoint(config)
    with pytest.raises(UserError, match="cannot be reached"):
        check_endpoint(config, timeout_s=2)

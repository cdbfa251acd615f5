"""The client against a server that fails: what is tried again, what is not, and for how long."""

import asyncio
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stitch_ray.client import ApiError, AsyncClient, Client, Reply, TimedOut, Unreachable, asynchronous
from stitch_ray.errors import UserError
from tests.serving.fake_gateway import LAST, FakeGateway, Fault, serving

BUSY = Fault(status=503)


@pytest.fixture(scope="module")
def running() -> Iterator[FakeGateway]:
    with serving() as gateway:
        yield gateway


@pytest.fixture
def gateway(running: FakeGateway) -> FakeGateway:
    running.faults.clear()
    running.seen.clear()
    running.left.clear()
    running.hold.clear()
    running.token = None
    return running


@pytest.fixture
def client(gateway: FakeGateway) -> Iterator[Client]:
    with Client(gateway.url, timeout_s=10, first_wait_s=0.01) as client:
        yield client


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def test_a_confident_answer_and_an_abstention(client: Client) -> None:
    sure, unsure = client.predict("Where is the Louvre?"), client.predict("Will it rain?")
    assert (sure.answered, sure.confidence, sure.reason, sure.route) == (True, 0.93, "confident", "none")
    assert (unsure.answered, unsure.answer, unsure.confidence, unsure.reason) == (False, None, 0.55, "unsure")


def test_a_request_sends_what_is_given_and_nothing_else(client: Client, gateway: FakeGateway) -> None:
    history = [{"role": "user", "content": "Hello"}]
    client.predict("Who?", context="c", task="t", history=history, target_risk=0.05, deadline_s=3, request_id="mine.1")
    asked = gateway.seen[-1]
    assert asked["headers"]["x-request-id"] == "mine.1"
    assert asked["body"] == {
        "question": "Who?", "context": "c", "task": "t", "history": history, "target_risk": 0.05, "deadline_s": 3
    }  # fmt: skip
    client.predict("Who?")
    assert gateway.seen[-1]["body"] == {"question": "Who?"}


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=503),
        Fault(status=429),
        Fault(status=500, body="Internal Server Error"),
        Fault(status=502, body="<html>Bad Gateway</html>"),
        Fault(dropped=True),
        Fault(truncated=True),
    ],
    ids=["503", "429", "proxy 500", "proxy 502", "dropped", "truncated"],
)
def test_what_may_pass_is_tried_again_under_the_same_id(client: Client, gateway: FakeGateway, fault: Fault) -> None:
    gateway.faults[:] = [fault] * 3
    assert client.predict("Who?").answer == LAST
    assert len(gateway.seen) == 4
    assert len({asked["headers"]["x-request-id"] for asked in gateway.seen}) == 1


def test_attempts_are_bounded(client: Client, gateway: FakeGateway) -> None:
    gateway.faults[:] = [BUSY] * 9
    with pytest.raises(ApiError) as failure:
        client.predict("Who?")
    assert (failure.value.status, failure.value.type, len(gateway.seen)) == (503, "injected", 5)
    gateway.faults[:] = [Fault(dropped=True)] * 9
    with pytest.raises(Unreachable, match="5 attempts"):
        client.predict("Who?")


@pytest.mark.parametrize("status", [400, 401, 404, 409, 413, 422, 500, 504])
def test_other_errors_are_not_repeated(client: Client, gateway: FakeGateway, status: int) -> None:
    gateway.faults[:] = [Fault(status=status)]
    with pytest.raises(ApiError) as failure:
        client.predict("Who?", request_id="r1")
    assert (failure.value.status, failure.value.request_id, len(gateway.seen)) == (status, "r1", 1)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds between attempts, noted in place of being waited for."""
    noted: list[float] = []

    class Asyncio:
        """The client's own view of the module: everything but sleeping is as it was."""

        def __getattr__(self, name: str) -> Any:
            return getattr(asyncio, name)

        @staticmethod
        async def sleep(seconds: float) -> None:
            noted.append(seconds)

    monkeypatch.setattr(asynchronous, "asyncio", Asyncio())
    return noted


@pytest.mark.parametrize("stream", [False, True])
def test_retry_after_is_waited_for(client: Client, gateway: FakeGateway, waits: list[float], stream: bool) -> None:
    gateway.faults[:] = [Fault(status=503, headers={"retry-after": "3"}), BUSY]
    if stream:
        assert [name for name, _ in client.stream("Where?")][-1] == "final"
    else:
        assert client.predict("Where?").answered
    asked_for, own = waits
    assert 3 <= asked_for <= 3.01
    assert own <= 0.02


def test_a_wait_beyond_the_timeout_is_not_begun(client: Client, gateway: FakeGateway, waits: list[float]) -> None:
    gateway.faults[:] = [Fault(status=429, headers={"retry-after": "60"})]
    with pytest.raises(ApiError) as failure:
        client.predict("Who?")
    assert (failure.value.status, len(gateway.seen), waits) == (429, 1, [])


def test_a_stall_ends_at_the_timeout_and_is_cancelled_on_the_server(gateway: FakeGateway) -> None:
    """A stalled request would never be answered: only the timeout ends it."""
    gateway.faults[:] = [BUSY, Fault(stall=True)]
    with Client(gateway.url, timeout_s=1, first_wait_s=0.01) as client:
        with pytest.raises(TimedOut, match="within 1 s; before that: HTTP 503"):
            client.predict("Who?")
        assert client.predict("Who?").answered  # the same client goes on
    wait_for(lambda: bool(gateway.left))
    assert gateway.left == ["/v1/predict"]


def test_where_nobody_listens_the_error_tells_the_attempts() -> None:
    with (
        Client("http://127.0.0.1:9", max_retries=1, first_wait_s=0.01) as client,
        pytest.raises(Unreachable, match="2 attempts, request mine"),
    ):
        client.predict("Who?", request_id="mine")


def test_the_reply_to_another_request_is_refused(client: Client, gateway: FakeGateway) -> None:
    gateway.faults[:] = [Fault(wrong_id=True)]
    with pytest.raises(ApiError, match="that of request another"):
        client.predict("Who?")


@pytest.mark.parametrize("body", ['{"id": "x"}', "[]", '"text"'])
def test_a_reply_that_is_none_is_refused(client: Client, gateway: FakeGateway, body: str) -> None:
    gateway.faults[:] = [Fault(status=200, body=body)]
    with pytest.raises(ApiError) as failure:
        client.predict("Who?")
    assert failure.value.type == "invalid_response"


@pytest.mark.parametrize("change", [{"answer": None}, {"confidence": None}, {"decision": "abstain"}, {"decision": "?"}])
def test_an_answer_without_a_check_is_no_reply(client: Client, change: dict[str, object]) -> None:
    good = dict(client.predict("Who?").raw)
    assert Reply.of(good).answered
    with pytest.raises(ValueError, match="does not fit"):
        Reply.of({**good, **change})


def test_a_batch_keeps_its_order_and_its_failures(client: Client) -> None:
    found = client.predict_batch(["Where?", {"question": "", "context": "c"}, {"question": "Who?"}])
    assert [entry.status if isinstance(entry, ApiError) else entry.reason for entry in found] == [
        "confident",
        422,
        "refined",
    ]


def test_the_other_routes(client: Client, gateway: FakeGateway) -> None:
    assert client.score("q", "a", context="c") == 0.61
    assert gateway.seen[-1]["body"] == {"question": "q", "answer": "a", "context": "c"}
    assert client.policy()["version"] == "p0l1cy"
    assert client.curve()["num"] == 400
    assert client.models() == ["stitch"]
    assert client.health()["ready"] is True
    gateway.faults[:] = [Fault(status=503, body='{"status": "starting", "ready": false}')]
    assert client.health() == {"status": "starting", "ready": False}


def test_feedback_may_be_repeated_but_not_contradicted(client: Client) -> None:
    client.feedback("one", True)
    client.feedback("one", True)
    for name, status in (("one", 409), ("unknown", 404)):
        with pytest.raises(ApiError) as failure:
            client.feedback(name, False)
        assert failure.value.status == status


def test_a_stream_ends_with_the_reply(client: Client) -> None:
    events = list(client.stream("Who?", include_trace=True))
    assert [name for name, _ in events] == ["stage", "stage", "turn", "turn", "turn", "stage", "stage", "final"]
    assert Reply.of(events[-1][1]).answer == LAST


def test_a_stream_that_breaks_off_starts_again(client: Client, gateway: FakeGateway) -> None:
    gateway.faults[:] = [BUSY, Fault(after_events=2), Fault(after_events=0)]
    names = [name for name, _ in client.stream("Where?")]
    assert names == ["stage", "stage", "restart", "stage", "stage", "stage", "final"]
    gateway.faults[:] = [Fault(after_events=1)] * 9
    gateway.seen.clear()
    with pytest.raises(Unreachable, match=r"\(5 attempts"):
        list(client.stream("Where?"))
    assert len(gateway.seen) == 5


def test_leaving_a_stream_cancels_it_on_the_server(gateway: FakeGateway) -> None:
    async def leave() -> None:
        async with AsyncClient(gateway.url) as other:
            stream = other.stream("Will it hold?")
            waiting = asyncio.ensure_future(anext(stream))
            while not gateway.seen:
                await asyncio.sleep(0.01)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(leave())
    wait_for(lambda: bool(gateway.left))
    assert gateway.left == ["/v1/predict"]


def test_many_threads_share_one_client(client: Client) -> None:
    found: dict[str, str] = {}

    def ask(number: int) -> None:
        found[str(number)] = client.predict("Where?", request_id=str(number)).id

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {str(number): str(number) for number in range(16)}


def test_the_token_is_sent_and_comes_from_the_environment(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.token = "s3cret"
    with Client(gateway.url) as client, pytest.raises(ApiError) as failure:
        client.predict("Who?")
    assert failure.value.status == 401
    monkeypatch.setenv("ASK_TOKEN", "s3cret")
    with Client(gateway.url, token_env="ASK_TOKEN") as client:
        assert client.predict("Who?").answered
    with pytest.raises(UserError, match="OTHER_TOKEN is not set"):
        Client(gateway.url, token_env="OTHER_TOKEN")


def test_a_proxy_of_the_environment_does_not_see_the_loopback(
    gateway: FakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with Client(gateway.url, max_retries=0) as client:
        assert client.predict("Who?").answered


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://"])
def test_an_address_that_is_none(url: str) -> None:
    with pytest.raises(UserError, match="http://HOST:PORT"):
        Client(url)


def test_a_bad_request_id_is_refused_before_anything_is_sent(client: Client, gateway: FakeGateway) -> None:
    with pytest.raises(ValueError, match="request_id"):
        client.predict("Who?", request_id="a b")
    assert gateway.seen == []


def test_a_closed_client_says_so(gateway: FakeGateway) -> None:
    client = Client(gateway.url)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.predict("Who?")


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ApiError(503, "overloaded", "full", "r1")))
    assert (error.status, error.type, str(error)) == (503, "overloaded", "HTTP 503 overloaded: full (request r1)")
    assert str(pickle.loads(pickle.dumps(TimedOut("late")))) == "late"


def test_the_client_loads_neither_ray_nor_torch() -> None:
    code = (
        "import sys, stitch_ray.client; print([m for m in ('ray', 'torch', 'numpy', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"

"""The served ensemble over real Ray Serve and HTTP: the gateway, its routes and its clients, around scripted members."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pyarrow.parquet as pq
import pytest

from stitch_ray.api import as_config, run_job
from stitch_ray.config.predict import PredictConfig
from stitch_ray.config.serve import ServeConfig
from stitch_ray.reliability.policy import Policy
from stitch_ray.reliability.risk import feedback
from tests.serving.load import closed_loop
from tests.serving.scripted import scripted_application, scripted_config, scripted_policy

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")]

TOKEN = "a-token-that-is-long-enough"
AUTHORIZED = {"authorization": f"Bearer {TOKEN}"}
os.environ["TEST_PREDICT_TOKEN"] = TOKEN  # before Ray starts: actors see the environment of their node


@dataclass(frozen=True)
class Served:
    url: str
    config: ServeConfig
    folder: Path
    client: httpx.Client

    def ask(self, question: str, **body: Any) -> httpx.Response:
        return self.client.post("/v1/predict", json={"question": question, **body})

    @property
    def log(self) -> str:
        file = self.folder / "calls.log"
        return file.read_text() if file.exists() else ""

    def update(self, config: ServeConfig, **application: Any) -> None:
        from ray import serve

        from serve_apps import deploying

        built = scripted_application(config, log=str(self.folder / "calls.log"), **application)
        deploying.run([serve.RunTarget(built, name=config.name, route_prefix="/")])


@pytest.fixture(scope="module")
def served(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    from ray import serve

    from serve_apps import deploying

    folder = tmp_path_factory.mktemp("served")
    (folder / "tokens").write_text(TOKEN + "\n")
    config = scripted_config(
        folder,
        http={"token_file": str(folder / "tokens"), "max_body_bytes": 20_000, "max_in_flight": 24},
        feedback={"folder": str(folder / "feedback"), "review_texts": True},
    )
    url = deploying.listen(config.http)
    with httpx.Client(base_url=url, headers=AUTHORIZED, timeout=60, trust_env=False) as client:
        served = Served(url, config, folder, client)
        served.update(config)
        yield served
    serve.shutdown()


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends, "it did not happen in time"
        time.sleep(0.1)


def test_every_decision_over_http(served: Served) -> None:
    cases = [
        ("confident draft=0.9", ("answer", "confident", "draft 0.9", 0.9, "none")),
        ("refined draft=0.3 final=0.8", ("answer", "refined", "refined 0.8", 0.8, "dialogue")),
        ("unsure draft=0.3 final=0.4", ("abstain", "unsure", None, 0.4, "dialogue")),
        ("garbage draft=0.3 auxiliary=garbage", ("abstain", "route_failed", None, None, "none")),
        ("scorer scorer=error", ("abstain", "scorer_unavailable", None, None, "none")),
        ("unscored scorer=none", ("abstain", "scorer_unavailable", None, None, "dialogue")),
    ]
    for question, expected in cases:
        body = served.ask(question).json()
        assert tuple(body[key] for key in ("decision", "reason", "answer", "confidence", "route")) == expected, question
        assert body["policy_version"] == Policy.load(served.config.policy).version
    assert served.ask("draft=0.6", target_risk=0.2).json()["decision"] == "answer"
    assert served.ask("draft=0.75", task="math").json()["reason"] == "refined"
    assert served.ask("draft=0.99", target_risk=0.01).json()["decision"] == "abstain"
    assert served.ask("primary=error").status_code == 422


def test_who_is_late_is_cancelled_and_nothing_late_is_given(served: Served) -> None:
    for question in ("primary=slow", "scorer=slow", "draft=0.2 auxiliary=slow"):
        cancelled = served.log.count("cancelled ")
        body = served.ask(question, deadline_s=1.0).json()
        assert (body["decision"], body["reason"], body["answer"]) == ("abstain", "deadline", None)
        wait_for(lambda before=cancelled: served.log.count("cancelled ") > before)


def test_the_request_id_is_the_clients_and_stands_in_the_response(served: Served) -> None:
    response = served.client.post("/v1/predict", json={"question": "Q"}, headers={"x-request-id": "mine-1"})
    assert (response.headers["x-request-id"], response.json()["id"]) == ("mine-1", "mine-1")
    bad = served.client.post("/v1/predict", json={"question": "Q"}, headers={"x-request-id": "not mine!"})
    assert bad.headers["x-request-id"].split(", ")[0] == bad.json()["id"] != "not mine!"


def test_nothing_is_told_without_a_token(served: Served) -> None:
    bare = httpx.get(f"{served.url}/v1/policy")
    assert (bare.status_code, bare.json()["error"]["type"]) == (401, "unauthorized")
    assert httpx.get(f"{served.url}/healthz").json()["ready"] is True


def test_the_openai_package_works_with_it(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=TOKEN)
    assert [model.id for model in client.models.list()] == ["stitch"]
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Earlier?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "draft=0.9"},
    ]
    answered = client.chat.completions.create(model="stitch", messages=messages, temperature=0.3)
    assert answered.choices[0].message.content == "draft 0.9"
    assert answered.usage is not None
    assert answered.usage.total_tokens == 7
    assert answered.model_extra is not None
    assert answered.model_extra["selective"]["decision"] == "answer"

    withheld: Any = [{"role": "user", "content": "draft=0.1 final=0.1"}]
    refused = client.chat.completions.create(model="stitch", messages=withheld)
    assert (refused.choices[0].message.content, refused.choices[0].finish_reason) == ("", "stop")
    assert refused.choices[0].message.refusal

    options: Any = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="stitch", messages=messages, stream=True, stream_options=options)
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert (text, chunks[-1].usage and chunks[-1].usage.total_tokens) == ("draft 0.9", 7)

    strict: Any = {"selective": {"target_risk": 0.2}}
    easier: Any = [{"role": "user", "content": "draft=0.6"}]
    lenient = client.chat.completions.create(model="stitch", messages=easier, extra_body=strict)
    assert lenient.choices[0].message.content == "draft 0.6"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="other", messages=messages)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.UnprocessableEntityError):
        client.chat.completions.create(model="stitch", messages=messages, n=2)
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="nonsense", max_retries=0).models.list()

    async def asynchronous() -> str:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key=TOKEN) as remote:
            stream = await remote.chat.completions.create(model="stitch", messages=messages, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(asynchronous()) == "draft 0.9"


def test_a_stream_has_the_turns_and_no_text_that_was_not_asked_for(served: Served) -> None:
    body = {"question": "draft=0.3 final=0.8", "stream": True}
    with served.client.stream("POST", "/v1/predict", json=body) as response:
        text = response.read().decode()
    names = [line.removeprefix("event: ") for line in text.splitlines() if line.startswith("event")]
    assert names[0] == "stage"
    assert (names.count("turn"), names[-1]) == (2, "final")
    assert "draft 0.3" not in text
    with served.client.stream("POST", "/v1/predict", json={**body, "include_trace": True}) as response:
        assert "draft 0.3" in response.read().decode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_the_work_of_the_models(served: Served, stream: bool) -> None:
    """It leaves once the primary is at work; then its own answer does not reach a deadline, which would cancel as well."""
    body = {"question": "primary=slow", "stream": stream}
    name = f"leaves-{stream}"

    async def leave() -> None:
        headers = {**AUTHORIZED, "x-request-id": name}
        async with httpx.AsyncClient(base_url=served.url, headers=headers, timeout=None, trust_env=False) as client:
            asking = asyncio.create_task(client.post("/v1/predict", json=body))
            while f"answer {name}\n" not in served.log:
                assert not asking.done()
                await asyncio.sleep(0.01)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    before = served.log.count("cancelled answer")
    asyncio.run(leave())
    wait_for(lambda: served.log.count("cancelled answer") > before)


def test_batches_keep_their_order_and_bodies_their_limits(served: Served) -> None:
    items = [{"question": f"draft={place / 10}"} for place in (9, 1, 8)]
    found = served.client.post("/v1/predict/batch", json=[*items, {"question": ""}]).json()
    assert [one.get("confidence") for one in found] == [0.9, 0.9, 0.8, None]
    assert found[3]["error"]["type"] == "invalid_request"
    assert served.client.post("/v1/predict", content=b"x" * 30_000).status_code == 413
    chunked = (b"x" * 1000 for _ in range(30))
    assert served.client.post("/v1/predict", content=chunked).status_code == 413


def test_more_than_may_be_under_way_is_told_to_come_back(served: Served) -> None:
    load = asyncio.run(
        closed_loop(
            served.url, lambda number: {"question": "sleep=0.5"}, clients=60, requests=90, headers=dict(AUTHORIZED)
        )
    )
    assert set(load.statuses) == {200, 429}
    assert load.retry_after == load.statuses[429]
    assert all(response["answer"] == "draft 0.9" for response in load.responses)


def test_labels_come_back_as_calibrate_reads_them(served: Served) -> None:
    given = served.ask("draft=0.95").json()
    withheld = served.ask("draft=0.2 final=0.3").json()
    for answer, correct in ((given, True), (withheld, False)):
        told = served.client.post("/v1/feedback", json={"id": answer["id"], "correct": correct})
        assert told.json() == {"id": answer["id"], "recorded": True}
    again = served.client.post("/v1/feedback", json={"id": given["id"], "correct": False})
    assert again.status_code == 409
    assert served.client.post("/v1/feedback", json={"id": "nobody", "correct": True}).status_code == 404
    folder = served.folder / "feedback"
    read = feedback.read([str(folder / "feedback.jsonl")], Policy.load(served.config.policy))
    assert not read.quarantined
    assert [(label.confidence, label.answered) for label in read.labels][-2:] == [(0.95, True), (0.3, False)]
    reviewed = [json.loads(line) for line in (folder / "abstained.jsonl").read_text().splitlines()]
    mine = next(row for row in reviewed if row["id"] == withheld["id"])
    assert (mine["question"], mine["reason"]) == ("draft=0.2 final=0.3", "unsure")
    assert "question" not in (folder / "answers.jsonl").read_text()


def test_metrics_count_decisions_whichever_gateway_is_asked(served: Served) -> None:
    served.ask("draft=0.9")

    def counted() -> bool:
        response = served.client.get("/metrics")
        assert response.status_code == 200, response.text
        text = response.text
        return "ray_stitch_answers_total" in text and 'reason="confident"' in text

    wait_for(counted)


def test_another_policy_is_taken_without_a_restart_and_a_wrong_one_is_refused(served: Served) -> None:
    def pids() -> dict[str, Any]:
        return {name: describe(name) for name in ("Primary", "Auxiliary1", "ReliabilityScorer")}

    def describe(name: str) -> int:
        from ray import serve

        handle = serve.get_deployment_handle(name, "stitch")
        pid: int = handle.call.remote(None, "describe", ()).result(timeout_s=30)["pid"]
        return pid

    before, gateway = pids(), gateway_replicas()
    stricter = scripted_policy(served.config, {0.1: 0.92})
    stricter.save(served.folder / "stricter" / "policy.json")
    other = served.config.model_copy(update={"policy": str(served.folder / "stricter" / "policy.json")})
    served.update(other)
    wait_for(lambda: served.ask("draft=0.9 final=0.1").json()["policy_version"] == stricter.version)
    assert served.ask("draft=0.9 final=0.1").json()["decision"] == "abstain"

    foreign = scripted_policy(served.config, {0.1: 0.1}, version="2")
    foreign.save(served.folder / "foreign" / "policy.json")
    served.update(served.config.model_copy(update={"policy": str(served.folder / "foreign" / "policy.json")}))
    wait_for(lambda: served.client.get("/healthz").json()["status"] == "degraded")
    assert "calibrated for something else" in served.client.get("/healthz").json()["refused_policy"]
    assert served.ask("draft=0.5 final=0.5").json()["policy_version"] == stricter.version

    served.update(served.config)
    wait_for(lambda: served.client.get("/healthz").json()["status"] == "ok")
    assert served.ask("draft=0.9").json()["decision"] == "answer"
    assert (pids(), gateway_replicas()) == (before, gateway)


def gateway_replicas() -> set[str]:
    """Names of the gateway's replica actors that live."""
    import ray

    return {name["name"] for name in ray.util.list_named_actors(all_namespaces=True) if "#Gateway#" in name["name"]}


def test_predict_asks_the_served_ensemble_and_a_second_time_nobody(served: Served, tmp_path: Path) -> None:
    """The answers are those of single requests, with what they cost, and a finished run is not asked again."""
    kinds = ("draft=0.9", "draft=0.3 final=0.8", "draft=0.3 final=0.4")
    questions = [f"question {number} {kinds[number % 3]}" for number in range(30)]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": text, "answer": "draft 0.9"}) + "\n" for text in questions))
    values = {
        "data": {"paths": [str(file)]},
        "target": {"url": served.url, "token_env": "TEST_PREDICT_TOKEN"},
        "concurrency": 8,
    }
    done = run_job("predict", as_config(values, PredictConfig), tmp_path / "run")
    rows = {row["question"]: row for row in pq.read_table(done.folder / "predictions.parquet").to_pylist()}
    assert rows.keys() == set(questions)
    policy = served.client.get("/v1/policy").json()["version"]
    for text, row in rows.items():
        single = served.ask(text).json()
        assert {key: row[key] for key in ("answer", "decision", "reason", "confidence", "calls")} == {
            key: single[key] for key in ("answer", "decision", "reason", "confidence", "calls")
        }
        assert row["policy_version"] == policy
    before = served.log
    again = run_job("predict", as_config(values, PredictConfig), tmp_path / "run")
    assert again.folder == done.folder
    assert served.log == before

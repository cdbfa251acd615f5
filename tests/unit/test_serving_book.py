"""What is kept of answers: labels that fit calibrate, monitors of promises, drift, and who may ask."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from scipy.stats import ks_2samp

from serve_apps.agents import merge
from serve_apps.calls import ServeCall
from serve_apps.meters import GatewayMeters
from serve_apps.notebook import Notebook
from serve_apps.recorder import SETTLES_S, Recorder
from serve_apps.tokens import digests, page_token, read_tokens
from serve_apps.web.bodies import FeedbackBody
from serve_apps.web.errors import ApiError
from serve_apps.web.guard import accepted
from stitch_ray.config.serve import HttpConfig
from stitch_ray.ensemble.serving.book import Book, Entry, LabelledOtherwise, UnknownAnswer
from stitch_ray.ensemble.serving.drift import DriftWatch, ks_bound, ks_distance
from stitch_ray.errors import UserError
from stitch_ray.reliability.policy import Fingerprints, Policy, Target
from stitch_ray.reliability.risk import feedback

POLICY = Policy(
    (Target(None, 0.1, 0.1, 0.7, 100, 40, 0.05, 0.4, 0.01, "learn_then_test", None),), Fingerprints("p", (), "s"), {}
)


def entry(name: str, **changes: Any) -> Entry:
    values = {"confidence": 0.9, "decision": "answer", "reason": "confident", "task": None, "target_risk": 0.1}
    return Entry(id=name, **{**values, "policy_version": POLICY.version, **changes})


def test_labels_are_rows_that_calibrate_reads(tmp_path: Path) -> None:
    book = Book(10)
    book.add(entry("given"))
    book.add(entry("kept", confidence=0.3, decision="abstain", reason="unsure"))
    rows = [book.label("given", False), book.label("kept", True)]
    file = tmp_path / "feedback.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = feedback.read([str(file)], POLICY)
    assert not read.quarantined
    assert [(label.loss, label.answered, label.confidence) for label in read.labels] == [
        (1.0, True, 0.9),
        (0.0, False, 0.3),
    ]


def test_an_answer_is_labelled_once_and_not_in_two_ways() -> None:
    book = Book(10)
    book.add(entry("a"))
    row = book.label("a", True)
    assert row is not None
    assert (row["id"], row["correct"]) == ("a", True)
    assert book.label("a", True) is None
    with pytest.raises(LabelledOtherwise, match="labelled right before"):
        book.label("a", False)
    with pytest.raises(UnknownAnswer):
        book.label("b", True)


def test_only_so_many_answers_are_remembered_the_oldest_go_first() -> None:
    book = Book(3)
    for number in range(5):
        book.add(entry(f"a{number}"))
        book.label(f"a{number}", True)
    assert len(book) == 3
    with pytest.raises(UnknownAnswer):
        book.label("a1", True)
    assert book.label("a2", True) is None


def test_a_promise_is_watched_by_answers_given_under_it() -> None:
    book = Book(1000)
    for number in range(300):
        book.add(entry(f"a{number}"))
        book.add(entry(f"k{number}", decision="abstain", confidence=0.1))
        book.label(f"a{number}", number % 2 == 0)
        book.label(f"k{number}", False)
    (promise,) = book.monitors
    monitor = book.monitors[promise]
    assert promise == (POLICY.version, None, 0.1)
    assert (monitor.labels, monitor.total, monitor.alarm) == (300, 150, True)


def test_labels_are_taken_up_again_after_a_restart() -> None:
    before, after = Book(10), Book(10)
    rows = []
    for number in range(4):
        before.add(entry(f"a{number}"))
        rows.append(before.label(f"a{number}", number > 0))
        after.add(entry(f"a{number}"))
    for row in rows:
        assert row is not None
        after.restore(row)
    assert after.monitors == before.monitors
    assert after.label("a0", False) is None


def test_distance_and_bound_are_those_of_kolmogorov_and_smirnov() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.uniform(size=500).round(2), rng.beta(2, 3, size=300).round(2)
    assert ks_distance(one, other) == pytest.approx(ks_2samp(one, other).statistic)
    exact = [ks_2samp(rng.uniform(size=500), rng.uniform(size=400)).statistic for _ in range(400)]
    assert np.mean(np.array(exact) >= ks_bound(500, 400, 0.1)) == pytest.approx(0.1, abs=0.04)


def test_confidences_like_those_of_calibration_are_no_drift_and_others_are() -> None:
    rng = np.random.default_rng(1)
    reference = rng.beta(4, 2, size=1000)
    alike, other = DriftWatch(reference), DriftWatch(reference)
    found = [drift for value in rng.beta(4, 2, size=5000) if (drift := alike.add(value))]
    assert len(found) == 10
    assert not any(drift.found for drift in found)
    (moved,) = [drift for value in rng.beta(3, 3, size=500) if (drift := other.add(value))]
    assert moved.found
    assert DriftWatch([]).add(0.5) is None


def test_tokens_are_read_from_a_variable_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "0123456789abcdef\n")
    assert read_tokens(HttpConfig(token_env="SOME_TOKEN")) == ["0123456789abcdef"]  # type: ignore[call-arg]
    file = tmp_path / "tokens"
    file.write_text("0123456789abcdef\n\nfedcba9876543210\n")
    assert len(read_tokens(HttpConfig(token_file=str(file)))) == 2  # type: ignore[call-arg]
    file.write_text("short\n")
    with pytest.raises(UserError, match="at least 16"):
        read_tokens(HttpConfig(token_file=str(file)))  # type: ignore[call-arg]
    monkeypatch.delenv("SOME_TOKEN")
    with pytest.raises(UserError, match="SOME_TOKEN holds no token"):
        read_tokens(HttpConfig(token_env="SOME_TOKEN"))  # type: ignore[call-arg]
    assert read_tokens(HttpConfig()) == []  # type: ignore[call-arg]


def test_the_page_has_a_token_of_its_own_that_the_api_takes() -> None:
    tokens = ["0123456789abcdef"]
    own = page_token(tokens)
    assert own is not None
    assert own not in tokens
    assert accepted(own.encode(), digests(tokens))
    assert page_token([]) is None


def test_metrics_of_several_nodes_are_one_text_with_every_family_once() -> None:
    def node(worker: str) -> str:
        return (
            "# HELP ray_stitch_calls calls\n# TYPE ray_stitch_calls histogram\n"
            f'ray_stitch_calls_bucket{{le="1",w="{worker}"}} 3\nray_stitch_calls_count{{w="{worker}"}} 3\n'
            f"# HELP ray_node_cpu x\n# TYPE ray_node_cpu gauge\nray_node_cpu 1\n"
            f'# TYPE ray_stitch_requests_total counter\nray_stitch_requests_total{{w="{worker}"}} 5\n'
        )

    lines = merge([node("a"), node("b")]).splitlines()
    assert lines.count("# TYPE ray_stitch_calls histogram") == 1
    assert sum(line.startswith("ray_stitch_calls_bucket") for line in lines) == 2
    assert lines.index("# TYPE ray_stitch_requests_total counter") > lines.index('ray_stitch_calls_count{w="b"} 3')
    assert not any("ray_node" in line for line in lines)


def test_half_a_line_of_a_recorder_that_was_killed_spoils_no_later_one(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"id": "cut o')
    policy = {"version": POLICY.version, "path": str(tmp_path / "policy.json")}

    def recorder() -> Any:
        return Recorder.func_or_class(str(tmp_path), 100)  # type: ignore[attr-defined]

    async def record() -> None:
        await recorder().record(policy, [{"entry": entry("next").to_dict(), "draft_confidence": None}])

    asyncio.run(record())
    assert asyncio.run(recorder().label("next", True)) == {"status": "recorded"}


def test_a_recorder_that_came_back_waits_for_what_gateways_could_not_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=100.0)
    for module in ("recorder", "notebook"):
        monkeypatch.setattr(f"serve_apps.{module}.time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr("serve_apps.notebook.EVERY_S", 0.0)
    policy = {"version": POLICY.version, "path": str(tmp_path / "policy.json")}

    def recorder() -> Any:
        return Recorder.func_or_class(str(tmp_path), 100)  # type: ignore[attr-defined]

    def row(name: str) -> dict[str, Any]:
        return {"entry": entry(name).to_dict(), "draft_confidence": None}

    async def status(notebook: Notebook, name: str) -> int:
        try:
            await notebook.labelled(FeedbackBody(id=name, correct=True))
        except ApiError as error:
            return error.status
        return 200

    async def scene() -> None:
        first = recorder()
        assert (await first.label("nobody", True))["status"] == "unknown", "there was nothing before to wait for"
        await first.record(policy, [row("told")])
        second, asked = recorder(), Counter[str]()

        async def call(method: str, *args: Any) -> Any:
            asked[args[0]] += 1
            return await second.call(None, method, args)

        notebook = Notebook(cast(ServeCall, call), cast(GatewayMeters, None), review_texts=False)
        assert await status(notebook, "told") == 200
        late = asyncio.create_task(status(notebook, "late"))
        while asked["late"] < 10:  # an unknown id is worth three looks otherwise
            await asyncio.sleep(0)
        assert not late.done()
        await second.record(policy, [row("late")])
        assert await late == 200
        clock.now += SETTLES_S
        assert await status(notebook, "nobody") == 404
        assert asked["nobody"] == 3
        assert (await second.label("nobody", True))["status"] == "unknown", "by now every gateway has told"

    asyncio.run(scene())

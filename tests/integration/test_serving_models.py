"""`stitch-ray serve` with real models: tiny ones, a scorer of signals, a dialogue through guided decoding, and the page."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import yaml

from jobs.serve import serve
from stitch_ray.config.serve import ServeConfig
from stitch_ray.ensemble.fingerprints import ensemble_fingerprints
from stitch_ray.reliability.policy import Policy, Target
from stitch_ray.reliability.probability import Isotonic
from stitch_ray.reliability.scorer.file import ScorerFile
from stitch_ray.reliability.scorer.logistic import LogisticStack
from tests.unit.test_engine_adapters import make_adapter

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")]

TOKEN = "a-token-that-is-long-enough"


def make_scorer(folder: Path) -> Path:
    """Of perplexity alone."""
    folder.mkdir(parents=True)
    ScorerFile(
        encoder_fingerprint=None,
        loss=None,
        max_length=None,
        stack=LogisticStack(("perplexity",), (0.0,), (10.0,), (-1.0,), 1.0),
        isotonic=Isotonic((-50.0, 2.0), (0.05, 0.95)),
        answers_from=None,
    ).save(folder)
    return folder


def target(risk: float, threshold: float | None) -> Target:
    return Target(None, risk, 0.1, threshold, 100, 40, 0.1, 0.4, 0.01, "learn_then_test", None)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, other_tiny_model: Path) -> Path:
    """Thresholds at which every draft is given, every one is refined in vain, and nothing is even tried."""
    folder = tmp_path_factory.mktemp("serve")
    values: dict[str, Any] = {
        "ensemble": {
            "primary": {"model": {"path": str(tiny_model), "name": "primary"}, "max_tokens": 8},
            "auxiliaries": [
                {"model": {"path": str(tiny_model), "name": "first"}},
                {"model": {"path": str(other_tiny_model), "name": "second"}},
            ],
            "route": "dialogue",
            "dialogue": {"max_turns": 2, "max_tokens": 64},
        },
        "scorer": str(make_scorer(folder / "scorer")),
        "policy": str(folder / "policy.json"),
        "http": {"port": 0, "token_env": "TEST_SERVE_TOKEN"},
        "feedback": {"folder": str(folder / "feedback")},
    }
    config = ServeConfig.model_validate(values)
    fingerprints = ensemble_fingerprints(config.ensemble, ScorerFile.load(config.scorer).fingerprint)
    Policy((target(0.5, 0.0), target(0.3, 2.0), target(0.1, None)), fingerprints, {"loss": "error"}).save(
        folder / "policy.json"
    )
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def written(folder: Path, ensemble: dict[str, Any], target: Target) -> Path:
    """A configuration of these members with a policy of one promise."""
    values: dict[str, Any] = {
        "ensemble": ensemble,
        "scorer": str(make_scorer(folder / "scorer")),
        "policy": str(folder / "policy.json"),
        "http": {"port": 0, "token_env": "TEST_SERVE_TOKEN"},
    }
    config = ServeConfig.model_validate(values)
    fingerprints = ensemble_fingerprints(config.ensemble, ScorerFile.load(config.scorer).fingerprint)
    Policy((target,), fingerprints, {"loss": "error"}).save(folder / "policy.json")
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@contextmanager
def serving(config: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in a process of its own, and the URL it says it listens on."""
    environment = {**os.environ, "TEST_SERVE_TOKEN": TOKEN, "RAY_AUTH_MODE": "disabled"}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "tests.forking", "jobs.serve", str(config), *options]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(command, env=environment, cwd=root, stdout=subprocess.PIPE, text=True)
    lines: queue.Queue[str] = queue.Queue()
    assert process.stdout is not None
    reader = threading.Thread(target=lambda: [lines.put(line) for line in process.stdout or ()], daemon=True)
    reader.start()
    try:
        url = None
        ends = time.monotonic() + 500
        while url is None:
            assert process.poll() is None, f"serve ended with {process.returncode}"
            assert time.monotonic() < ends, "serve did not start in time"
            try:
                found = re.match(r"serving\s+(\S+)", lines.get(timeout=1))
            except queue.Empty:
                continue
            url = found.group(1) if found else None
        yield process, url
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def test_tiny_models_answer_refine_and_abstain_and_the_page_is_there(config_file: Path) -> None:
    with serving(config_file) as (process, url):
        headers = {"authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=url, headers=headers, timeout=60, trust_env=False) as client:
            health = client.get("/healthz").json()
            assert (health["status"], set(health["members"])) == ("ok", {"primary", "first", "second", "scorer"})

            def ask(risk: float) -> dict[str, Any]:
                response = client.post("/v1/predict", json={"question": "Name a river.", "target_risk": risk})
                assert response.status_code == 200, response.text
                found: dict[str, Any] = response.json()
                return found

            confident, refined, never = ask(0.5), ask(0.3), ask(0.1)
            assert (confident["decision"], confident["reason"], confident["calls"]) == ("answer", "confident", 1)
            assert 0 < confident["confidence"] < 1
            assert (refined["decision"], refined["reason"], refined["route"]) == ("abstain", "unsure", "dialogue")
            assert [entry["stage"] for entry in refined["trace"]].count("turn") == 2
            assert (never["decision"], never["calls"]) == ("abstain", 1)
            assert ask(0.5)["confidence"] == pytest.approx(confident["confidence"], abs=1e-6)
            told = client.post("/v1/feedback", json={"id": confident["id"], "correct": True})
            assert told.json().get("recorded") is True, told.text
            scored = client.post("/v1/score", json={"question": "Name a river.", "answer": confident["answer"]}).json()
            assert scored["confidence"] == pytest.approx(confident["confidence"], abs=0.05)

            assert client.get("/").headers["location"] == "/ui/"
            assert httpx.get(f"{url}/ui/").status_code == 401
            page = httpx.get(f"{url}/ui/", auth=("anybody", TOKEN), timeout=60)
            assert page.status_code == 200
            assert "gradio" in page.text
            assets = re.findall(r'(?:src|href)="(\.?/?[^"]+\.(?:js|css))"', page.text)
            assert assets
            for asset in assets[:3]:
                found = httpx.get(httpx.URL(f"{url}/ui/").join(asset), auth=("anybody", TOKEN))
                assert found.status_code == 200, asset
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


@pytest.mark.slow
def test_each_task_is_answered_by_its_adapter(tmp_path: Path, tiny_model: Path) -> None:
    adapters = {name: make_adapter(tiny_model, tmp_path / name, f" {name} sky") for name in ("blue", "grey")}
    primary = {"model": {"path": str(tiny_model)}, "max_tokens": 8, "adapters": adapters, "max_adapters": 1}
    file = written(tmp_path, {"primary": primary}, target(0.5, 0.0))
    with (
        serving(
            file,
            "--set",
            "ensemble.primary.autoscaling.min_replicas=2",
            "--set",
            "ensemble.primary.autoscaling.max_replicas=2",
        ) as (_, url),
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60, trust_env=False) as client,
    ):

        def ask(task: str | None) -> dict[str, Any]:
            body = {"question": "What is above?", **({"task": task} if task else {})}
            response = client.post("/v1/predict", json=body)
            assert response.status_code == 200, response.text
            found: dict[str, Any] = response.json()
            return found

        first = {task: ask(task) for task in (None, "blue", "grey")}
        assert len({one["confidence"] for one in first.values()}) == 3
        # One adapter at a time fits a replica: whatever is asked in between, each task keeps its own.
        for task in ("grey", "blue", None, "blue", "grey", None):
            again = ask(task)
            assert again["answer"] == first[task]["answer"]
            assert again["confidence"] == pytest.approx(first[task]["confidence"], abs=1e-6)


@pytest.mark.slow
def test_a_draft_that_is_not_sure_enough_is_excluded_and_the_question_asked_again(
    tmp_path: Path, tiny_model: Path, other_tiny_model: Path
) -> None:
    ensemble = {
        "primary": {"model": {"path": str(tiny_model), "name": "primary"}, "max_tokens": 8},
        "auxiliaries": [
            {"model": {"path": str(other_tiny_model), "name": "again"}},
            {"model": {"path": str(tiny_model), "name": "validator"}},
        ],
        "route": "exclude",
        "exclude": {"max_attempts": 2, "max_tokens": 8, "threshold": 0.0},
    }
    with (
        serving(written(tmp_path, ensemble, target(0.5, 2.0))) as (_, url),
        httpx.Client(base_url=url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=60, trust_env=False) as client,
    ):
        response = client.post("/v1/predict", json={"question": "Name a river."})
        assert response.status_code == 200, response.text
        found = response.json()
        assert (found["decision"], found["reason"], found["route"]) == ("abstain", "unsure", "exclude")
        turns = [entry for entry in found["trace"] if entry["stage"] == "turn"]
        assert turns
        assert turns[-1]["speaker"] == "again"
        assert 0 <= turns[-1]["probability"] <= 1
        assert found["calls"] >= 4  # draft, answer, verdict, and the refined answer read by the primary


def test_what_is_wrong_is_said_before_anything_starts(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TEST_SERVE_TOKEN", TOKEN)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def refused(*overrides: str, **options: bool) -> str:
        with pytest.raises(typer.Exit) as ended:
            serve(config_file, list(overrides), **options)
        assert ended.value.exit_code == 2
        return capsys.readouterr().err

    assert "calibrated for something else" in refused("ensemble.dialogue.max_turns=3")
    assert "no threshold was calibrated" in refused("target_risk=0.2")
    assert "--detach" in refused(detach=True)
    serve(config_file, dry_run=True)
    assert "refine in a dialogue of at most 2 turns" in capsys.readouterr().out

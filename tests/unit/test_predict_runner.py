"""The worker of `predict`: what it says of a chunk that failed, and what it asks again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from stitch_ray.batch_files import batch_file
from stitch_ray.config.sample_answers import LabelsConfig
from stitch_ray.ensemble.batch import runner
from stitch_ray.ensemble.batch.questions import Asked
from stitch_ray.ensemble.batch.respondents import Alone
from stitch_ray.ensemble.types import Prediction, Question


class Gone:
    """A respondent whose ensemble is away for every second question; the others would wait for ever."""

    async def predict(self, asked: Asked) -> Prediction | str:
        if asked.line % 2:
            raise RuntimeError(f"nobody answers question {asked.question.example_id}")
        await asyncio.Event().wait()
        raise AssertionError

    async def ask_auxiliary(self, number: int, asked: Asked) -> Alone:
        raise AssertionError

    def check(self) -> None:
        raise AssertionError


def job_of(folder: Path, monkeypatch: pytest.MonkeyPatch, labels: Path | None, ask_again: bool) -> runner.PredictJob:
    """Of one chunk with four questions whose reference is "yes"."""
    chunk = [
        Asked(Question(example_id=f"q{line}", question="?"), "g", "test", "?", ("yes",), "made", line)
        for line in range(4)
    ]
    monkeypatch.setattr(runner, "read_chunk", lambda file: chunk)
    (folder / "attempts").mkdir()
    return runner.PredictJob(
        questions=folder / "questions",
        predictions=folder / "predictions",
        attempts=folder / "attempts",
        baselines=None,
        labels=labels,
        labels_config=LabelsConfig.model_validate({}),
        auxiliaries=(),
        concurrency=4,
        ask_again=ask_again,
    )


class Recovering(Gone):
    """A server that is away for the second question, until it is `back`."""

    def __init__(self) -> None:
        self.back = False
        self.asked: list[str] = []

    async def predict(self, asked: Asked) -> Prediction | str:
        name = asked.question.example_id
        self.asked.append(name)
        if name == "q1" and not self.back:
            return "away"
        return Prediction(
            example_id=name,
            question="?",
            draft="yes",
            draft_confidence=0.9,
            answer="yes",
            confidence=0.9,
            decision="answer",
            reason="confident",
            route="none",
        )

    def check(self) -> None:
        return


def test_what_a_server_failed_to_answer_is_asked_again_alone_and_gets_its_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Recovering()
    job = job_of(tmp_path, monkeypatch, labels=tmp_path / "labels-1", ask_again=True)

    def run() -> tuple[int, list[float | None]]:
        found = asyncio.run(runner.Runner(job, lambda: server)({"chunk": np.array([0])}))
        assert found["error"].tolist() == [""]
        return int(found["failed"][0]), pq.read_table(batch_file(tmp_path / "labels-1", 0))["draft_label"].to_pylist()

    assert run() == (1, [1.0, None, 1.0, 1.0])
    server.back, server.asked = True, []
    assert run() == (0, [1.0, 1.0, 1.0, 1.0])
    assert server.asked == ["q1"]
    assert job.is_done(0)


def test_a_failed_chunk_names_the_question_that_failed_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path, monkeypatch, labels=None, ask_again=False)
    found = asyncio.run(runner.Runner(job, Gone)({"chunk": np.array([7])}))
    assert found["error"].tolist() == ["chunk 7: nobody answers question q1"]
    assert not (tmp_path / "predictions").exists()

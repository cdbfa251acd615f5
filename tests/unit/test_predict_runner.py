"""The worker of `predict`: what it says of a chunk that failed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

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


def test_a_failed_chunk_names_the_question_that_failed_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = [
        Asked(Question(example_id=f"q{line}", question="?"), "g", "test", "?", ("yes",), "made", line)
        for line in range(4)
    ]
    monkeypatch.setattr(runner, "read_chunk", lambda file: chunk)
    (tmp_path / "attempts").mkdir()
    job = runner.PredictJob(
        questions=tmp_path / "questions",
        predictions=tmp_path / "predictions",
        attempts=tmp_path / "attempts",
        baselines=None,
        labels=None,
        labels_config=LabelsConfig.model_validate({}),
        auxiliaries=(),
        concurrency=4,
        ask_again=False,
    )
    found = asyncio.run(runner.Runner(job, Gone)({"chunk": np.array([7])}))
    assert found["error"].tolist() == ["chunk 7: nobody answers question q1"]
    assert not (tmp_path / "predictions").exists()

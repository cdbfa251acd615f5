"""Answers to validation questions for every checkpoint, on resources of their own, while training goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stitch_ray.runs import fresh_folder, write_text
from stitch_ray.training import checkpoints
from stitch_ray.training.answers import Question, evaluate_answers, first_questions, question
from stitch_ray.training.job import CHECKPOINTS
from stitch_ray.training.objectives import objective
from stitch_ray.training.preflight import Ready
from stitch_ray.training.prepare import Prepared, validation_examples

_FILE = "answers.jsonl"


class AnswerEvaluation:
    """Starts a Ray task for the newest checkpoint whenever none is running, and keeps what the tasks found.

    Does nothing if `eval.generate` is 0. A checkpoint that is written while another is evaluated waits; if a newer one
    comes, only that is evaluated. `answers.jsonl` holds a record a checkpoint, with some answers to read.
    """

    def __init__(self, ready: Ready, prepared: Prepared, path: Path) -> None:
        self._ready, self._path = ready, path
        shutil.rmtree(path / "work" / "answers", ignore_errors=True)  # of a command that was killed
        self._questions: list[Question] = []
        if ready.config.eval.generate:
            self._questions = _questions(ready, prepared)
        self._running: Any = None
        self._waiting: int | None = None

    def on_record(self, record: Mapping[str, Any]) -> None:
        """Called with every record of the training as it comes."""
        if self._questions and record["kind"] == "checkpoint" and record["step"] not in self._steps():
            self._waiting = record["step"]
        self._collect(timeout=0)
        self._start()

    def finish(self) -> None:
        """Wait for what is running, and evaluate what waits."""
        while self._running is not None or self._waiting is not None:
            self._collect(timeout=None)
            self._start()

    def records(self) -> list[dict[str, Any]]:
        """A record {"kind": "answers", "step", "tasks"} for every evaluated checkpoint."""
        return [{key: found[key] for key in ("kind", "step", "tasks")} for found in self._found()]

    def facts(self) -> dict[str, Any]:
        """The newest answers to read, for the report."""
        found = self._found()
        return {"samples": found[-1]["samples"], "samples_step": found[-1]["step"]} if found else {}

    def _found(self) -> list[dict[str, Any]]:
        file = self._path / _FILE
        lines = file.read_text("utf-8").split("\n") if file.exists() else []
        return sorted((json.loads(line) for line in lines if line), key=lambda found: found["step"])

    def _steps(self) -> set[int]:
        return {found["step"] for found in self._found()}

    def _start(self) -> None:
        if self._running is not None or self._waiting is None:
            return
        import ray

        step, self._waiting = self._waiting, None
        copy = self._path / "work" / "answers" / f"step-{step}"
        # Links, so that training may remove the checkpoint meanwhile.
        source = self._path / CHECKPOINTS / checkpoints.name(step)
        fresh_folder(copy / "checkpoint")
        try:
            for file in source.iterdir():
                os.link(file, copy / "checkpoint" / file.name)
        except FileNotFoundError:  # removed already: a newer one is there
            shutil.rmtree(copy)
            return
        settings = self._ready.config.eval
        task = ray.remote(num_cpus=settings.num_cpus, num_gpus=settings.num_gpus, max_retries=1)(_evaluate)
        self._running = task.remote(self._ready, copy, self._questions, step)

    def _collect(self, timeout: float | None) -> None:
        if self._running is None:
            return
        import ray

        done, _ = ray.wait([self._running], timeout=timeout)
        if done:
            found = ray.get(self._running)
            self._running = None
            every = [*self._found(), found]
            write_text(self._path / _FILE, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in every))
            shutil.rmtree(self._path / "work" / "answers" / f"step-{found['step']}", ignore_errors=True)


def _questions(ready: Ready, prepared: Prepared) -> list[Question]:
    """The first validation questions of every task, by content id; those without an assistant's answer have none."""
    config = ready.config
    found = []
    for number, row in validation_examples(prepared, config):
        task = config.tasks[number]
        turns = objective(task.objective or config.objective).question(row)
        if turns is not None:
            found.append((row.content_id, question(task.name, turns)))
    return first_questions(found, config.eval.generate)


def _evaluate(ready: Ready, copy: Path, questions: list[Question], step: int) -> dict[str, Any]:
    from stitch_ray.training.pipeline import export

    config = ready.config
    export(ready, copy / "checkpoint", copy / "model", {"step": step})
    found = evaluate_answers(
        copy / "model",
        questions,
        max_tokens=config.eval.max_tokens,
        templates={task.name: template for task, template in zip(config.tasks, ready.templates, strict=True)},
        num_threads=max(1, int(config.eval.num_cpus)),
        device="cuda" if config.eval.num_gpus else "cpu",
        trust_remote_code=config.model.trust_remote_code,
    )
    return {"kind": "answers", "step": step, **found}

"""What several test folders share: one Ray cluster a process, tiny models, corpora, and the order of the files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from hypothesis import HealthCheck, settings

from tests import lanes

# On a busy machine the time of one example says nothing.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    lanes.order(items)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> lanes.Lanes:
    return lanes.Lanes(config, log)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(lanes.skipped_line(lanes.reasons_of(terminalreporter.stats.get("skipped", []))))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[object]:
    """One local Ray with four logical CPUs for the whole session."""
    import ray

    from stitch_ray.ray_session import session
    from tests.forking import forked_workers

    with forked_workers(), session(num_cpus=4):
        yield ray


@pytest.fixture(autouse=True)
def no_actors_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test on the shared cluster all its CPUs are free again: no actor or placement group was left."""
    yield
    if "ray_cluster" not in request.fixturenames:
        return
    import ray
    from ray._common.test_utils import wait_for_condition

    def idle() -> bool:
        return ray.available_resources().get("CPU") == ray.cluster_resources().get("CPU")

    wait_for_condition(idle, timeout=30)


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 made Alpaca records, a few of them exact repeats."""
    from stitch_ray.data.synthetic import instruction_corpus

    def make(folder: Path) -> None:
        rows = instruction_corpus(230, seed=1)
        for row in rows:
            del row["id"]
        folder.mkdir()
        (folder / "corpus.json").write_text(json.dumps(rows + rows[:10], ensure_ascii=False), encoding="utf-8")

    return lanes.made_once(tmp_path_factory, "corpus", make) / "corpus.json"


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """A Llama of about 300,000 parameters, trained for a few steps on the corpus."""
    return lanes.made_once(tmp_path_factory, "tiny", lambda folder: _train(folder, corpus_file, "300k", 0))


@pytest.fixture(scope="session")
def other_tiny_model(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """A second model of another size, with its own tokenizer."""
    return lanes.made_once(tmp_path_factory, "other", lambda folder: _train(folder, corpus_file, "500k", 1))


def _train(out: Path, data: Path, parameters: str, seed: int) -> None:
    from stitch_ray.data import formats, readers
    from stitch_ray.training.tiny import make_tiny_model

    examples = [formats.convert(row) for row in readers.iter_rows(str(data))]
    make_tiny_model(examples, out, parameters=parameters, steps=15, seed=seed)

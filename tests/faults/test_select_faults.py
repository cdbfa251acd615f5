"""`select` under SIGKILL: nothing is rated twice beyond the batch at hand, and no byte of the results changes."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cluster.local import simulated_cluster
from stitch_ray.data import formats, readers
from stitch_ray.data.synthetic import instruction_corpus
from stitch_ray.training.tiny import make_tiny_model
from tests.faults.killing import Command, World, kill, workers_below, world

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RATER = "ray::MapWorker(MapBatches(Rater))"
ROWS, BATCHES, ROWS_A_BATCH = 600, 19, 32
RESULTS = ("selected.jsonl", "scores.parquet", "plan.parquet", "ratings/*.parquet")


@dataclass(frozen=True)
class Job:
    """A configuration file and what an undisturbed run of it leaves behind."""

    config: Path
    undisturbed: Path

    def copied(self, out: Path, *but: int) -> Path:
        """The undisturbed run's folder as if it had been killed before the batches `but` were rated."""
        shutil.copytree(self.undisturbed, out)
        for number in but:
            rating_file(out, number).unlink()
        return out


def calls(command: Command) -> list[tuple[int, int]]:
    """(batch, rows) of every rating call so far, over all commands that wrote to the same log."""
    return [(int(batch), int(rows)) for _, batch, rows in command.entries()]


def results(folder: Path) -> dict[str, bytes]:
    files = sorted(file for pattern in RESULTS for file in folder.glob(pattern))
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def rating_file(folder: Path, batch: int) -> Path:
    [file] = folder.glob(f"ratings/*.{batch:06d}.parquet")
    return file


def check_complete(folder: Path, job: Job) -> None:
    """Every example once, the manifest done, and all bytes those of the undisturbed run."""
    ids = pq.read_table(folder / "scores.parquet")["example_id"].to_pylist()
    assert len(ids) == len(set(ids)) == ROWS
    table = pa.concat_tables([pq.read_table(file) for file in folder.glob("ratings/*.parquet")])
    times = Counter(zip(table["example_id"].to_pylist(), table["prompt"].to_pylist(), strict=True))
    assert set(times.values()) == {1}
    assert json.loads((folder / "manifest.json").read_text())["status"] == "done"
    assert results(folder) == results(job.undisturbed)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "calls.log", "select") as found:
        yield found


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """600 distinct rows in three files, and a model large enough that a batch takes a good part of a second."""
    folder = tmp_path_factory.mktemp("job")
    rows = instruction_corpus(ROWS, seed=2)
    for number in range(3):
        lines = [json.dumps(row) for row in rows[number::3]]
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    examples = [formats.convert(row) for row in readers.iter_rows(str(folder / "0.jsonl"))]
    make_tiny_model(examples, folder / "model", parameters="4m", steps=2)
    values = {"data": {"paths": [str(folder / "*.jsonl")]}, "models": [{"path": str(folder / "model")}]}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    with world(folder / "calls.log", "select") as here:
        command = here.start(config, folder / "run")
        code, errors = command.finish()
    assert code == 0, errors
    assert sorted(number for number, _ in calls(command)) == list(range(BATCHES))
    assert sum(count for _, count in calls(command)) == ROWS
    return Job(config, folder / "run")


def test_killed_actor_is_replaced_and_only_its_batch_is_rated_again(job: Job, here: World, tmp_path: Path) -> None:
    command = here.start(job.config, tmp_path / "run")
    for more in (3, 4):
        seen = len(calls(command)) + more
        assert command.until(lambda seen=seen: len(calls(command)) >= seen, f"call {seen}")
        [pid] = command.workers(RATER)
        kill(pid)
        assert len(calls(command)) < BATCHES, "the kill came after the last batch"
        assert command.until(lambda pid=pid: pid not in command.workers(RATER), "death of the actor")
    code, errors = command.finish()
    assert code == 0, errors
    made = calls(command)
    assert ROWS < sum(count for _, count in made) <= ROWS + 2 * ROWS_A_BATCH
    check_complete(tmp_path / "run", job)


@pytest.mark.timeout(1200)
def test_killed_driver_resumes_from_ten_points_with_the_same_bytes(job: Job, here: World, tmp_path: Path) -> None:
    """The driver dies together with its Ray, so that nothing can go on behind its back."""
    out, replicas = tmp_path / "run", 2
    random_ = random.Random(20)

    def reading() -> bool:
        return (out / "work" / "corpus" / "quarantine").exists()

    def tokenising() -> bool:
        return (out / "work" / "corpus" / "corpus.json").exists()

    def planning() -> bool:
        return any((out / "work").glob("bodies-*/*.parquet"))

    def rated(command: Command, more: int) -> Callable[[], bool]:
        wanted = len(calls(command)) + more
        return lambda: len(calls(command)) >= wanted

    points = ["reading", "tokenising", "planning", *(random_.choice([1, 2]) for _ in range(7))]
    kills = 0
    for point in points:
        command = here.start(job.config, out, "--set", f"models.0.replicas={replicas}")
        stage = {"reading": reading, "tokenising": tokenising, "planning": planning}.get(str(point))
        before = len(calls(command))
        assert command.until(stage or rated(command, int(point)), f"point {point}")
        command.kill_all()
        kills += 1
        assert json.loads((out / "manifest.json").read_text())["status"] == "running"
        assert not (out / "scores.parquet").exists(), "the kill came too late"
        assert (len(calls(command)) > before) == (stage is None)
    unfinished = BATCHES - len(list(out.glob("ratings/*.parquet")))
    assert unfinished > 0, "all was rated before the last kill"
    command = here.start(job.config, out)
    code, errors = command.finish()
    assert code == 0, errors
    assert kills == 10
    made = calls(command)
    assert {number for number, _ in made} == set(range(BATCHES))
    assert sum(count for _, count in made) <= ROWS + kills * replicas * ROWS_A_BATCH
    assert len(made) > BATCHES, "no kill hit a batch: nothing was tested"
    check_complete(out, job)


def test_batch_that_kills_its_actor_every_time_ends_the_run_with_its_number(
    job: Job, here: World, tmp_path: Path
) -> None:
    out = job.copied(tmp_path / "run", 4, 11, 17)
    command = here.start(job.config, out)
    killed = 0

    def ended() -> bool:
        nonlocal killed
        deaths = [number for number, _ in calls(command)].count(11)
        if deaths > killed:
            [pid] = command.workers(RATER)
            kill(pid)
            killed = deaths
        return command.process.poll() is not None

    command.until(ended, "the end")
    code, errors = command.finish()
    assert killed == 3
    assert code == 1, errors
    assert "batch 11 of model model: took its worker down 3 times" in errors
    assert "Traceback" not in errors
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert "batch 11" in manifest["error"]
    again = here.start(job.config, out)
    assert again.finish()[0] == 0  # the count of deaths does not outlive the run
    check_complete(out, job)


def test_interrupted_run_exits_130_and_resumes(job: Job, here: World, tmp_path: Path) -> None:
    out = job.copied(tmp_path / "run", *range(8))
    command = here.start(job.config, out)
    assert command.until(lambda: len(calls(command)) >= 2, "two calls")
    command.process.send_signal(signal.SIGINT)
    code, errors = command.finish()
    assert code == 130, errors
    assert "interrupted; the same command resumes" in errors
    assert len(calls(command)) < 8, "the interrupt came after the last batch"
    assert json.loads((out / "manifest.json").read_text())["status"] == "failed"
    again = here.start(job.config, out)
    assert again.finish()[0] == 0
    assert sum(count for _, count in calls(again)) <= (8 + 1) * ROWS_A_BATCH
    check_complete(out, job)


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def flipped_byte(file: Path) -> None:
    """In a data page: the footer stays readable."""
    data = bytearray(file.read_bytes())
    chunk = pq.read_metadata(file).row_group(0).column(6)
    data[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size // 2] ^= 0xFF
    file.write_bytes(data)


def test_damaged_rating_files_are_found_and_rated_again(job: Job, here: World, tmp_path: Path) -> None:
    out = job.copied(tmp_path / "run")
    damage = {3: cut_in_half, 7: emptied, 12: flipped_byte}
    for number, spoil in damage.items():
        spoil(rating_file(out, number))
    assert results(out) != results(job.undisturbed)
    command = here.start(job.config, out)
    code, errors = command.finish()
    assert code == 0, errors
    assert sorted(number for number, _ in calls(command)) == sorted(damage)
    check_complete(out, job)


@pytest.mark.parametrize("replicas", [2, 3])
def test_node_removed_hard_while_it_rates_does_not_stop_the_run(job: Job, tmp_path: Path, replicas: int) -> None:
    """With 3 replicas, one more than the node that is left has room for beside its own."""
    with (
        simulated_cluster(nodes=2, cpus_per_node=2) as (address, cluster),
        world(tmp_path / "calls.log", "select", RAY_ADDRESS=address) as here,
    ):
        node = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
        raylets = [entry.process.pid for entry in node.all_processes["raylet"]]
        command = here.start(job.config, tmp_path / "run", "--set", f"models.0.replicas={replicas}")
        assert command.until(lambda: len(calls(command)) >= 5, "five calls")
        assert workers_below(raylets, RATER), "no actor on the node that is to go"
        assert len(calls(command)) < BATCHES
        cluster.remove_node(node, allow_graceful=False)
        code, errors = command.finish()
        assert code == 0, errors
        assert sum(count for _, count in calls(command)) <= ROWS + replicas * ROWS_A_BATCH
    check_complete(tmp_path / "run", job)

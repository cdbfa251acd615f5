"""`finetune` under SIGKILL, damage and interrupts: the weights are those of the undisturbed run, bit for bit."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from cluster.local import simulated_cluster
from stitch_ray.data import formats, readers
from stitch_ray.data.synthetic import instruction_corpus
from stitch_ray.training.metrics import MetricsLog
from stitch_ray.training.tiny import make_tiny_model
from tests.faults.killing import Command, World, kill, title_of, workers_below, world

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

RANK = "ray::RayTrainWorker"
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
STEPS, EVERY = 24, 4
DEADLINE_S = 600.0
MEASURED = ("seconds", "tokens_per_second", "peak_memory_mb", "workers")
"""Keys of a step's record that are not the same in every run."""

Entry = tuple[int, int, str]


@dataclass(frozen=True)
class Job:
    """A configuration file, and what an undisturbed run of it leaves behind: its folder and its audit."""

    config: Path
    undisturbed: Path
    audit: tuple[Entry, ...]

    def copied(self, out: Path, *, until: int = 0) -> Path:
        """The undisturbed run's folder as if it had been killed after the checkpoint of step `until`; 0: before the first.

        What its metrics say of later steps is left there.
        """
        shutil.copytree(self.undisturbed, out, ignore=shutil.ignore_patterns("model", "outcome.json"))
        for step in range(until + EVERY, STEPS + 1, EVERY):
            shutil.rmtree(checkpoint(out, step))
        return out


def audit(command: Command) -> list[Entry]:
    """(step, slot, example ids) of every micro-batch that was begun, in the order of the log."""
    return [(int(step), int(slot), ids) for step, slot, ids in command.entries()]


def reached(command: Command, step: int) -> Callable[[], bool]:
    return lambda: any(begun >= step for begun, *_ in audit(command))


def checkpoint(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:06d}"


def writing(out: Path) -> bool:
    """A checkpoint has files of state, but not its name yet."""
    return any(out.glob("checkpoints/.step-*.tmp/state-*.safetensors"))


def weights(out: Path) -> dict[str, bytes]:
    """The exported model and the whole state of the last checkpoint, tensor by tensor.

    Not file by file: safetensors writes the entries of a header in any order.
    """
    found = {"progress": (checkpoint(out, STEPS) / "progress.json").read_bytes()}
    for file in [*(out / "model").glob("*.safetensors"), *checkpoint(out, STEPS).glob("*.safetensors")]:
        with safe_open(file, framework="np") as tensors:
            found[file.name] = json.dumps(tensors.metadata(), sort_keys=True).encode()
            for name in tensors.keys():  # noqa: SIM118
                found[f"{file.name}/{name}"] = tensors.get_tensor(name).tobytes()
    return found


def trained(out: Path) -> list[dict[str, Any]]:
    """What `metrics.jsonl` says of every step, without what is measured by the clock."""
    steps = [record for record in MetricsLog.read(out / "metrics.jsonl") if record["kind"] == "step"]
    return [{key: value for key, value in record.items() if key not in MEASURED} for record in steps]


def check_same(out: Path, job: Job) -> None:
    """Done; weights, optimizer and every step's record as undisturbed; nothing left behind."""
    assert json.loads((out / "manifest.json").read_text())["status"] == "done"
    assert [record["step"] for record in trained(out)] == list(range(1, STEPS + 1))
    assert trained(out) == trained(job.undisturbed)
    assert weights(out) == weights(job.undisturbed)
    hidden = [path for path in out.rglob(".*") if path.name != ".lock" and "ray" not in path.parts]
    assert not hidden


def check_audit(command: Command, job: Job, kills: int) -> None:
    """Nothing was left out, and nothing replayed but what came after the checkpoint before a kill."""
    begun = audit(command)
    assert set(begun) == set(job.audit)
    assert max(Counter(begun).values()) <= 1 + kills
    replays = 0
    for (step, *_), (following, *_) in pairwise(begun):
        if following < step:
            # Twice: ranks write the lines of a step one after another, so a step may seem begun twice.
            assert following == step // EVERY * EVERY, f"resumed at {following} after a kill in step {step}"
            replays += 1
        else:
            assert following - step <= 1
    assert replays <= kills


def check_gone(command: Command) -> None:
    """The command's Ray is gone with it, but for Ray's agents: sometimes they outlive a killed raylet, and do nothing."""
    deadline = time.monotonic() + 30
    while left := [title for pid in command.processes() if (title := title_of(pid)) and not title.startswith(AGENTS)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)


@pytest.fixture
def here(tmp_path: Path) -> Iterator[World]:
    with world(tmp_path / "audit.log", "finetune", DEADLINE_S, RAY_worker_niceness="0") as found:
        yield found


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Two tasks, dropout, and task weights that follow validation losses: all the state that a checkpoint can hold."""
    return undisturbed(tmp_path_factory.mktemp("job"), {})


def undisturbed(folder: Path, changes: dict[str, Any]) -> Job:
    """Make data, model and configuration in `folder`, and run it. All its checkpoints are kept."""
    rows = instruction_corpus(400, seed=3)
    for number, name in enumerate(("first", "second")):
        lines = [json.dumps(row) for row in rows[number::2]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    examples = [formats.convert(row) for row in readers.iter_rows(str(folder / "first.jsonl"))]
    make_tiny_model(examples, folder / "model", parameters="300k", steps=2)
    values = {
        "model": {"path": str(folder / "model")},
        "tasks": [{"name": name, "data": str(folder / f"{name}.jsonl")} for name in ("first", "second")],
        "method": "lora",
        "adapter": {"rank": 8, "alpha": 16, "dropout": 0.1},
        "loss": "coba",
        "coba": {"warmup": 4, "history": 8, "examples": 2},
        "max_length": 256,
        "batch": {"tokens": 512, "accumulation": 2},
        "max_steps": STEPS,
        "optimizer": {"learning_rate": 1e-3},
        "workers": 2,
        "split": {"validation": 0.1},
        "eval": {"every": 8},
        "checkpoint": {"every": EVERY},
        **changes,
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    with world(folder / "audit.log", "finetune", DEADLINE_S, RAY_worker_niceness="0") as here:
        command = here.start(config, folder / "run", "--set", "checkpoint.keep=100")
        code, errors = command.finish()
        check_gone(command)
    assert code == 0, errors
    assert max(Counter(audit(command)).values()) == 1
    return Job(config, folder / "run", tuple(audit(command)))


def test_killed_rank_is_replaced_and_training_goes_on_from_the_last_checkpoint(
    job: Job, here: World, tmp_path: Path
) -> None:
    out = job.copied(tmp_path / "run")
    command = here.start(job.config, out)
    steps = random.Random(1)
    for number, step in enumerate((steps.randrange(5, 8), steps.randrange(13, 20))):
        assert command.until(reached(command, step), f"step {step}")
        ranks = command.workers(RANK)
        assert len(ranks) == 2
        kill(ranks[number])
        killed, begun = time.monotonic(), len(audit(command))
        assert max(audit(command))[0] < STEPS - 1, "the kill came too late"
        assert command.until(lambda ranks=ranks: not set(ranks) & set(command.workers(RANK)), "end of both ranks")
        ended = time.monotonic()
        assert command.until(lambda begun=begun: len(audit(command)) > begun + 4, "training again")
        print(f"both ranks ended after {ended - killed:.1f} s, training again after {time.monotonic() - killed:.1f} s")
    code, errors = command.finish()
    assert code == 0, errors
    check_audit(command, job, kills=2)
    check_same(out, job)
    check_gone(command)


def test_kill_while_a_checkpoint_is_written_costs_that_checkpoint_only(job: Job, here: World, tmp_path: Path) -> None:
    out = job.copied(tmp_path / "run")
    command = here.start(job.config, out, "--set", "resources.max_failures=10")
    torn: list[Path] = []
    while not torn:  # again if the kill came too late
        assert command.until(lambda: len(command.workers(RANK)) == 2, "two ranks")
        ranks = command.workers(RANK)
        assert command.until(lambda: writing(out), "a checkpoint being written")
        for pid in ranks:
            kill(pid)
        torn = list(out.glob("checkpoints/.step-*.tmp"))
        assert not checkpoint(out, STEPS).exists(), "no kill was in time"
    command.kill_all()
    # Were it not for the hidden name, this would be the newest checkpoint; without a manifest it is none.
    (torn[0] / "manifest.json").unlink(missing_ok=True)
    named = torn[0].with_name(torn[0].name.removeprefix(".").removesuffix(".tmp"))
    shutil.copytree(torn[0], named)
    again = here.start(job.config, out)
    code, errors = again.finish()
    assert code == 0, errors
    assert f"{named} is damaged and not used: manifest.json is missing" in errors
    shutil.rmtree(named.with_name(f"{named.name}.corrupt"))
    check_audit(again, job, kills=10)
    check_same(out, job)


def test_killed_driver_resumes_from_every_stage(job: Job, here: World, tmp_path: Path) -> None:
    """The driver dies together with its Ray, but for the last two times: then its Ray has to notice that it is alone."""
    out = tmp_path / "run"
    steps = random.Random(3)
    first, second = steps.randrange(5, 8), steps.randrange(13, 20)
    stages: dict[str, Callable[[Command], bool]] = {
        "reading": lambda command: (out / "work" / "data" / "corpus").exists(),
        "tokenising": lambda command: (out / "work" / "data" / "pieces").exists(),
        f"step {first}": lambda command: reached(command, first)(),
        f"step {second}": lambda command: reached(command, second)(),
        "export": lambda command: any(out.glob(".model.building-*")),
    }
    for stage, seen in stages.items():
        command = here.start(job.config, out)
        assert command.until(lambda seen=seen, command=command: seen(command), stage), stage
        if stage in (f"step {second}", "export"):
            kill(command.process.pid)
            command.process.wait()
        else:
            command.kill_all()
        assert json.loads((out / "manifest.json").read_text())["status"] == "running"
        assert not (out / "model").exists(), "the kill came too late"
    command = here.start(job.config, out)
    code, errors = command.finish()
    assert code == 0, errors
    check_audit(command, job, kills=2)
    check_same(out, job)
    for command in here.started:
        check_gone(command)


def flip_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 0x40  # the top bits of a float's exponent: a number of another size
    file.write_bytes(data)


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_damaged_checkpoints_are_named_and_the_one_before_is_used(job: Job, here: World, tmp_path: Path) -> None:
    out = job.copied(tmp_path / "run", until=20)
    flipped, cut = (checkpoint(out, step) / "state-00001-00000.safetensors" for step in (20, 16))
    flip_byte(flipped)
    cut_in_half(cut)
    command = here.start(job.config, out)
    code, errors = command.finish()
    assert code == 0, errors
    assert f"{flipped.parent} is damaged and not used: {flipped.name} has changed since it was written" in errors
    assert f"{cut.parent} is damaged and not used: {cut.name} has " in errors
    assert {step for step, *_ in audit(command)} == set(range(12, STEPS))
    assert {path.name for path in out.glob("checkpoints/*.corrupt")} == {"step-000016.corrupt", "step-000020.corrupt"}
    check_same(out, job)


def test_damaged_checkpoint_is_not_exported_but_made_again(job: Job, here: World, tmp_path: Path) -> None:
    """Killed between the end of training and the end of the export."""
    out = job.copied(tmp_path / "run", until=STEPS)
    shutil.copy(job.undisturbed / "work" / "outcome.json", out / "work")
    flip_byte(checkpoint(out, STEPS) / "state-00000-00000.safetensors")
    command = here.start(job.config, out)
    code, errors = command.finish()
    assert code == 1, errors
    assert f"{checkpoint(out, STEPS)} is damaged: state-00000-00000.safetensors has changed" in errors
    assert not (out / "model").exists()
    again = here.start(job.config, out)
    code, errors = again.finish()
    assert code == 0, errors
    assert "is damaged and not used" in errors
    assert {step for step, *_ in audit(again)} == set(range(20, STEPS))
    check_same(out, job)


def wrong_number(folder: Path) -> None:
    flip_byte(folder / "state-00001-00000.safetensors")


def older_state(folder: Path) -> None:
    """Weights and moments are those of an earlier checkpoint."""
    for file in folder.with_name("step-000016").glob("state-*"):
        shutil.copy(file, folder)


def forgotten_weights(folder: Path) -> None:
    """The state of CoBa is that of an earlier checkpoint."""
    file = "progress.json"
    earlier = json.loads((folder.with_name("step-000016") / file).read_text())["weigher"]
    progress = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**progress, "weigher": earlier}))


@pytest.mark.parametrize("damage", [wrong_number, older_state, forgotten_weights])
def test_damage_that_a_manifest_vouches_for_shows_in_the_weights(
    job: Job, here: World, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """With the protection switched off the other tests fail: sizes and hashes are made to agree with the damage."""
    out = job.copied(tmp_path / "run", until=20)
    folder = checkpoint(out, 20)
    damage(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    command = here.start(job.config, out)
    code, errors = command.finish()
    assert code == 0, errors
    assert "damaged" not in errors
    assert weights(out) != weights(job.undisturbed)


def test_interrupted_run_exits_130_and_resumes(job: Job, here: World, tmp_path: Path) -> None:
    out = job.copied(tmp_path / "run")
    for step, number in ((6, signal.SIGINT), (14, signal.SIGTERM)):
        command = here.start(job.config, out)
        assert command.until(reached(command, step), f"step {step}")
        command.process.send_signal(number)
        code, errors = command.finish()
        assert code == 130, errors
        assert "interrupted; the same command resumes" in errors
        assert "Traceback" not in errors
        assert json.loads((out / "manifest.json").read_text())["status"] == "failed"
        assert max(audit(command))[0] < STEPS - 1, "the interrupt came too late"
        check_gone(command)
    again = here.start(job.config, out)
    code, errors = again.finish()
    assert code == 0, errors
    check_audit(again, job, kills=2)
    check_same(out, job)


def test_run_that_loses_too_many_ranks_fails_with_the_reason_and_resumes(job: Job, here: World, tmp_path: Path) -> None:
    out = job.copied(tmp_path / "run")
    command = here.start(job.config, out, "--set", "resources.max_failures=1")
    for step in (6, 10):
        assert command.until(reached(command, step), f"step {step}")
        kill(command.workers(RANK)[0])
        assert command.until(lambda: not command.workers(RANK), "end of the ranks")
    code, errors = command.finish()
    assert code == 1, errors
    assert re.search(r"no restart is left \(resources.max_failures: 1\): worker [01] died", errors)
    assert "Traceback" not in errors
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "failed"
    assert "resources.max_failures: 1" in manifest["error"]
    check_gone(command)
    again = here.start(job.config, out)  # the count of failures does not outlive the run
    code, errors = again.finish()
    assert code == 0, errors
    check_audit(again, job, kills=2)
    check_same(out, job)


def test_node_removed_hard_while_it_trains_is_replaced_by_another(job: Job, tmp_path: Path) -> None:
    out = job.copied(tmp_path / "run")
    with (
        simulated_cluster(nodes=3, cpus_per_node=1) as (address, cluster),
        world(tmp_path / "audit.log", "finetune", DEADLINE_S, RAY_ADDRESS=address) as here,
    ):
        command = here.start(job.config, out)
        assert command.until(reached(command, 9), "step 9")
        node = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node and ranks_on(node))
        cluster.remove_node(node, allow_graceful=False)
        assert max(audit(command))[0] < STEPS - 1, "the kill came too late"
        code, errors = command.finish()
        assert code == 0, errors
    check_audit(command, job, kills=1)
    check_same(out, job)


def ranks_on(node: Any) -> list[int]:
    return workers_below([entry.process.pid for entry in node.all_processes["raylet"]], RANK)


ELASTIC = {"workers": [1, 2], "max_steps": 60, "batch": {"tokens": 512, "accumulation": 8}, "eval": {"every": 60}}


@pytest.fixture(scope="module")
def long_job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Steps long enough for Ray Train to see that a node has come."""
    return undisturbed(tmp_path_factory.mktemp("long"), ELASTIC)


def test_workers_follow_the_nodes_of_the_cluster_down_and_up(long_job: Job, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with (
        simulated_cluster(nodes=2, cpus_per_node=1) as (address, cluster),
        world(
            tmp_path / "audit.log", "finetune", DEADLINE_S, RAY_ADDRESS=address, STITCH_RAY_RESIZE_INTERVAL_S="5"
        ) as here,
    ):
        command = here.start(long_job.config, out)
        assert command.until(reached(command, 6), "step 6")
        node = next(node for node in cluster.list_all_nodes() if node is not cluster.head_node)
        assert ranks_on(node)
        cluster.remove_node(node, allow_graceful=False)
        assert command.until(lambda: workers(out) == [2, 1], "training with one worker")
        cluster.add_node(num_cpus=1)
        assert command.until(lambda: workers(out) == [2, 1, 2], "training with two workers again")
        code, errors = command.finish()
        assert code == 0, errors
    assert workers(out) == [2, 1, 2]
    assert set(audit(command)) == set(long_job.audit)
    assert [record["step"] for record in trained(out)] == list(range(1, ELASTIC["max_steps"] + 1))
    [model] = (out / "model").glob("*.safetensors")
    found, expected = load_file(model), load_file(long_job.undisturbed / "model" / model.name)
    assert found.keys() == expected.keys()
    difference = max((found[name] - expected[name]).abs().max().item() for name in expected)
    print(f"largest difference of a weight: {difference:.1e}")
    assert difference < 1e-4, "rounding takes a part of a step, which is 1e-3; a lost moment or example takes steps"


def workers(out: Path) -> Sequence[int]:
    """How many there were at each step, without repeats in a row."""
    counts = [record["workers"] for record in MetricsLog.read(out / "metrics.jsonl") if record["kind"] == "step"]
    return [count for count, before in zip(counts, [0, *counts], strict=False) if count != before]

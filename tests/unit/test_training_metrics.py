"""The training log: what is written can be read, whatever moment the writer was killed at."""

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stitch_ray.errors import UserError
from stitch_ray.training.metrics import MetricsLog, Tail, TensorBoard, flops_per_token, peak_flops, write_tensorboard

pytestmark = pytest.mark.numeric


def step(number: int, loss: float = 1.0) -> dict[str, Any]:
    return {
        "kind": "step",
        "step": number,
        "loss": loss,
        "tasks": {"qa": loss},
        "task_weights": {"qa": 0.5},
        "lr": 1e-4,
        "grad_norm": 2.0,
        "tokens_per_second": 100.0,
    }


def validation(number: int, loss: float) -> dict[str, Any]:
    return {"kind": "validation", "step": number, "loss": loss, "tasks": {"qa": loss}}


def written(path: Path, *records: dict[str, Any]) -> Path:
    with MetricsLog(path) as log:
        for record in records:
            log.append(record)
    return path


def steps(records: list[dict[str, Any]]) -> list[int]:
    return [record["step"] for record in records]


def events_in(file: Path) -> Iterator[Any]:
    """The events of a file of records (length, checksum, event, checksum)."""
    from tensorboardX.proto.event_pb2 import Event

    data = file.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def scalars_in(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of all event files."""
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):
        for event in events_in(file):
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def test_append_is_seen_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "run" / "metrics.jsonl")
    log.append(step(1))
    assert MetricsLog.read(log.path) == [step(1)]


def test_numbers_that_are_not_finite_survive_as_strict_json(tmp_path: Path) -> None:
    path = written(tmp_path / "m", step(1, math.nan), {**step(2), "grad_norm": math.inf, "lr": -math.inf})
    first, second = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert (first["loss"], first["tasks"]["qa"]) == ("nan", "nan")
    assert (second["grad_norm"], second["lr"]) == ("inf", "-inf")
    read = MetricsLog.read(path)
    assert math.isnan(read[0]["tasks"]["qa"])
    assert (read[1]["grad_norm"], read[1]["lr"]) == (math.inf, -math.inf)


def test_torn_last_line_is_not_read_and_removed_by_the_next_writer(tmp_path: Path) -> None:
    path = written(tmp_path / "m", step(1))
    with path.open("a") as file:
        file.write('{"kind": "step", "st')
    assert steps(MetricsLog.read(path)) == [1]
    written(path, step(2))
    assert steps(MetricsLog.read(path)) == [1, 2]


def test_damaged_line_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "m", step(1))
    for bad in ("{]", "3"):
        (tmp_path / "m").write_text(f"{json.dumps(step(1))}\n{bad}\n")
        with pytest.raises(UserError, match=r"m:2 is not"):
            MetricsLog.read(path)


def test_no_file_is_no_record(tmp_path: Path) -> None:
    assert MetricsLog.read(tmp_path / "none") == []
    assert Tail(tmp_path / "none").new() == []


def test_truncate_after_drops_later_steps_and_appending_goes_on(tmp_path: Path) -> None:
    path = written(tmp_path / "m", step(1), step(2), validation(2, 0.5), step(3), validation(2, 0.4))
    with path.open("a") as file:
        file.write('{"torn')
    log = MetricsLog(path)
    log.truncate_after(2)
    log.append(step(3, 9.0))
    assert [(r["kind"], r["step"]) for r in MetricsLog.read(path)] == [
        ("step", 1),
        ("step", 2),
        ("validation", 2),
        ("validation", 2),
        ("step", 3),
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_lives_on_does_not_reach_the_truncated_log(tmp_path: Path) -> None:
    lost = MetricsLog(tmp_path / "m")
    lost.append(step(1))
    lost.append(step(2))
    with MetricsLog(tmp_path / "m") as log:
        log.truncate_after(1)
        lost.append(step(3))
        log.append(step(2, 7.0))
    assert [(r["step"], r["loss"]) for r in MetricsLog.read(tmp_path / "m")] == [(1, 1.0), (2, 7.0)]


def test_killed_while_truncating_leaves_the_old_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "m", step(1), step(2))

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("stitch_ray.runs.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(path).truncate_after(1)
    assert steps(MetricsLog.read(path)) == [1, 2]


def test_tail_gives_every_record_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "m"
    tail = Tail(path)
    log = MetricsLog(path)
    assert tail.new() == []
    log.append(step(1))
    with path.open("a") as file:
        file.write(json.dumps(step(2))[:10])
        file.flush()
        assert steps(tail.new()) == [1]
        file.write(json.dumps(step(2))[10:] + "\n")
    assert steps(tail.new()) == [2]
    assert tail.new() == []
    assert not tail.rewound


def test_tail_starts_again_after_truncation_even_if_the_log_has_grown_past_it(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m")
    tail = Tail(log.path)
    for number in (1, 2, 3):
        log.append(step(number))
    assert steps(tail.new()) == [1, 2, 3]
    for _ in range(2):  # twice: the second replacement may be given the inode of the first file
        log.truncate_after(1)
        for number in (2, 3, 4, 5):
            log.append(step(number))
    assert steps(tail.new()) == [1, 2, 3, 4, 5]
    assert tail.rewound
    assert tail.new() == []
    assert not tail.rewound


def test_tail_does_not_rewind_when_there_was_nothing_to_drop(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m")
    log.append(step(1))
    tail = Tail(log.path)
    tail.new()
    log.truncate_after(1)
    log.append(step(2))
    assert steps(tail.new()) == [2]
    assert not tail.rewound


def test_tensorboard_has_the_scalars_of_the_log(tmp_path: Path) -> None:
    answers = {"kind": "answers", "step": 2, "tasks": {"qa": {"exact_match": 0.25, "examples": 4}}}
    write_tensorboard(
        [{"kind": "start", "step": 0}, step(1, 3.0), step(2, math.nan), validation(2, 2.5), answers], tmp_path
    )
    found = scalars_in(tmp_path)
    assert found.keys() == {
        "train/loss",
        "train/loss/qa",
        "train/task_weight/qa",
        "lr",
        "grad_norm",
        "tokens_per_second",
        "validation/loss",
        "validation/loss/qa",
        "answers/exact_match/qa",
    }
    assert found["train/loss"][0] == (1, 3.0)
    assert math.isnan(found["train/loss"][1][1])
    assert found["validation/loss/qa"] == [(2, 2.5)]
    assert found["answers/exact_match/qa"] == [(2, 0.25)]


def test_tensorboard_of_a_resumed_run_has_every_step_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m")
    tail = Tail(log.path)
    board = TensorBoard(tmp_path / "tensorboard")
    for number in (1, 2, 3):
        log.append(step(number))
        board.write(tail.new())
    log.truncate_after(2)
    log.append(step(3, 5.0))
    records = tail.new()
    assert tail.rewound
    board.close()
    board = TensorBoard(tmp_path / "tensorboard")
    board.write(records)
    assert scalars_in(tmp_path / "tensorboard")["train/loss"] == [(1, 1.0), (2, 1.0), (3, 5.0)]


def test_a_running_tensorboard_is_told_to_forget(tmp_path: Path) -> None:
    """It reads the files in the order of their names and never leaves one that was removed; START clears it."""
    from tensorboardX.proto.event_pb2 import SessionLog

    for _ in range(2):
        TensorBoard(tmp_path).close()
    old, new = sorted(tmp_path.glob("events.out.tfevents.*"))
    assert old.read_bytes() == b""
    (start,) = [event for event in events_in(new) if event.HasField("session_log")]
    assert (start.step, start.session_log.status) == (0, SessionLog.START)


def test_flops_of_a_token() -> None:
    assert flops_per_token(1_000) == 6_000
    assert flops_per_token(1_000, num_trainable=10) == 4_020
    assert flops_per_token(0, num_layers=2, width=8, length=16) == 12 * 2 * 8 * 16


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA A10", 125),
        ("Tesla V100-SXM2-16GB", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA L40", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peak_is_known_only_for_the_devices_in_the_table(name: str, tflops: float | None) -> None:
    assert peak_flops(name) == (None if tflops is None else tflops * 1e12)

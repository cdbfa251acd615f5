"""What a training run did, as `metrics.jsonl`: one JSON object a line, written by one process and read by everybody.

Every record has `kind` and `step` (optimizer steps done when it was written):

start        workers, resumed_from, warnings (of damaged checkpoints; only where there are any)
step         epoch, loss, tasks {name: loss}, task_weights {name: weight}, lr, grad_norm, tokens, loss_tokens,
             tokens_per_second, seconds, peak_memory_mb, mfu (GPU only), workers, padding (share of computed positions)
validation   loss, tasks {name: loss}, perplexity, examples, best
checkpoint   seconds, bytes
answers      tasks {name: {exact_match, examples}}

The file is the truth: TensorBoard's files, the progress bar and the report are made from it.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from stitch_ray.errors import UserError
from stitch_ray.runs import atomic_path

Record = dict[str, Any]

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

# Dense bf16 (V100, T4: fp16) tensor-core TFLOP/s as NVIDIA publishes them; not measured here. The first match counts.
_PEAK_TFLOPS = (
    (r"H100.*(PCIe|NVL)|H200 NVL", None),  # slower variants that are not listed here
    (r"\bG?H[12]00\b", 989.0),
    (r"\bA100\b", 312.0),
    (r"\bL40S\b", 362.0),
    (r"\bL4\b", 121.0),
    (r"\bA10\b", 125.0),
    (r"\bV100\b", 125.0),
    (r"\bT4\b", 65.0),
)


class MetricsLog:
    """Appends records to `path`. One writer at a time; a line that a killed one left unfinished is removed first.

    JSON has no NaN and no infinity: such a number is written as the string "nan", "inf" or "-inf", so that every JSON
    reader can read the file and a diverging run still shows; `read` and `Tail` turn it back into a number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        complete = _complete(path.read_bytes())
        if len(complete) < path.stat().st_size:
            os.truncate(path, len(complete))

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record; other processes see it when this returns."""
        self._file.write(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop what was recorded beyond `step`, whole or not at all: training resumes there and records it again.

        The file is replaced, so that a writer which is still alive somewhere no longer reaches it.
        """
        lines = _complete(self.path.read_bytes()).splitlines(keepends=True)
        kept = [line for number, line in enumerate(lines, 1) if _parse(line, self.path, number)["step"] <= step]
        if len(kept) == len(lines):
            return
        with atomic_path(self.path) as temporary:
            temporary.write_bytes(b"".join(kept))
        self._file.close()
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def read(path: Path) -> list[Record]:
        """All records; none if there is no file yet. A last line without its end is being written and left out.

        Raises UserError naming file and line for a line that is not a JSON object.
        """
        if not path.exists():
            return []
        lines = _complete(path.read_bytes()).splitlines()
        return [_parse(line, path, number) for number, line in enumerate(lines, 1)]


class Tail:
    """Reads a `metrics.jsonl` while it grows.

    When the file was replaced (`MetricsLog.truncate_after`), `new` starts again with its first record and sets
    `rewound`: what was made from earlier records is to be made anew.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rewound = False
        # Kept open: an inode in use is not given to another file, so a replaced file is always told apart.
        self._file: IO[bytes] | None = None
        self._lines = 0

    def new(self) -> list[Record]:
        """The records since the last call; none while there is no file."""
        self.rewound = False
        try:
            now = self.path.stat()
        except FileNotFoundError:
            return []
        if self._file is None or not os.path.samestat(os.fstat(self._file.fileno()), now):
            self.rewound = self._file is not None
            self.close()
            self._file = self.path.open("rb")
        start = self._file.tell()
        data = _complete(self._file.read())
        self._file.seek(start + len(data))
        lines = data.splitlines()
        self._lines += len(lines)
        return [_parse(line, self.path, n) for n, line in enumerate(lines, self._lines - len(lines) + 1)]

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._lines = None, 0


class TensorBoard:
    """Scalars in `folder` for TensorBoard, always from the first record on: files of an earlier run are emptied.

    A resumed or rewound run makes a new one and writes its whole log, so no step is there twice; a TensorBoard that is
    running at that moment is told to forget what it has.
    """

    def __init__(self, folder: Path) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        earlier = list(folder.glob("events.out.tfevents.*"))
        for file in earlier:
            os.truncate(file, 0)  # a running TensorBoard never moves on from a file that was removed
        # Written in this thread: SummaryWriter's queue and process semaphores are slower and outlive a killed driver.
        self._events = EventsWriter(str(folder / "events"), f".{len(earlier):04}")
        start = SessionLog(status=SessionLog.START)
        self._events.write_event(Event(step=0, wall_time=time.time(), session_log=start))
        self._events.flush()

    def write(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add records; on disk when this returns."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        for record in records:
            values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record) if value is not None]
            if values:
                summary = Summary(value=values)
                self._events.write_event(Event(step=record["step"], wall_time=time.time(), summary=summary))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def write_tensorboard(records: Iterable[Mapping[str, Any]], folder: Path) -> None:
    """Make TensorBoard's files of a whole log."""
    board = TensorBoard(folder)
    board.write(records)
    board.close()


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Tags and values of one record in TensorBoard."""
    if record["kind"] == "step":
        yield "train/loss", record["loss"]
        yield from ((f"train/loss/{task}", loss) for task, loss in record["tasks"].items())
        yield from ((f"train/task_weight/{task}", weight) for task, weight in record["task_weights"].items())
        yield from ((name, record.get(name)) for name in ("lr", "grad_norm", "tokens_per_second", "mfu"))
    elif record["kind"] == "validation":
        yield "validation/loss", record["loss"]
        yield from ((f"validation/loss/{task}", loss) for task, loss in record["tasks"].items())
    elif record["kind"] == "answers":
        yield from ((f"answers/exact_match/{task}", found["exact_match"]) for task, found in record["tasks"].items())


def flops_per_token(
    num_parameters: int, *, num_trainable: int | None = None, num_layers: int = 0, width: int = 0, length: float = 0
) -> float:
    """Floating-point operations that training needs for one token: 6 N + 12 layers x width x length.

    Chowdhery et al. 2022 (PaLM), Appendix B; the 6 N of full training is 2 N forward, 2 N backward to the activations
    and 2 N to the weights (Kaplan et al. 2020, Sec. 2.1), the last only for the `num_trainable` (default: all).

    num_parameters: those that every token is multiplied with, so without a table of input embeddings of its own.
    width: heads x size of a head. length: tokens that a token's document has, on average over tokens
    (sum(l ** 2) / sum(l)). As in PaLM, causal attention counts as full, and recomputed activations do not count.
    """
    trainable = num_parameters if num_trainable is None else num_trainable
    return 4.0 * num_parameters + 2.0 * trainable + 12.0 * num_layers * width * length


def peak_flops(device_name: str) -> float | None:
    """Dense 16-bit FLOP/s of a GPU by the name torch gives it; None for one that is not in the table, or a MIG part."""
    if "MIG" in device_name:
        return None
    found = next((tflops for pattern, tflops in _PEAK_TFLOPS if re.search(pattern, device_name)), None)
    return None if found is None else found * 1e12


def _complete(data: bytes) -> bytes:
    """Without a last line that has no end."""
    return data[: data.rfind(b"\n") + 1]


def _parse(line: bytes, path: Path, number: int) -> Record:
    try:
        record = _restored(json.loads(line))
    except ValueError as error:
        raise UserError(f"{path}:{number} is not JSON ({error}); remove the line") from error
    if not isinstance(record, dict):
        raise UserError(f"{path}:{number} is not a JSON object; remove the line")
    return record


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(inner) for key, inner in value.items()}
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value

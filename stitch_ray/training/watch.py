"""What happens beside the training, in the driver: progress bar, warnings, live report, TensorBoard's files."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stitch_ray.runs import Progress, Step
from stitch_ray.training.job import METRICS
from stitch_ray.training.metrics import MetricsLog, Tail, TensorBoard

_POLL_S = 0.5
_REPORT_EVERY_S = 10.0

OnRecord = Callable[[Mapping[str, Any]], None]


@contextmanager
def watching(
    folder: Path,
    *,
    progress: Progress,
    total_steps: int,
    write_report: Callable[[], None],
    on_record: OnRecord = lambda record: None,
) -> Iterator[None]:
    """Follow `metrics.jsonl` in a thread while the block runs; what comes last is seen before it ends.

    `write_report` is called every ten seconds if there is something new. An error in the thread is raised at the end.
    """
    watcher = _Watcher(folder, progress, total_steps, write_report, on_record)
    thread = threading.Thread(target=watcher.run, name="watch-training", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watcher.stop.set()
        thread.join()
    if watcher.error is not None:
        raise watcher.error


class _Watcher:
    def __init__(
        self,
        folder: Path,
        progress: Progress,
        total_steps: int,
        write_report: Callable[[], None],
        on_record: OnRecord,
    ) -> None:
        self.folder, self.progress, self.total_steps = folder, progress, total_steps
        self.write_report, self.on_record = write_report, on_record
        self.stop = threading.Event()
        self.error: Exception | None = None
        self.tokens = 0
        # Those of earlier commands were shown then, and after a rewind all records come again.
        self.warned = {text for record in MetricsLog.read(folder / METRICS) for text in record.get("warnings", ())}

    def run(self) -> None:
        tail, board = Tail(self.folder / METRICS), TensorBoard(self.folder / "tensorboard")
        reported = time.monotonic()
        try:
            stopping = False
            while not stopping:
                stopping = self.stop.wait(_POLL_S)
                records = tail.new()
                if tail.rewound:
                    board.close()
                    board = TensorBoard(self.folder / "tensorboard")
                    self.tokens = 0
                board.write(records)
                for record in records:
                    self._show(record)
                    self.on_record(record)
                if records and time.monotonic() - reported > _REPORT_EVERY_S:
                    self.write_report()
                    reported = time.monotonic()
        except Exception as error:
            self.error = error
        finally:
            tail.close()
            board.close()

    def _show(self, record: Mapping[str, Any]) -> None:
        for text in record.get("warnings", ()):
            if text not in self.warned:
                self.warned.add(text)
                print(f"warning: {text}", file=sys.stderr, flush=True)
        if record["kind"] == "step":
            self.tokens += int(record["tokens"])
            self.progress(
                Step(stage="training", done=record["step"], total=self.total_steps, tokens=self.tokens, unit="steps")
            )

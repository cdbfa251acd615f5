"""ZeRO stages side by side: memory of a worker, step time, checkpoints. As a program under torchrun: one worker.

torchrun --nproc-per-node 2 -m benchmarks.finetuning.memory JOB.json REPEATS
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.finetuning import workload
from benchmarks.finetuning.workload import encoded, job, listed, log_line, make_model, prepare, read_job
from benchmarks.harness import median, table
from stitch_ray.records import Example

_SIDES = ((1, 1), (1, 2), (2, 2), (3, 2))
"""(stage, workers). With one worker nothing is shared out, and the stages differ little."""

_ROW_TOKENS = 256


def compare(folder: Path, source: str, data: Sequence[Example], *, repeats: int) -> tuple[str, dict[str, Any]]:
    """A table of stages and workers, with what DeepSpeed's own checkpoint costs beside ours."""
    model = folder / "llama-zero"
    parameters = make_model(model, data, width=768, inner=2048, layers=10)
    records = encoded(data, model, max_length=_ROW_TOKENS)
    prepared = prepare(folder / "memory" / "data", records)
    lines, facts = [], {}
    for stage, workers in _SIDES:
        run = folder / "memory" / f"{stage}-{workers}"
        path = job(
            run,
            prepared,
            model,
            max_steps=2 * repeats + 2,
            workers=workers,
            max_length=_ROW_TOKENS,
            batch={"accumulation": 2 // workers},
            zero={"stage": stage},
        )
        command = workload.torchrun(workers, "benchmarks.finetuning.memory", str(path), str(repeats))
        workload.run(command, threads=1, log=run / "log.txt")
        of_ranks = [json.loads((run / f"rank-{rank}.json").read_text("utf-8")) for rank in range(workers)]
        first = of_ranks[0]
        name = f"ZeRO-{stage}, {workers} worker{'s' * (workers > 1)}"
        mb = {key: max(rank[key] for rank in of_ranks) for key in ("start", "held", "training", "saving")}
        facts[name] = {"ranks": of_ranks, **mb}
        log_line(f"{name}: {mb['training']:,.0f} MB in training, steps {listed(first['steps'], 2)} s")
        lines.append(
            {
                "side": name,
                "held between steps, MB": f"{mb['held']:,.0f}",
                "peak in steps": f"{mb['training']:,.0f}",
                "peak at start": f"{mb['start']:,.0f}",
                "peak while saving": f"{mb['saving']:,.0f}",
                "step, s": f"{median(first['steps']):.2f}",
                "save, s (each)": listed(first["ours"], 2),
                "DeepSpeed's, s (each)": listed(first["deepspeed"], 2),
                "MB": f"{first['ours_bytes'] / 1e6:,.0f}",
                "DeepSpeed's MB": f"{first['deepspeed_bytes'] / 1e6:,.0f}",
            }
        )
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    megabytes = parameters * 4 / 1e6
    note = (
        f"Llama of {parameters / 1e6:.0f} M parameters, float32 ({megabytes:,.0f} MB), 2 packed rows of {_ROW_TOKENS} "
        f"tokens of {source} a step, 1 thread a worker; with 1 worker it runs both rows itself. Memory: anonymous pages "
        "of the worker with most of them (RssAnon, read every 5 ms) above what they were once everything was imported. "
        "With one worker, weights and optimizer are the model "
        f"({megabytes:,.0f} MB), its float32 master copy, and two moments; ZeRO-1 shares out the last three, 2 gradients "
        "too, 3 weights too. At the start every worker loads the whole model, whatever the stage. Ours is on the disk and "
        f"hashed when the save ends and fits any number of workers; {repeats} saves each, in turn, a step between."
    )
    return f"{table(lines)}\n\n{note}", facts


def _anonymous_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("/proc/self/status has no RssAnon: this section needs Linux")


class _Meter:
    """The most anonymous memory above a baseline, read from a thread."""

    def __init__(self) -> None:
        self._baseline = self._most = _anonymous_mb()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self._most = max(self._most, _anonymous_mb())
            time.sleep(0.005)

    @contextmanager
    def peak(self, found: dict[str, Any], name: str) -> Iterator[None]:
        """The peak of the block, to `found[name]`."""
        self._most = _anonymous_mb()
        yield
        found[name] = max(self._most, found.get(name, 0.0) + self._baseline, _anonymous_mb()) - self._baseline

    def now(self) -> float:
        return _anonymous_mb() - self._baseline


def main() -> None:
    """Warm up, train, then save in both ways in turn; what was found to rank-N.json."""
    import deepspeed  # noqa: F401  (part of the baseline)
    import torch
    import torch.distributed as dist

    from stitch_ray.training.worker import Worker

    described, repeats = read_job(Path(sys.argv[1])), int(sys.argv[2])
    dist.init_process_group("gloo")
    dist.barrier()
    torch.ones(2, 2) @ torch.ones(2, 2)
    meter, found = _Meter(), dict[str, Any](steps=[], ours=[], deepspeed=[])
    with meter.peak(found, "start"):
        worker = Worker(described)
    worker.engine.train()
    worker._train_step(0)
    worker._train_step(1)
    with meter.peak(found, "training"):
        for number in range(2, 2 + repeats):
            found["steps"].append(_seconds(lambda number=number: worker._train_step(number)))
    found["held"] = meter.now()
    ours, theirs = described.folder / "checkpoints", described.folder / "deepspeed"
    for number in range(2 + repeats, 2 + 2 * repeats):
        worker._train_step(number)
        with meter.peak(found, "saving"):
            found["ours"].append(_seconds(worker._save))
        found["deepspeed"].append(
            _seconds(lambda number=number: worker.engine.save_checkpoint(str(theirs), str(number)))
        )
        dist.barrier()
        if worker.rank == 0:
            found["ours_bytes"] = _bytes(sorted(ours.glob("step-*"))[-1])
            found["deepspeed_bytes"] = _bytes(theirs / str(number))
            shutil.rmtree(theirs)
        dist.barrier()
    path = described.folder / f"rank-{worker.rank}.json"
    path.write_text(json.dumps(found), "utf-8")
    dist.destroy_process_group()


def _seconds(call: Any) -> float:
    """Seconds until all workers are through."""
    import torch.distributed as dist

    dist.barrier()
    started = time.perf_counter()
    call()
    dist.barrier()
    return time.perf_counter() - started


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


if __name__ == "__main__":
    main()

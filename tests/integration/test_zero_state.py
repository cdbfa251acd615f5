"""Training state survives new processes, other numbers of workers and other ZeRO stages.

This file is also a program: `python test_zero_state.py FOLDER PART` trains a tiny Llama in groups of real gloo processes,
every group in new ones, and leaves states and gradient norms in FOLDER. The tests compare them.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.errors import UserError
from stitch_ray.training.state import load_state, read_weights

pytestmark = [pytest.mark.numeric, pytest.mark.resume]

MICRO_BATCHES, STEPS, TOKENS = 4, 6, 12


class Run(NamedTuple):
    stage: int = 1
    dtype: str = "float32"
    offload: str = "none"
    method: str = "full"

    @property
    def name(self) -> str:
        return "-".join(map(str, self))


WITH_ONE = [Run(1), Run(3)]
WITH_TWO = [*WITH_ONE, Run(2), Run(3, "bfloat16", offload="all"), Run(3, method="lora")]
# Of two workers, in the slow tests.
REST = [*(Run(stage, "bfloat16") for stage in (1, 2, 3)), Run(1, offload="optimizer"), Run(2, method="lora")]
ALL = [
    *(pytest.param(1, run, id=f"1-{run.name}") for run in WITH_ONE),
    *(pytest.param(2, run, id=f"2-{run.name}") for run in WITH_TWO),
    *(pytest.param(2, run, id=f"2-{run.name}", marks=pytest.mark.slow) for run in REST),
]


def config(run: Run) -> FinetuneConfig:
    return FinetuneConfig.model_validate(
        {
            "model": {"path": "unused", "dtype": run.dtype},
            "tasks": [{"name": "task", "data": "unused"}],
            "method": run.method,
            "zero": {"stage": run.stage, "offload": run.offload},
            "optimizer": {"weight_decay": 0.1, "max_grad_norm": 0.5},
            "workers": 2,
            "batch": {"accumulation": 2},
        }
    )


def learning_rate(step: int) -> float:
    return 1e-3 / (1 + step)


def build_model(method: str = "full") -> torch.nn.Module:
    """Odd sizes: no parameter of the head or the norms is a multiple of two workers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 63, "intermediate_size": 51, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 22, "tie_word_embeddings": False}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear"))
    built: torch.nn.Module = model
    return built


def share_of_loss(model: torch.nn.Module, step: int, slot: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + slot)
    ids = torch.randint(0, 97, (1, TOKENS), generator=generator)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    total = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
    return total / (MICRO_BATCHES * (TOKENS - 1))


# -------------------------------------------------------------------------------------------- in the worker processes


class Trainer:
    """An engine in one of several processes."""

    def __init__(self, run: Run, load: Path | None = None) -> None:
        import torch.distributed as dist

        from stitch_ray.training import zero

        self.rank, self.world_size, self.run = dist.get_rank(), dist.get_world_size(), run
        self.rounds = MICRO_BATCHES // self.world_size
        self.engine = zero.engine(
            build_model(run.method),
            config(run),
            world_size=self.world_size,
            micro_batches_per_worker=self.rounds,
            device=torch.device("cpu"),
        )
        if load:
            load_state(self.engine, load)

    def steps(self, steps: Iterable[int], factor: float = 1.0) -> list[float]:
        from stitch_ray.training import zero

        norms = []
        for step in steps:
            for slot in range(self.rank, MICRO_BATCHES, self.world_size):
                zero.backward(self.engine, factor * share_of_loss(self.engine, step, slot))
            norms.append(zero.step(self.engine, learning_rate(step)))
        return norms

    def save(self, folder: Path) -> None:
        import torch.distributed as dist

        from stitch_ray.training.state import save_state

        folder.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        files = save_state(self.engine, folder, self.rank, self.world_size)
        assert all((folder / file).is_file() for file in files)
        dist.barrier()


def straight(root: Path, runs: Iterable[Run]) -> None:
    for run in runs:
        trainer = Trainer(run)
        folder = root / f"{trainer.world_size}-{run.name}"
        trainer.save(folder / "start")
        norms = trainer.steps(range(3))
        trainer.save(folder / "middle")
        norms += trainer.steps(range(3, STEPS))
        trainer.save(folder / "end")
        (folder / f"norms-{trainer.rank}.json").write_text(json.dumps(norms))


def resumed(root: Path, runs: Iterable[Run]) -> None:
    """Goes on from the middle, in other processes, and after a step whose gradient is not finite."""
    for run in runs:
        from_folder = root / f"{os.environ['WORLD_SIZE']}-{run.name}"
        trainer = Trainer(run, from_folder / "middle")
        with pytest.raises(FloatingPointError, match="not finite"):
            trainer.steps([3], factor=float("nan"))
        trainer.save(from_folder / "after-nan")
        trainer.steps(range(3, STEPS))
        trainer.save(from_folder / "resumed")


def moved(root: Path, source: str, target: str, run: Run, steps: Iterable[int]) -> None:
    trainer = Trainer(run, root / source)
    trainer.steps(steps)
    trainer.save(root / target)


def in_new_processes(root: Path, world_size: int, work: Callable[[], None]) -> None:
    """Run `work` in `world_size` forks of this process that are a process group. Imports are paid for once."""
    import torch.distributed as dist

    store = root / f".store-{os.urandom(4).hex()}"
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        status = 1
        try:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    for _ in children:
        _, status = os.wait()
        if status:
            raise SystemExit(1)  # `made` kills the peers that still wait for the lost one


def main(root: Path, part: str) -> None:
    import deepspeed  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    from stitch_ray.training import state, zero

    torch.set_num_threads(1)
    state._FILE_BYTES = 40_000  # several files a worker
    plain = zero.zero_config

    def really_sharded(*args: Any, **kwargs: Any) -> dict[str, Any]:
        made = plain(*args, **kwargs)
        # Stage 3 would keep parameters below 100,000 elements whole: here all of them. Like this only the norms.
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 100
        return made

    zero.zero_config = really_sharded
    if part == "rest":
        in_new_processes(root, 2, lambda: straight(root, REST))
        in_new_processes(root, 2, lambda: resumed(root, REST))
        return
    in_new_processes(root, 2, lambda: straight(root, WITH_TWO))
    in_new_processes(root, 1, lambda: straight(root, WITH_ONE))
    in_new_processes(root, 2, lambda: resumed(root, WITH_TWO))
    in_new_processes(root, 1, lambda: resumed(root, WITH_ONE))

    def on_one_worker() -> None:
        for run in WITH_ONE:
            moved(root, f"2-{run.name}/middle", f"moved/{run.name}-one", run, [3, 4])
        moved(root, f"2-{Run(3).name}/middle", "moved/stage-3-to-1", Run(1), [3, 4, 5])

    def back_on_two() -> None:
        for run in WITH_ONE:
            moved(root, f"moved/{run.name}-one", f"moved/{run.name}-two", run, [5])

    in_new_processes(root, 1, on_one_worker)
    in_new_processes(root, 2, back_on_two)


# ---------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("zero"), "core")


@pytest.fixture(scope="module")
def rest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("zero"), "rest")


@pytest.fixture
def outcome(request: pytest.FixtureRequest, run: Run) -> Path:
    """The folder that holds the states of this run."""
    found: Path = request.getfixturevalue("rest" if run in REST else "core")
    return found


def made(root: Path, part: str) -> Path:
    command = [sys.executable, "-W", "ignore", __file__, str(root), part]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=400)
    finally:
        if process.poll() != 0:  # a worker that lost its peers waits for them
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
    assert process.returncode == 0, output[-5000:]
    return root


def entries(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
            found[f"step of {path.name}"] = torch.tensor(int(file.metadata()["adam_step"]))
    return found


def assert_alike(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], bound: float) -> None:
    """To rounding: `bound` for all but a few weights whose gradient is next to zero, and so rounding itself.

    AdamW divides by the gradient's size and makes a part of the learning rate of it, which is 1e-3 at most here.
    """
    assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in wanted.items()}
    off = torch.cat([(one - wanted[name]).abs().flatten() for name, one in found.items()])
    assert off.max() < 1e-4
    assert (off > bound).sum() <= 3 + len(off) / 10_000


def assert_same(one: Path, other: Path) -> None:
    torch.testing.assert_close(entries(one), entries(other), rtol=0, atol=0)


@pytest.mark.parametrize(("workers", "run"), ALL)
def test_resumed_in_new_processes_is_bitwise_what_it_would_have_been(outcome: Path, workers: int, run: Run) -> None:
    folder = outcome / f"{workers}-{run.name}"
    assert_same(folder / "resumed", folder / "end")


@pytest.mark.parametrize(("workers", "run"), ALL)
def test_a_gradient_that_is_not_finite_changes_nothing(outcome: Path, workers: int, run: Run) -> None:
    folder = outcome / f"{workers}-{run.name}"
    assert_same(folder / "after-nan", folder / "middle")


@pytest.mark.parametrize("run", WITH_ONE, ids=lambda run: run.name)
def test_two_workers_then_one_then_two_is_as_if_it_had_been_two(outcome: Path, run: Run) -> None:
    moved, stayed = read_weights(outcome / f"moved/{run.name}-two"), read_weights(outcome / f"2-{run.name}/end")
    assert_alike(dict(moved), dict(stayed), 1e-6)


def test_a_state_of_two_workers_in_stage_3_goes_on_with_one_in_stage_1(core: Path) -> None:
    moved, stayed = read_weights(core / "moved/stage-3-to-1"), read_weights(core / f"2-{Run(3).name}/end")
    assert_alike(dict(moved), dict(stayed), 1e-6)


@pytest.mark.parametrize(("workers", "run"), ALL)
def test_all_workers_together_do_what_one_process_of_plain_pytorch_does(outcome: Path, workers: int, run: Run) -> None:
    """Shares of the loss add up over micro-batches and workers: weights, and the norm that every worker is told."""
    weights, norms = plain_pytorch(run.method)
    rough = run.dtype == "bfloat16"
    folder = outcome / f"{workers}-{run.name}"
    found = dict(read_weights(folder / "end"))
    if rough:
        torch.testing.assert_close(found, weights, rtol=0, atol=4e-3)
    else:
        assert_alike(found, weights, 2e-6)
    for rank in range(workers):
        told = json.loads((folder / f"norms-{rank}.json").read_text())
        assert told == pytest.approx(norms, rel=0.02 if rough else 1e-5)


@functools.cache
def plain_pytorch(method: str) -> tuple[dict[str, torch.Tensor], list[float]]:
    model = build_model(method)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [p for p in trainable.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trainable.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for slot in range(MICRO_BATCHES):
            share_of_loss(model, step, slot).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trainable.values(), 0.5)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in trainable.items()}, norms


@pytest.mark.parametrize(("workers", "run"), ALL)
def test_a_state_holds_every_trainable_parameter_under_its_name(outcome: Path, workers: int, run: Run) -> None:
    trainable = {name: p for name, p in build_model(run.method).named_parameters() if p.requires_grad}
    start = outcome / f"{workers}-{run.name}/start"
    found = {name: tensor for name, tensor in entries(start).items() if not name.startswith("step of")}
    parts = ("weight", "exp_avg", "exp_avg_sq")
    assert {name: tensor.shape for name, tensor in found.items()} == {
        f"{part}/{name}": p.shape for name, p in trainable.items() for part in parts
    }
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(not tensor.any() for name, tensor in found.items() if name.startswith("exp"))
    if run.dtype == "float32":
        torch.testing.assert_close(dict(read_weights(start)), trainable, rtol=0, atol=0)


def test_workers_share_out_the_writing(core: Path) -> None:
    files = [path.name for path in (core / f"2-{Run(2).name}/end").iterdir()]
    sizes = [
        sum((core / f"2-{Run(2).name}/end" / file).stat().st_size for file in files if file.startswith(f"state-{r}"))
        for r in ("00000", "00001")
    ]
    assert len(files) > 4
    assert min(sizes) > 0.8 * max(sizes)


def test_weights_are_read_without_deepspeed(core: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from stitch_ray.training.state import read_weights; "
        f"print(len(read_weights(Path({str(core / f'2-{Run(2).name}/end')!r})))); "
        "assert 'deepspeed' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(printed.stdout) == len(dict(build_model().named_parameters()))


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 3)
    other = {"weight": torch.zeros(3, 2), "bias": torch.zeros(4)}
    parts = ("weight", "exp_avg", "exp_avg_sq")
    state = {f"{part}/{name}": value.clone() for name, value in other.items() for part in parts}
    save_file(state, tmp_path / "state-00000-00000.safetensors", {"adam_step": "3"})
    engine: Any = SimpleNamespace(module=model)
    with pytest.raises(
        UserError, match=r"3 entries differ, the first is exp_avg/bias \(saved shape \(4,\), now \(3,\)\)"
    ):
        load_state(engine, tmp_path)
    with pytest.raises(UserError, match="no checkpoint of finetune"):
        read_weights(tmp_path / "absent")


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
def test_the_configuration_says_what_is_shared_out_and_where_it_is_kept(stage: int, offload: str) -> None:
    if offload == "all" and stage != 3:
        return
    from stitch_ray.training.zero import zero_config

    made = zero_config(config(Run(stage, "bfloat16", offload)), world_size=3, micro_batches_per_worker=2)
    zero = made["zero_optimization"]
    assert (made["train_batch_size"], made["gradient_accumulation_steps"]) == (6, 2)
    assert (zero["stage"], "offload_optimizer" in zero, "offload_param" in zero) == (
        stage,
        offload != "none",
        offload == "all",
    )
    assert made["bf16"]["enabled"]
    assert made["gradient_clipping"] == 0.5
    assert made["zero_force_ds_cpu_optimizer"] is False


def test_matrices_decay_and_vectors_do_not() -> None:
    from stitch_ray.training.zero import parameter_groups

    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Linear(3, 1))
    model[2].requires_grad_(False)
    decayed, kept = parameter_groups(model.parameters(), 0.1)
    assert (decayed["params"], decayed["weight_decay"]) == ([model[0].weight], 0.1)
    assert [p.shape for p in kept["params"]] == [(3,), (3,), (3,)]
    assert kept["weight_decay"] == 0.0
    assert len(parameter_groups([model[0].weight], 0.1)) == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""What a checkpoint holds of model and optimizer, whatever the number of workers and the ZeRO stage.

Of every trainable parameter: the float32 weight and Adam's two moments, whole, under the name that
`model.named_parameters()` gives, as safetensors entries `weight/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME`. Adam's
step count is in the header of every file. How entries are spread over files means nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stitch_ray.errors import UserError

if TYPE_CHECKING:  # DeepSpeed takes seconds to import; who only reads weights needs none of it
    import deepspeed

_PARTS = ("weight", "exp_avg", "exp_avg_sq")
_FILE_BYTES = 2**30
"""A worker starts another file once it holds this much: more memory than this and a parameter is never needed."""


def state_file(rank: int, number: int) -> str:
    """Name of the `number`-th file that worker `rank` writes."""
    return f"state-{rank:05d}-{number:05d}.safetensors"


@torch.no_grad()
def save_state(engine: deepspeed.DeepSpeedEngine, folder: Path, rank: int, world_size: int) -> list[str]:
    """Write this worker's share of the state into `folder`; returns the names of its files. Collective."""
    step = int(_adam_steps(engine)[0].item())
    header = {"adam_step": str(step)}  # one key: safetensors writes several in any order
    trainable = _trainable(engine)
    owners = _owners([_num_elements(parameter) for parameter in trainable.values()], world_size)
    files: list[str] = []
    held: dict[str, torch.Tensor] = {}

    def flush() -> None:
        files.append(state_file(rank, len(files)))
        save_file(held, folder / files[-1], header)
        held.clear()

    for (name, parameter), owner in zip(trainable.items(), owners, strict=True):
        for part in _PARTS:
            whole = _gather(parameter, part)
            if owner == rank:
                held[f"{part}/{name}"] = whole.to("cpu", torch.float32).contiguous()
        if sum(tensor.nbytes for tensor in held.values()) >= _FILE_BYTES:
            flush()
    if held:
        flush()
    return files


@torch.no_grad()
def load_state(engine: deepspeed.DeepSpeedEngine, folder: Path) -> None:
    """Put the state in `folder` into the engine. Every worker reads only what it owns. Collective.

    Raises UserError if the trainable parameters are not those of `folder`, by name or shape.
    """
    saved = _Entries(folder)
    trainable = _trainable(engine)
    _check_same(saved, trainable, folder)
    for step in _adam_steps(engine):
        step.fill_(saved.adam_step)
    for name, parameter in trainable.items():
        for part in _PARTS:
            _scatter(parameter, part, saved, f"{part}/{name}")
    _refresh_weights(engine.optimizer)


def masters(engine: deepspeed.DeepSpeedEngine) -> list[torch.Tensor]:
    """This worker's flat float32 weights, which AdamW updates: its part of all trainable parameters."""
    # Stage 3; stages 1 and 2; stage 1 with bfloat16 weights.
    for attribute in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition"):
        if hasattr(engine.optimizer, attribute):
            return list(getattr(engine.optimizer, attribute))
    raise TypeError(f"{type(engine.optimizer).__name__} is no ZeRO optimizer of DeepSpeed 0.19")


def read_weights(folder: Path) -> Mapping[str, torch.Tensor]:
    """The float32 weights in `folder`, by parameter name; each is read when it is asked for."""
    return _Weights(_Entries(folder))


class _Entries:
    """The entries of all state files of a folder, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        files = [safe_open(path, framework="pt") for path in sorted(folder.glob("state-*.safetensors"))]
        if not files:
            raise UserError(f"{folder} holds no state-*.safetensors: it is no checkpoint of finetune")
        self.adam_step = int(files[0].metadata()["adam_step"])
        self.files = {entry: file for file in files for entry in file.keys()}  # noqa: SIM118

    def shape(self, entry: str) -> tuple[int, ...]:
        return tuple(self.files[entry].get_slice(entry).get_shape())

    def whole(self, entry: str) -> torch.Tensor:
        return self.files[entry].get_tensor(entry)

    def flat(self, entry: str, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) of the flattened entry; only the rows around them are read."""
        shape = self.shape(entry)
        if start == stop:
            return torch.empty(0)
        if not shape:  # a single number has no rows
            return self.whole(entry).reshape(1)
        row = math.prod(shape[1:])
        first = start // row
        rows = self.files[entry].get_slice(entry)[first : -(-stop // row)]
        return rows.reshape(-1)[start - first * row : stop - first * row]


class _Weights(Mapping[str, torch.Tensor]):
    def __init__(self, entries: _Entries) -> None:
        self.entries = entries
        self.names = sorted(entry.removeprefix("weight/") for entry in entries.files if entry.startswith("weight/"))

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.entries.whole(f"weight/{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Fragment(NamedTuple):
    """Elements [start, stop) of a flattened parameter: what this worker owns of its float32 state."""

    start: int
    stop: int


def _trainable(engine: deepspeed.DeepSpeedEngine) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


def _sharded(parameter: torch.nn.Parameter) -> bool:
    """Stage 3: the parameter itself is shared out, and `parameter.data` is empty most of the time."""
    return hasattr(parameter, "ds_id")


def _shape(parameter: torch.nn.Parameter) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if _sharded(parameter) else parameter.shape)


def _num_elements(parameter: torch.nn.Parameter) -> int:
    return parameter.ds_numel if _sharded(parameter) else parameter.numel()


def _owners(sizes: list[int], world_size: int) -> list[int]:
    """The rank that writes each parameter: always the one with the least to write so far."""
    loads = [0] * world_size
    owners = []
    for size in sizes:
        owners.append(min(range(world_size), key=loads.__getitem__))
        loads[owners[-1]] += size
    return owners


def _check_same(saved: _Entries, trainable: Mapping[str, torch.nn.Parameter], folder: Path) -> None:
    wanted = {f"{part}/{name}": _shape(parameter) for name, parameter in trainable.items() for part in _PARTS}
    found = {entry: saved.shape(entry) for entry in saved.files}
    different = sorted(entry for entry in wanted.keys() | found.keys() if wanted.get(entry) != found.get(entry))
    if different:
        entry = different[0]
        raise UserError(
            f"{folder} was saved by another model or adapter: {len(different)} entries differ, the first is {entry} "
            f"(saved shape {found.get(entry)}, now {wanted.get(entry)}). Resume with the settings of that run, "
            "or choose another --out"
        )


def _adam_steps(engine: deepspeed.DeepSpeedEngine) -> list[torch.Tensor]:
    """AdamW's counts of its steps; they are all equal."""
    return [engine.basic_optimizer.state[master]["step"] for master in masters(engine)]


def _gather(parameter: torch.nn.Parameter, part: str) -> torch.Tensor:
    """The whole float32 weight or moment of a parameter, on every worker. Collective."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if part == "weight":
        return safe_get_full_fp32_param(parameter)
    return safe_get_full_optimizer_state(parameter, part)


def _fragment(parameter: torch.nn.Parameter) -> _Fragment:
    if _sharded(parameter):
        size = parameter.ds_tensor.numel()
        start = min(torch.distributed.get_rank(parameter.ds_process_group) * size, parameter.ds_numel)
        return _Fragment(start, min(start + size, parameter.ds_numel))
    if parameter._hp_mapping is None:
        return _Fragment(0, 0)
    address = parameter._hp_mapping.lp_fragment_address
    return _Fragment(address.start, address.start + address.numel)


def _scatter(parameter: torch.nn.Parameter, part: str, saved: _Entries, entry: str) -> None:
    """Copy this worker's fragment of the entry into its flat float32 state.

    Not through safe_set_full_*: in stage 3 of DeepSpeed 0.19 that fails for a parameter whose size is no multiple of
    the number of workers, and it needs the whole parameter on every worker.
    """
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    fragment = _fragment(parameter)
    values = saved.flat(entry, *fragment)
    if _sharded(parameter):
        padded = torch.zeros(parameter.ds_tensor.numel())
        padded[: values.numel()] = values
        if part == "weight":
            safe_set_local_fp32_param(parameter, padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, part)
    elif values.numel():
        key = None if part == "weight" else part
        parameter._hp_mapping.get_hp_fragment(key).data.copy_(values)


def _refresh_weights(optimizer: Any) -> None:
    """Let the weights of forward and backward follow the float32 weights, as at the end of the optimizer's step."""
    if hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
        return
    optimizer._partition_all_parameters()
    for group in range(len(optimizer.fp32_partitioned_groups_flat)):
        optimizer._reassign_or_swap_out_partitioned_parameters(group)
    if optimizer.persistent_parameters:  # small ones that every worker keeps whole
        optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)

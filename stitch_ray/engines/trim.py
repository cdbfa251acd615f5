"""Run what follows the last attention only where somebody reads the result.

Everything behind the last layer's attention works position by position (output projection, MLP), so only the wanted
positions need it. The modules are found by watching one forward, not by name, and hooked for the length of a pass:
gather the wanted positions before, scatter the result back after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def find_positionwise(
    model: nn.Module, forward: Callable[[], object], last_attention: Callable[[], nn.Module | None]
) -> dict[str, nn.Module]:
    """The modules behind the last attention that can run at some positions only, by name.

    `forward` runs the model once; `last_attention` returns the module whose attention was computed last, and so tells,
    during that forward, what runs before and what behind it. A module is taken if it runs behind and nowhere else (Gemma
    3n's router does both), belongs to the same layer and holds a matrix (a projection or a whole MLP; norms are cheap).
    """
    order: list[tuple[str, nn.Module, nn.Module | None]] = []
    names = {module: name for name, module in model.named_modules()}
    handles = [
        module.register_forward_pre_hook(lambda m, _inputs: order.append((names[m], m, last_attention())))
        for module in names
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    last = last_attention()
    if last is None:
        return {}
    layer = names[last].rpartition(".")[0] + "."
    needed_before = {name for name, _, before in order if before is not last}
    taken: dict[str, nn.Module] = {}
    for name, module, _ in order:
        inside_taken = any(name.startswith(f"{outer}.") for outer in taken)
        if name not in needed_before and name.startswith(layer) and not inside_taken and _has_matrix(module):
            taken[name] = module
    return taken


@contextmanager
def only_at(modules: Sequence[nn.Module], positions: Tensor) -> Iterator[None]:
    """Inside, `modules` compute only at `positions`, flat indices into (rows x tokens); elsewhere they return zeros."""
    handles = []
    for module in modules:
        hooks = _GatherScatter(positions)
        handles += [module.register_forward_pre_hook(hooks.gather), module.register_forward_hook(hooks.scatter)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters())


class _GatherScatter:
    """A pair of hooks on one module. `shape` is the input's without its last axis; None: this call is left alone."""

    def __init__(self, positions: Tensor) -> None:
        self._positions = positions
        self._shape: torch.Size | None = None

    def gather(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not inputs or not isinstance(inputs[0], Tensor):
            self._shape = None
            return None
        shape = self._shape = inputs[0].shape[:-1]
        return tuple(  # some MLPs (Bloom, MPT) take the residual along
            value.flatten(0, -2)[self._positions][None]
            if isinstance(value, Tensor) and value.shape[:-1] == shape
            else value
            for value in inputs
        )

    def scatter(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        if self._shape is None:
            return None
        wanted = output[0] if isinstance(output, tuple) else output  # mixtures of experts return their routing too
        full = wanted.new_zeros(self._shape.numel(), wanted.shape[-1])
        full[self._positions] = wanted.flatten(0, -2)
        full = full.view(*self._shape, -1)
        return (full, *output[1:]) if isinstance(output, tuple) else full

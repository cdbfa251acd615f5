"""Run what follows the last attention only where somebody reads the result.

Everything behind the last layer's attention works position by position (output projection, MLP), so only the wanted
positions need it. The modules are found by watching one forward, not by name, and wrapped with hooks: gather the
wanted positions before, scatter the result back after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

_wanted: ContextVar[Tensor | None] = ContextVar("stitch_ray_wanted_positions", default=None)


@contextmanager
def only_at(positions: Tensor | None) -> Iterator[None]:
    """Inside, wrapped modules compute only at `positions`, flat indices into (rows x tokens). None: everywhere."""
    token = _wanted.set(positions)
    try:
        yield
    finally:
        _wanted.reset(token)


def trim_last_layer(model: nn.Module, forward: Callable[[], object], seen: Callable[[], nn.Module | None]) -> list[str]:
    """Wrap the positionwise modules behind the last attention; return their names.

    `forward` runs the model once. `seen` returns the attention module that computed last; during that forward it tells
    what ran before and what after the last one. A module is taken if it runs after the last attention, belongs to the
    same layer and holds a matrix (a projection or a whole MLP; norms are left alone, they are cheap).
    """
    order: list[tuple[str, nn.Module, nn.Module | None]] = []
    names = {module: name for name, module in model.named_modules()}
    handles = [
        module.register_forward_pre_hook(lambda m, _inputs: order.append((names[m], m, seen()))) for module in names
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    last = seen()
    if last is None:
        return []
    layer = names[last].rpartition(".")[0]
    taken: list[str] = []
    for name, module, before in order:
        nested = any(name.startswith(f"{outer}.") for outer in taken)
        if before is last and name.startswith(f"{layer}.") and not nested and _has_matrix(module):
            taken.append(name)
            module.register_forward_hook(_Positionwise.attach(module))
    return taken


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() == 2 for parameter in module.parameters())


class _Positionwise:
    """A pair of hooks on one module; remembers the shape between them."""

    def __init__(self) -> None:
        self._shape: torch.Size | None = None

    @classmethod
    def attach(cls, module: nn.Module) -> Callable[[nn.Module, Any, Any], Any]:
        hooks = cls()
        module.register_forward_pre_hook(hooks.gather)
        return hooks.scatter

    def gather(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        positions, self._shape = _wanted.get(), None
        if positions is None or not inputs or not isinstance(inputs[0], Tensor):
            return None
        self._shape = inputs[0].shape[:-1]
        return (inputs[0].flatten(0, -2)[positions][None], *inputs[1:])

    def scatter(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        positions = _wanted.get()
        if positions is None or self._shape is None:
            return None
        trimmed = output[0] if isinstance(output, tuple) else output
        full = trimmed.new_zeros(self._shape.numel(), trimmed.shape[-1])
        full[positions] = trimmed.flatten(0, -2)
        full = full.view(*self._shape, -1)
        return (full, *output[1:]) if isinstance(output, tuple) else full

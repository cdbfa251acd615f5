"""The weight of every task's loss in a step: those of the configuration, or CoBa's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.training.coba import CoBa
from stitch_ray.training.validation import Validation


class TaskWeigher:
    """Every method is called by all workers together; all get the same weights."""

    def __init__(self, config: FinetuneConfig, validation: Validation) -> None:
        self._fixed = [task.weight for task in config.tasks]
        self._config = config.coba
        self._validation = validation
        self._coba: CoBa | None = None
        if config.loss == "coba":
            self._coba = CoBa(
                len(config.tasks),
                warmup=config.coba.warmup,
                history=config.coba.history,
                tau=config.coba.tau,
                interval=config.coba.interval,
            )

    def start(self, model: Callable[..., Any]) -> None:
        """Before the first step: what CoBa measures convergence against."""
        if self._coba is not None:
            self._coba.start(self._validation.loss(model).tasks.tolist())

    def weights(self, model: Callable[..., Any], step: int) -> Tensor:
        """Weights of the tasks at `step`, (tasks,). CoBa looks at some validation examples of every task first."""
        if self._coba is None:
            return torch.tensor(self._fixed)
        if step:
            losses = self._validation.sample(model, step, self._config.examples)
            return torch.as_tensor(self._coba.update(step, losses.tolist()), dtype=torch.float32)
        return torch.as_tensor(self._coba.weights, dtype=torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """As JSON; empty where weights are fixed."""
        return self._coba.state_dict() if self._coba else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._coba:
            self._coba.load_state_dict(state)

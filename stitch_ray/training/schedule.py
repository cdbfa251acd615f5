"""Learning rate of every optimizer step: a pure function of its number, so there is no scheduler to save or to resize."""

from __future__ import annotations

import math

from stitch_ray.config.finetune import OptimizerConfig


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step `step`, counted from 0, of `total_steps`.

    With W warm-up steps, step s < W has learning_rate * (s + 1) / W: the first step already learns and step W - 1 has the
    peak (without warm-up, step 0 has it). From the peak the cosine (Loshchilov and Hutter 2017) or the line falls, and would
    reach min_learning_rate one step after the last: a last step with rate 0 would be work for nothing. A warm-up share of all steps is rounded up; one that is longer
    than the run never reaches the peak.
    """
    warmup = warmup_steps(total_steps, config)
    if step < warmup:
        return config.learning_rate * ((step + 1) / warmup)
    if config.schedule == "constant":
        return config.learning_rate
    peak_step = max(warmup - 1, 0)
    done = min(1.0, (step - peak_step) / max(1, total_steps - peak_step))
    fallen = done if config.schedule == "linear" else (1 - math.cos(math.pi * done)) / 2
    return config.learning_rate * (1 - fallen) + config.min_learning_rate * fallen


def warmup_steps(total_steps: int, config: OptimizerConfig) -> int:
    """Steps of the warm-up: `warmup` itself, or below 1 that share of all steps; rounded up."""
    steps = config.warmup * total_steps if config.warmup < 1 else config.warmup
    # 0.07 * 100 is a little more than 7.
    return math.ceil(round(steps, 6))

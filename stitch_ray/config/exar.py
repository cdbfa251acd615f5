"""Configuration of the `exar` jobs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stitch_ray.config.base import Strict


class ExarSplitConfig(Strict):
    """Which questions nobody learns from. By hash of the question, on the same axis as `finetune`'s split."""

    test: float = Field(0.2, ge=0, lt=1, description="share of the questions that is kept for evaluation")
    salt: str = Field("stitch_ray", description="one a project: a question is on the same side in all its jobs")


class ExarMergeConfig(Strict):
    """DATASET+: labelled answers from several temperatures, each once, made ready for training."""

    PATHS = ("answers.*", "held_out_from.*")

    answers: list[str] = Field(min_length=1, description="run folders of `exar label`")
    key: Literal["question_answer", "answer"] = Field(
        "question_answer", description="what is kept once; answer: as published, which loses equal answers to others"
    )
    held_out_from: list[str] = Field(
        [], description="model folders; answers to questions that one of them learned from are dropped"
    )
    balance: Literal["none", "downsample", "weights"] = Field(
        "none", description="train rows: as they are, as many CORRECT as WRONG, or a weight that evens them out"
    )
    gold: bool = Field(False, description="the gold answers as CORRECT rows to learn from, beside the model's own")
    split: ExarSplitConfig = Field(ExarSplitConfig(), description="what is held out")  # type: ignore[call-arg]
    seed: int = Field(0, ge=0, description="of downsampling")

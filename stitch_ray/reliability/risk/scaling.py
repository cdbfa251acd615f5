"""Puts the two stages of a cascade on one scale, before any threshold is tried."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stitch_ray.config.calibrate import CalibrateConfig
from stitch_ray.reliability.risk.questions import Floats, Material, Questions
from stitch_ray.reliability.stage_scale import LEAST_LABELS, Stage, StageScale


def on_one_scale(material: Material, config: CalibrateConfig) -> tuple[Material, StageScale | None, list[str]]:
    """The material with confidences in place of scores, what made them, and notes on it.

    Fitted on labels of the isotonic split, which no promise is tested on. Unchanged, with None, for one stage, where
    `config.scale` is none, and (as a note tells) for too few labels or scores that are no probabilities.
    """
    isotonic = material.isotonic
    if config.scale == "none" or material.calibrate.final is None:
        return material, None, []
    parts = (isotonic, material.calibrate, material.test)
    if any(_outside(part.draft) or (part.final is not None and _outside(part.final)) for part in parts):
        return material, None, ["Confidences are not between 0 and 1, so the stages are not put on one scale."]
    assert isotonic.final is not None
    assert isotonic.final_loss is not None
    scale = StageScale.fit(isotonic.draft, isotonic.draft_loss, isotonic.final, isotonic.final_loss)
    if scale is None:
        return material, None, [
            f"The stages are not put on one scale: that takes {LEAST_LABELS} labelled and scored answers of each in the "
            "isotonic split."
        ]  # fmt: skip
    scaled = replace(
        material,
        isotonic=_scaled(isotonic, scale),
        calibrate=_scaled(material.calibrate, scale),
        test=_scaled(material.test, scale),
    )
    return scaled, scale, [_told(isotonic, scale)]


def _scaled(questions: Questions, scale: StageScale) -> Questions:
    assert questions.final is not None
    return replace(
        questions, draft=scale.apply(questions.draft, "draft"), final=scale.apply(questions.final, "refined")
    )


def _outside(scores: Floats) -> bool:
    return bool(((scores < 0) | (scores > 1)).any())


def _told(isotonic: Questions, scale: StageScale) -> str:
    assert isotonic.final is not None
    assert isotonic.final_loss is not None
    texts = []
    stages: tuple[tuple[str, Stage, Floats, Floats], ...] = (
        ("drafts", "draft", isotonic.draft, isotonic.draft_loss),
        ("refined answers", "refined", isotonic.final, isotonic.final_loss),
    )
    for name, stage, score, loss in stages:
        low, high = scale.apply(np.array([0.1, 0.9]), stage)
        known = ~np.isnan(score) & ~np.isnan(loss)
        texts.append(
            f"of {known.sum()} {name} {1 - loss[known].mean():.0%} are right, and a score of .1 to .9 becomes a confidence "
            f"of {low:.2f} to {high:.2f}"
        )
    return f"Both stages are on one scale, fitted on the isotonic split: {'; '.join(texts)}."

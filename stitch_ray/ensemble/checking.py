"""What `predict` and `serve` check of an ensemble before anything is loaded."""

from __future__ import annotations

from stitch_ray.config.ensemble import EnsembleConfig
from stitch_ray.ensemble.fingerprints import check_scorer, ensemble_fingerprints
from stitch_ray.ensemble.online_signals import check_signals
from stitch_ray.errors import UserError
from stitch_ray.reliability.policy import Fingerprints
from stitch_ray.reliability.scorer.file import ScorerFile


def check_ensemble(config: EnsembleConfig, scorer: ScorerFile) -> Fingerprints:
    """Its fingerprints. Raises UserError, naming the key below `ensemble`, for a missing model, and for a scorer that was
    made for other answers or needs signals that nobody computes."""
    try:
        check_signals(config, scorer.needed)
        check_scorer(config, scorer)
        return ensemble_fingerprints(config, scorer.fingerprint)
    except UserError as error:
        inside = not str(error).startswith("scorer:")
        raise UserError(f"ensemble.{error}" if inside else str(error)) from error

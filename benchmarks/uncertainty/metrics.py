"""Metrics of selective prediction on many answers, and the intervals of an evaluation."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score

from benchmarks.harness import interleave, median
from stitch_ray.reliability import metrics
from stitch_ray.reliability.evaluation import evaluate

EVALUATED = "evaluate: 12 scores x 1000 answers x 1000 resamples"


def compare(rows: int = 1_000_000, repeats: int = 3) -> dict[str, dict[str, float]]:
    """Median seconds: metric -> {"ours"} and, where scikit-learn has it, {"scikit-learn"}.

    The confidences of `rows` answers are rounded to four decimals, so that many tie. Where both sides compute a
    metric their values are compared first; RuntimeError if they differ.
    """
    generator = np.random.default_rng(0)
    residual = (generator.random(rows) < 0.3).astype(np.float64)
    p = np.round(1 / (1 + np.exp(residual - generator.normal(size=rows))), 4)
    correct = 1 - residual
    sides: dict[str, dict[str, Callable[[], object]]] = {
        "AURC": {"ours": lambda: metrics.aurc(p, residual)},
        "E-AURC": {"ours": lambda: metrics.e_aurc(p, residual)},
        "AUGRC": {"ours": lambda: metrics.augrc(p, residual)},
        "PRR": {"ours": lambda: metrics.prr(p, residual)},
        "PRR at 50 %": {"ours": lambda: metrics.prr(p, residual, max_rejection=0.5)},
        "AUROC": {
            "ours": lambda: metrics.auroc(p, residual),
            "scikit-learn": lambda: roc_auc_score(correct, p),
        },
        "AUPR-error": {
            "ours": lambda: metrics.aupr_error(p, residual),
            "scikit-learn": lambda: average_precision_score(residual, -p),
        },
        "Brier": {
            "ours": lambda: metrics.brier(p, correct),
            "scikit-learn": lambda: brier_score_loss(correct, p),
        },
        "ECE": {"ours": lambda: metrics.ece(p, correct)},
        "equal-mass ECE": {"ours": lambda: metrics.equal_mass_ece(p, correct)},
        "coverage at risk": {"ours": lambda: metrics.coverage_at_risk(p, residual, 0.1)},
        "risk-coverage curve": {"ours": lambda: metrics.risk_coverage_curve(p, residual)},
        EVALUATED: {"ours": _evaluation()},
    }
    for name, both in sides.items():
        values = [side() for side in both.values()]
        if len(values) == 2 and not np.isclose(*values, rtol=0, atol=1e-9):  # type: ignore[call-overload]
            raise RuntimeError(f"{name}: {values[0]} here and {values[1]} in scikit-learn")
    return {
        name: {side: median(seconds) for side, seconds in interleave(both, repeats).items()}
        for name, both in sides.items()
    }


def _evaluation() -> Callable[[], object]:
    generator = np.random.default_rng(1)
    residual = (generator.random(1000) < 0.3).astype(np.float64)
    scores = {f"score {i}": generator.normal(size=1000) - residual for i in range(12)}
    return lambda: evaluate(scores, residual, bootstrap=1000)

"""stitch_ray: select data, fine-tune and serve LLMs on Ray, and know when an answer can be trusted.

from stitch_ray import finetune, select
chosen = select({"data": {"paths": ["corpus.json"]}, "models": [{"path": "some/model"}]}) / "selected.jsonl"
trained = finetune({"model": {"path": "some/model"}, "tasks": [{"name": "chat", "data": str(chosen)}]}) / "model"
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stitch_ray.api import calibrate, exar_run, finetune, predict, sample_answers, select, train_scorer

__all__ = ["calibrate", "exar_run", "finetune", "predict", "sample_answers", "select", "train_scorer"]


def __getattr__(name: str) -> Any:
    # Torch and Ray load only for those who use them: the pure functions stay importable in milliseconds.
    if name in __all__:
        from stitch_ray import api

        return getattr(api, name)
    raise AttributeError(f"module 'stitch_ray' has no attribute {name!r}")

"""The Python API: every job as a function that takes its configuration and returns the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

from stitch_ray.config import CONFIGS
from stitch_ray.config.base import Strict
from stitch_ray.config.calibrate import CalibrateConfig
from stitch_ray.config.exar import ExarRunConfig
from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.config.loading import load_config, validate
from stitch_ray.config.predict import PredictConfig
from stitch_ray.config.sample_answers import SampleAnswersConfig
from stitch_ray.config.select import SelectConfig
from stitch_ray.config.train_scorer import TrainScorerConfig
from stitch_ray.runs import Progress, RunFolder, Summary, check_writable

RUNS = Path("runs")

_AREAS = {
    "select": "selection",
    "finetune": "training",
    "sample-answers": "reliability.answers",
    "train-scorer": "reliability.scorer",
    "calibrate": "reliability.risk",
    "predict": "ensemble.batch",
    "serve": "ensemble.serving",
    "exar-merge": "exclusion.merging",
    "exar-refine": "exclusion.refining",
    "exar-evaluate": "exclusion.evaluating",
    "exar-judge": "exclusion.judging",
    "exar-run": "exclusion.chain",
}
"""Job -> the package with its `preflight.check`, `estimate.describe`, `pipeline.check_cluster` and `pipeline.run` (`serve`
has no run folder and no pipeline: serve_apps deploys it)."""

_Config = TypeVar("_Config", bound=Strict)


class Ready(Protocol):
    """A configuration that was checked against the files it names."""

    @property
    def work(self) -> dict[str, Any]: ...
    @property
    def work_hash(self) -> str: ...


def select(
    config: SelectConfig | Mapping[str, Any] | Path | str,
    out: Path | str | None = None,
    *,
    address: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Rate instruction data by the model's own uncertainty and keep the best part; return the run folder.

    `config` is a `SelectConfig`, its values, or a YAML file. `out` defaults to `runs/select-<work hash>`, so that the
    same call resumes. `address` is a Ray address; default: RAY_ADDRESS, else a Ray session that is open, else a local
    one for the life of the call. Raises `stitch_ray.errors.UserError` for what only the caller can change.
    """
    return run_job("select", as_config(config, SelectConfig), out, address=address, overwrite=overwrite).folder


def finetune(
    config: FinetuneConfig | Mapping[str, Any] | Path | str,
    out: Path | str | None = None,
    *,
    address: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Fine-tune a causal language model on one or several tasks; return the run folder, which holds `model/`.

    Arguments and errors as in `select`; a `FloatingPointError` says which examples made the loss infinite or NaN.
    """
    return run_job("finetune", as_config(config, FinetuneConfig), out, address=address, overwrite=overwrite).folder


def sample_answers(
    config: SampleAnswersConfig | Mapping[str, Any] | Path | str,
    out: Path | str | None = None,
    *,
    address: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Sample candidate answers, label them, compute uncertainty signals; return the run folder with `answers.parquet`.

    Arguments and errors as in `select`.
    """
    settings = as_config(config, SampleAnswersConfig)
    return run_job("sample-answers", settings, out, address=address, overwrite=overwrite).folder


def train_scorer(
    config: TrainScorerConfig | Mapping[str, Any] | Path | str,
    out: Path | str | None = None,
    *,
    address: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Train a reliability scorer on labelled answers; return the run folder, which holds `scorer.json`.

    Arguments and errors as in `select`.
    """
    settings = as_config(config, TrainScorerConfig)
    return run_job("train-scorer", settings, out, address=address, overwrite=overwrite).folder


def calibrate(
    config: CalibrateConfig | Mapping[str, Any] | Path | str,
    out: Path | str | None = None,
    *,
    address: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Choose the threshold from which an answer is given, with a guarantee; return the run folder with `policy.json`.

    Arguments and errors as in `select`.
    """
    settings = as_config(config, CalibrateConfig)
    return run_job("calibrate", settings, out, address=address, overwrite=overwrite).folder


def predict(
    config: PredictConfig | Mapping[str, Any] | Path | str,
    out: Path | str | None = None,
    *,
    address: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Answer many questions selectively; return the run folder, which holds `predictions.parquet`.

    Arguments and errors as in `select`.
    """
    return run_job("predict", as_config(config, PredictConfig), out, address=address, overwrite=overwrite).folder


def exar_run(
    config: ExarRunConfig | Mapping[str, Any] | Path | str,
    out: Path | str | None = None,
    *,
    address: str | None = None,
    overwrite: bool = False,
) -> Path:
    """The EXAR chain from questions to an evaluated refinement; return the run folder, with a folder for every stage.

    Arguments and errors as in `select`. Its stages by themselves: `run_job("exar-merge", ...)` and so on.
    """
    return run_job("exar-run", as_config(config, ExarRunConfig), out, address=address, overwrite=overwrite).folder


def as_config(config: _Config | Mapping[str, Any] | Path | str, model: type[_Config]) -> _Config:
    """A validated configuration from any of the forms that the functions here take."""
    if isinstance(config, model):
        return config
    if isinstance(config, Mapping):
        return validate(model, config, "config")
    assert isinstance(config, Path | str)
    return load_config(model, config)


def check(job: str, config: Strict) -> Ready:
    """Look at the files, models and tokenizers that `config` names. Raises UserError; changes nothing."""
    assert isinstance(config, CONFIGS[job])
    ready: Ready = _module(job, "preflight").check(config)
    return ready


def describe(job: str, config: Strict) -> str:
    """What `job` would read and do, as text. Raises what `check` does; changes nothing."""
    text: str = _module(job, "estimate").describe(check(job, config))
    return text


def default_folder(job: str, ready: Ready) -> Path:
    """The run folder of a command without --out: the same command finds it again, and resumes."""
    return RUNS / f"{job}-{ready.work_hash[:8]}"


def run_job(
    job: str,
    config: Strict,
    out: Path | str | None = None,
    *,
    address: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda step: None,
) -> Summary:
    """Run `job` in its folder and return the summary that the command prints."""
    from stitch_ray import ray_session

    ready = check(job, config)
    pipeline = _module(job, "pipeline")
    path = Path(out or default_folder(job, ready)).absolute()
    check_writable(path)
    with ray_session.session(address):
        pipeline.check_cluster(ready, path)
        values = config.model_dump(mode="json", exclude_none=True)
        kept = getattr(pipeline, "KEPT_WHEN_OVERWRITING", ())
        folder = RunFolder.open(path, job, values, ready.work, overwrite=overwrite, kept=kept)
        try:
            summary: Summary = pipeline.run(ready, folder, progress)
        except BaseException as error:
            folder.fail(error)
            raise
    return summary


def _module(job: str, name: str) -> Any:
    # Torch and Ray load only where they are needed.
    return import_module(f"stitch_ray.{_AREAS[job]}.{name}")

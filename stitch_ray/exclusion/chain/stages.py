"""The configuration of every stage of a chain, from that of the chain. Pure: folders are named, nothing is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stitch_ray.config.exar import ExarEvaluateConfig, ExarMergeConfig, ExarRefineConfig, ExarRunConfig
from stitch_ray.config.finetune import FinetuneConfig
from stitch_ray.config.loading import validate
from stitch_ray.config.sample_answers import SampleAnswersConfig
from stitch_ray.errors import UserError

SIDES = ("zero", "plus", "test")


class Stages:
    """Folders and configurations below `root`. Raises UserError, naming the section, for keys that finetune refuses."""

    def __init__(self, config: ExarRunConfig, root: Path) -> None:
        self._config = config
        self._root = root

    def folder(self, name: str) -> Path:
        return self._root / "stages" / name

    def side(self, name: str) -> Path:
        """The questions of one side, as records of the data."""
        return self._root / "questions" / f"{name}.jsonl"

    @property
    def base(self) -> str:
        """The stage-zero model, or the model itself where there is no stage zero."""
        config = self._config
        if config.stage_zero is None:
            return config.model.path
        trained = self.folder("stage-zero") / "model"
        return str(self.merged if config.stage_zero.get("method", "full") != "full" else trained)

    @property
    def merged(self) -> Path:
        """Where stage zero's adapter is merged to: further adapters need a plain model."""
        return self.folder("stage-zero-merged")

    def stage_zero(self) -> FinetuneConfig | None:
        if self._config.stage_zero is None:
            return None
        task = {**self._task("zero"), "name": "qa"}
        return self._finetune("stage_zero", self._config.stage_zero, self._config.model.path, [task])

    def validator(self) -> FinetuneConfig:
        task = {"name": "validator", "data": str(self.folder("plus") / "validator.jsonl"), "objective": "validator"}
        return self._finetune("validator", self._config.validator, self.base, [{**task, "format": "judged_answer"}])

    def exar(self) -> FinetuneConfig:
        plus = {"name": "exar", "data": str(self.folder("plus") / "exar.jsonl"), "objective": "exar"}
        tasks: list[dict[str, Any]] = [{**plus, "format": "question_answer"}]
        if self._config.replay and self._config.stage_zero is not None:
            tasks.append({**self._task("zero"), "name": "qa"})
        return self._finetune("exar", self._config.exar, self.base, tasks)

    def predictions(self) -> dict[str, SampleAnswersConfig]:
        """Name of the stage -> its configuration, one a temperature."""
        config = self._config
        sides = ["plus", "zero"] if config.predictions.questions == "all" else ["plus"]
        found = {}
        for number, temperature in enumerate(config.predictions.temperatures):
            samples = {"greedy": False, "num": 1, "temperature": temperature, "top_p": config.predictions.top_p}
            found[f"predictions-{temperature:g}"] = self._sampled(
                self.base, sides, samples, "none", config.seed + number
            )
        return found

    def merge(self) -> ExarMergeConfig:
        values = {
            "answers": [str(self.folder("labels"))],
            "balance": self._config.balance,
            "gold": self._config.gold,
            "split": {"test": 0.0, "salt": self._config.split.salt},  # the test side is not there at all
            "seed": self._config.seed,
        }
        return validate(ExarMergeConfig, values, "exar merge")

    def refine(self, control: str | None = None) -> ExarRefineConfig:
        """With the trained validator, or with a control in its place."""
        config = self._config
        values: dict[str, Any] = {
            "data": self._data(["test"]),
            "attempts": config.attempts.model_dump(mode="json"),
            "labels": config.labels.model_dump(mode="json", exclude_none=True),
            "questions": "all",
            "seed": config.seed,
        }
        answering, judging = self._is_adapter("exar"), self._is_adapter("validator")
        model, validator = self.folder("exar") / "model", self.folder("validator") / "model"
        adapters = {"answer": str(model)} if answering else {}
        values["model"] = self._model(self.base if answering else str(model), "exar")
        if control is None:
            values["validator"] = {"threshold": config.threshold}
            if answering and judging:
                adapters["validator"] = str(validator)
            else:
                values["validator"]["model"] = self._model(str(validator), "validator")
        else:
            kind: dict[str, dict[str, Any]] = {
                "oracle": {"kind": "oracle"},
                "random": {"kind": "random"},
                "always": {"kind": "random", "accept": 1.0},
            }
            values["validator"] = {**kind[control], "threshold": config.threshold or 0.5}
        return validate(ExarRefineConfig, {**values, "adapters": adapters}, "exar refine")

    def samples(self) -> SampleAnswersConfig:
        """Independent answers of the EXAR model, for the votes."""
        config = self._config
        drawn = {"greedy": False, "num": config.samples, "temperature": config.sample_temperature}
        return self._sampled(str(self.folder("exar") / "model"), ["test"], drawn, config.labels, config.seed)

    def evaluate(self) -> ExarEvaluateConfig:
        values = {
            "refine": str(self.folder("refine")),
            "controls": {name: str(self.folder(f"refine-{name}")) for name in self._config.controls},
            "samples": str(self.folder("samples")),
            "seed": self._config.seed,
        }
        return validate(ExarEvaluateConfig, values, "exar evaluate")

    def _sampled(
        self, model: str, sides: list[str], samples: Mapping[str, Any], labels: Any, seed: int
    ) -> SampleAnswersConfig:
        attempts = self._config.attempts
        test = self._config.split.test
        values = {
            "data": self._data(sides),
            "model": self._model(model, "answers"),
            "samples": {**samples, "max_tokens": attempts.max_tokens, "stop": attempts.stop},
            "labels": {"metric": "none"} if labels == "none" else labels.model_dump(mode="json", exclude_none=True),
            "split": {
                "test": test,
                "train": 1 - test,
                "stack": 0,
                "isotonic": 0,
                "calibrate": 0,
                "salt": self._config.split.salt,
            },
            "seed": seed,
        }
        return validate(SampleAnswersConfig, values, "sample-answers")

    def _finetune(
        self, section: str, own: Mapping[str, Any], model: str, tasks: list[dict[str, Any]]
    ) -> FinetuneConfig:
        for key in ("tasks", "objective"):
            if key in own:
                raise UserError(f"{section}.{key}: the chain sets it; leave it out")
        wanted = dict(own.get("model") or {})
        if "path" in wanted:
            raise UserError(f"{section}.model.path: the chain sets it; leave it out")
        dtype = {} if self._config.model.dtype in ("auto", "float16") else {"dtype": self._config.model.dtype}
        place = self._config.model.model_dump(include={"num_threads", "num_gpus"})
        values = {
            "seed": self._config.seed,
            **own,
            "tasks": tasks,
            "model": {"path": model, **dtype, **wanted},
            "resources": {**place, **(own.get("resources") or {})},
        }
        return validate(FinetuneConfig, values, section)

    def _is_adapter(self, section: str) -> bool:
        return bool(getattr(self._config, section).get("method", "full") != "full")

    def _model(self, path: str, name: str) -> dict[str, Any]:
        own = self._config.model.model_dump(mode="json", exclude_none=True)
        return {**own, "path": path, "name": name}

    def _data(self, sides: list[str]) -> dict[str, Any]:
        own = self._config.data.model_dump(mode="json", exclude={"limit"})
        return {**own, "paths": [str(self.side(name)) for name in sides]}

    def _task(self, side: str) -> dict[str, Any]:
        data = self._config.data
        return {"data": str(self.side(side)), "format": data.format, "fields": data.fields}

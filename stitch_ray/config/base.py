"""What every job's configuration shares."""

from __future__ import annotations

import os
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Strict(BaseModel):
    """Unknown keys are errors, numbers are finite, and a loaded configuration does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    PATHS: ClassVar[tuple[str, ...]] = ()
    """Dotted keys that may hold local paths; `*` stands for every entry of a list."""


class DataConfig(Strict):
    """Where examples come from."""

    paths: list[str] = Field(min_length=1, description="files, globs, folders, `datasets` folders or hf://owner/name")
    format: str = Field("auto", description="name of a record format, or auto: detected for every record")
    fields: dict[str, str] = Field({}, description="field of a format -> column that holds it (answer: answer_text)")
    max_bad_fraction: float = Field(0.5, ge=0, le=1, description="more unusable rows than this is an error")
    max_characters: int = Field(1_000_000, ge=1, description="a longer text field sends its row to quarantine")
    limit: int | None = Field(None, ge=1, description="read only the first N rows")


class ModelConfig(Strict):
    """One model and what it runs on."""

    path: str = Field(description="folder in Hugging Face format, or a Hub id that is in the local cache")
    name: Name = Field("", description="name in files and reports; default: the last part of the path")
    engine: Literal["transformers", "vllm"] = Field("transformers", description="what runs the model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="number format of the weights; auto: as they are stored"
    )
    parameters: float | None = Field(None, gt=0, description="size used as weight; default: counted from the weights")
    max_tokens: int | None = Field(None, ge=16, description="longest sequence; default: the model's context")
    batch_tokens: int | None = Field(None, ge=1, description="tokens a forward; default 1024 on CPU, 16384 on GPU")
    num_threads: int = Field(1, ge=1, description="torch threads an actor (CPU); another number rounds otherwise")
    replicas: int = Field(1, ge=1, description="actors that share the work of this model")
    num_gpus: float = Field(0, ge=0, description="GPUs an actor; a fraction shares one")
    tensor_parallel: int = Field(1, ge=1, description="GPUs one vLLM engine is split over")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, values: object) -> object:
        if isinstance(values, dict) and not values.get("name") and isinstance(values.get("path"), str):
            return {**values, "name": os.path.basename(values["path"].rstrip("/")) or "model"}
        return values

    @model_validator(mode="after")
    def _engine_options(self) -> ModelConfig:
        if self.tensor_parallel > 1 and self.engine != "vllm":
            raise ValueError("tensor_parallel needs engine: vllm")
        if self.tensor_parallel > 1 and self.num_gpus != self.tensor_parallel:
            raise ValueError(f"tensor_parallel: {self.tensor_parallel} needs num_gpus: {self.tensor_parallel}")
        if self.engine == "vllm" and self.batch_tokens is not None:
            raise ValueError("batch_tokens has no effect with engine: vllm, which schedules its own batches")
        return self

"""Configuration of `finetune`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from stitch_ray.config.base import DataConfig, Name, Strict

LossMode = Literal["token_mean", "sample_mean", "task_token_mean", "task_sample_mean", "coba"]


def _one_or_many(value: object) -> object:
    return [value] if isinstance(value, str) else value


class BaseModelConfig(Strict):
    """The model that is trained."""

    path: str = Field(description="folder in Hugging Face format, or a Hub id that is in the local cache")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="number format of forward and backward; optimizer and master weights stay float32"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations again in backward: less memory")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")


class TaskConfig(Strict):
    """One task: its examples, and how they are turned into tokens."""

    name: Name = Field(description="name in metrics and reports; unique")
    data: Annotated[list[str], BeforeValidator(_one_or_many, json_schema_input_type=str | list[str])] = Field(
        min_length=1, description="files, globs, folders, `datasets` folders or hf://owner/name"
    )
    format: str = Field("auto", description="name of a record format, or auto: detected for every record")
    fields: dict[str, str] = Field({}, description="field of a format -> column that holds it (answer: answer_text)")
    weight: float = Field(1.0, gt=0, description="weight of the task's loss, in the losses that balance tasks")
    objective: str | None = Field(None, description="what is rendered and which tokens carry loss; default: the job's")
    template: str = Field("chat", description="chat: the model's own template; raw: no markers; or a Jinja file")

    def reading(self, limit: int | None) -> DataConfig:
        """How the task's files are read."""
        return DataConfig(paths=self.data, format=self.format, fields=self.fields, limit=limit)  # type: ignore[call-arg]


class AdapterConfig(Strict):
    """Low-rank adapters: LoRA (Hu et al. 2021), rank-stabilised LoRA (Kalajdzievski 2023), QLoRA (Dettmers et al. 2023)."""

    rank: int = Field(16, ge=1, description="rank of the update")
    alpha: float = Field(32, gt=0, description="the update is scaled by alpha / rank (rslora: alpha / sqrt(rank))")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout in front of the adapter")
    targets: str | list[str] = Field("all-linear", description="names of the layers that are adapted, or all-linear")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank)")
    start_from: str | None = Field(None, description="folder of an adapter of this model to go on training")


class CoBaConfig(Strict):
    """Task weights that balance convergence (CoBa, Gong et al. 2024). Steps are optimizer steps."""

    warmup: int = Field(100, ge=2, description="steps with equal weights")
    history: int = Field(200, ge=2, description="steps of validation loss behind a slope; at least warmup")
    tau: float = Field(5.0, gt=0, description="temperature of the divergence factor")
    interval: int = Field(1, ge=1, description="steps between two updates of the weights")
    examples: int = Field(8, ge=1, description="validation examples of every task a step")

    @model_validator(mode="after")
    def _long_enough(self) -> CoBaConfig:
        if self.history < self.warmup:
            raise ValueError(f"coba.history {self.history} must be at least coba.warmup {self.warmup}")
        return self


class MixingConfig(Strict):
    """How tasks share an epoch. Proportional (temperature 1, the default) is every example exactly once."""

    temperature: float = Field(1.0, gt=0, description="task k is drawn in proportion to size_k ** (1 / temperature)")
    weights: list[float] | None = Field(None, description="shares of the tasks, in their order, instead of their sizes")

    @property
    def proportional(self) -> bool:
        return self.weights is None and self.temperature == 1


class BatchConfig(Strict):
    """A micro-batch is what one worker takes in one forward; accumulation x workers of them make an optimizer step.

    With elastic workers, [min, max], a step is accumulation x max micro-batches whatever the number of workers is.
    """

    tokens: int | None = Field(None, ge=8, description="most tokens in a micro-batch; default: max_length")
    examples: int | None = Field(None, ge=1, description="examples in a micro-batch, instead of tokens")
    accumulation: int = Field(1, ge=1, description="micro-batches a worker runs for an optimizer step")

    @model_validator(mode="after")
    def _one_of_both(self) -> BatchConfig:
        if self.tokens is not None and self.examples is not None:
            raise ValueError("give batch.tokens or batch.examples, not both")
        return self


class OptimizerConfig(Strict):
    """AdamW and its learning rate. Weight decay leaves vectors (norms, biases) alone."""

    learning_rate: float = Field(2e-5, gt=0, description="peak")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="after the warm-up")
    warmup: float = Field(0.03, ge=0, description="steps, or below 1 a share of all steps")
    min_learning_rate: float = Field(0.0, ge=0, description="where the schedule ends")
    weight_decay: float = Field(0.0, ge=0, description="decoupled")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay of the two moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    max_grad_norm: float | None = Field(1.0, gt=0, description="gradients are scaled down to this norm; null: never")


class ZeroConfig(Strict):
    """DeepSpeed ZeRO: what the workers share out (Rajbhandari et al. 2020)."""

    stage: Literal[1, 2, 3] = Field(2, description="1 optimizer states, 2 gradients as well, 3 weights as well")
    offload: Literal["none", "optimizer", "all"] = Field("none", description="kept in CPU memory; all: stage 3 only")

    @model_validator(mode="after")
    def _offload_all(self) -> ZeroConfig:
        if self.offload == "all" and self.stage != 3:
            raise ValueError("zero.offload: all needs zero.stage: 3")
        return self


class ResourcesConfig(Strict):
    """What one worker runs on."""

    num_threads: int = Field(1, ge=1, description="CPUs and torch threads of a worker; another number rounds otherwise")
    num_gpus: float = Field(0, ge=0, description="GPUs of a worker: 0 trains on the CPU")
    max_failures: int = Field(3, ge=0, description="restarts after a worker or node was lost, before the job fails")


class SplitConfig(Strict):
    """Shares held out. Grouped by question and decided by hash, so that a split never changes when data is added."""

    validation: float = Field(0.02, ge=0, lt=1, description="share for validation loss, early stopping and coba")
    test: float = Field(0.0, ge=0, lt=1, description="share that this job never looks at; written to test.jsonl")
    salt: str = Field("stitch_ray", description="one a project: a question is on the same side in all its jobs")

    @model_validator(mode="after")
    def _something_left(self) -> SplitConfig:
        if self.validation + self.test >= 1:
            raise ValueError("split.validation and split.test leave nothing to train on")
        return self


class CheckpointConfig(Strict):
    """Checkpoints hold weights, optimizer and all other state; they fit any number of workers."""

    every: int = Field(100, ge=1, description="optimizer steps between two checkpoints")
    keep: int = Field(2, ge=1, description="the newest that are kept, beside the best")


class EvalConfig(Strict):
    """Validation loss during training, and answers to validation questions."""

    every: int = Field(100, ge=1, description="optimizer steps between two passes over the validation split")
    generate: int = Field(0, ge=0, description="validation questions a task answered for every checkpoint")
    max_tokens: int = Field(128, ge=1, description="longest answer")
    num_cpus: float = Field(1, gt=0, description="CPUs of the evaluation, beside those of the workers")
    num_gpus: float = Field(0, ge=0, description="GPUs of the evaluation, beside those of the workers")


class EarlyStoppingConfig(Strict):
    """Stop when the validation loss no longer falls."""

    patience: int = Field(5, ge=1, description="passes over the validation split without a new best")
    min_delta: float = Field(0.0, ge=0, description="a smaller fall of the loss is no new best")


class FinetuneConfig(Strict):
    """Fine-tune a causal language model on one or several tasks."""

    PATHS = ("model.path", "tasks.*.data.*", "tasks.*.template", "adapter.start_from")

    model: BaseModelConfig = Field(description="the model that is trained")
    tasks: list[TaskConfig] = Field(min_length=1, description="what it is trained on")
    objective: str = Field("sft", description="what is rendered and which tokens carry loss, unless a task says so")
    method: Literal["full", "lora", "qlora"] = Field(
        "full", description="all weights, adapters, adapters on 4-bit weights"
    )
    adapter: AdapterConfig = Field(AdapterConfig(), description="with method: lora or qlora")  # type: ignore[call-arg]
    loss: LossMode = Field(
        "task_token_mean", description="how token losses become one number; always over a whole step"
    )
    coba: CoBaConfig = Field(CoBaConfig(), description="with loss: coba")  # type: ignore[call-arg]
    mixing: MixingConfig = Field(MixingConfig(), description="how tasks share an epoch")  # type: ignore[call-arg]
    packing: bool = Field(
        True, description="examples one after another in a row without padding, each seeing only itself"
    )
    max_length: int = Field(
        2048, ge=8, description="tokens of the longest example; never more than the model's context"
    )
    overlong: Literal["truncate", "drop"] = Field("truncate", description="what happens to a longer one; counted")
    batch: BatchConfig = Field(BatchConfig(), description="what makes a step")  # type: ignore[call-arg]
    epochs: float = Field(1.0, gt=0, description="passes over the training split")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, instead of epochs")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="AdamW")  # type: ignore[call-arg]
    zero: ZeroConfig = Field(ZeroConfig(), description="DeepSpeed ZeRO")  # type: ignore[call-arg]
    workers: int | tuple[int, int] = Field(1, description="processes that train together; [min, max]: elastic")
    resources: ResourcesConfig = Field(ResourcesConfig(), description="of one worker")  # type: ignore[call-arg]
    split: SplitConfig = Field(SplitConfig(), description="what is held out")  # type: ignore[call-arg]
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="how often, how many")  # type: ignore[call-arg]
    eval: EvalConfig = Field(EvalConfig(), description="validation")  # type: ignore[call-arg]
    early_stopping: EarlyStoppingConfig | None = Field(None, description="default: train to the end")
    limit: int | None = Field(None, ge=1, description="read only the first N rows of every task")
    max_bad_fraction: float = Field(0.5, ge=0, le=1, description="more unusable rows of a task than this is an error")
    seed: int = Field(0, ge=0, description="of the order of examples, of new adapters and of dropout")

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneConfig:
        names = [task.name for task in self.tasks]
        if len(set(names)) != len(names):
            raise ValueError(f"tasks[].name must be unique, got {names}")
        if self.method == "full" and self.adapter != AdapterConfig():  # type: ignore[call-arg]
            raise ValueError("adapter has no effect with method: full; remove it, or use method: lora")
        if self.loss != "coba" and self.coba != CoBaConfig():  # type: ignore[call-arg]
            raise ValueError(f"coba has no effect with loss: {self.loss}; remove it, or use loss: coba")
        if self.loss == "coba" and len(names) < 2:
            raise ValueError("loss: coba balances tasks and needs at least two")
        if self.loss == "coba" and not self.split.validation:
            raise ValueError("loss: coba weighs tasks by their validation loss and needs split.validation above 0")
        if self.loss not in ("task_token_mean", "task_sample_mean") and any(task.weight != 1 for task in self.tasks):
            raise ValueError(f"tasks[].weight has no effect with loss: {self.loss}")
        weights = self.mixing.weights
        if weights is not None and (len(weights) != len(names) or min(weights) <= 0):
            raise ValueError(f"mixing.weights needs {len(names)} positive values, one a task")
        if self.early_stopping and not self.split.validation:
            raise ValueError("early_stopping watches the validation loss and needs split.validation above 0")
        if self.eval.generate and not self.split.validation:
            raise ValueError("eval.generate asks validation questions and needs split.validation above 0")
        if self.max_steps is not None and self.epochs != 1:
            raise ValueError("give epochs or max_steps, not both")
        if self.packing and self.batch.tokens is not None and self.batch.tokens < self.max_length:
            raise ValueError(f"batch.tokens {self.batch.tokens} cannot hold an example of max_length {self.max_length}")
        low, high = self.worker_range
        if not 1 <= low <= high:
            raise ValueError(f"workers must be a positive number or [min, max], not {self.workers}")
        return self

    @property
    def worker_range(self) -> tuple[int, int]:
        """Fewest and most workers."""
        return (self.workers, self.workers) if isinstance(self.workers, int) else self.workers

    @property
    def micro_batches(self) -> int:
        """Micro-batches of an optimizer step, whatever the number of workers is at the moment."""
        return self.worker_range[1] * self.batch.accumulation

    @property
    def batch_tokens(self) -> int | None:
        """Most tokens in a micro-batch; None where examples are counted."""
        return None if self.batch.examples else self.batch.tokens or self.max_length

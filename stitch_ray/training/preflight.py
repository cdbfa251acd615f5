"""Everything that can be known wrong before a folder is made or a worker is started."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stitch_ray.config.finetune import FinetuneConfig, TaskConfig
from stitch_ray.data import formats, readers
from stitch_ray.data.corpus import inputs_hash
from stitch_ray.engines.fingerprint import model_fingerprint, model_folder, num_parameters
from stitch_ray.engines.pretrained import context_length, load_model_config, load_tokenizer, tokenizer_hash
from stitch_ray.errors import UserError
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.records import content_hash
from stitch_ray.training.adapters import check_adapter, check_qlora
from stitch_ray.training.objectives import objective


@dataclass(frozen=True, slots=True)
class Ready:
    """A configuration that was checked against the files it names. `work` is what the trained weights depend on.

    In `config`, `max_length` is no longer than the model's context. `sources` are the files of every task and
    `templates` the Jinja texts of their chat templates.
    """

    config: FinetuneConfig
    sources: tuple[tuple[str, ...], ...]
    templates: tuple[str, ...]
    num_parameters: float
    fingerprint: str
    work: dict[str, Any]

    @property
    def work_hash(self) -> str:
        return content_hash(self.work)


def check(config: FinetuneConfig) -> Ready:
    """Raises UserError for a missing input or model, a template that cannot be used, or a method that cannot run."""
    path, code = config.model.path, config.model.trust_remote_code
    try:
        folder = model_folder(path)
    except UserError as error:
        raise UserError(f"model.path: {error}") from error
    if folder is None:
        raise UserError(
            f"model.path: {path}: no such folder, and no such model in the local Hugging Face cache "
            f"(hf download {path} puts it there)"
        )
    size = num_parameters(path)
    if size is None:
        raise UserError(f"model.path: {path} holds no safetensors weights (pickles are not loaded)")
    if config.method == "qlora":
        check_qlora(config.resources.num_gpus)
    if config.model.dtype == "bfloat16" and config.zero.offload != "none" and not config.resources.num_gpus:
        raise UserError("zero.offload: without GPUs everything is in CPU memory already; remove it")
    config = _with_absolute_paths(config)
    context = context_length(load_model_config(path, trust_remote_code=code))
    if config.max_length > context:
        if "max_length" in config.model_fields_set:
            raise UserError(f"max_length: {config.max_length} exceeds the model's context of {context} tokens")
        config = config.model_copy(update={"max_length": context})
    if config.method != "full":
        check_adapter(config.model, config.adapter)
    tokenizer = load_tokenizer(path, trust_remote_code=code)
    sources, templates = [], []
    for task in config.tasks:
        formats.check_format(f"tasks.{task.name}.format", task.format)
        chosen = objective(task.objective or config.objective)
        if chosen.head != "causal_lm":
            raise UserError(f"tasks.{task.name}.objective: {chosen.name} trains a {chosen.head}, not a language model")
        sources.append(tuple(readers.expand(task.data)))
        templates.append(ChatTemplate.resolve(task.template, tokenizer).text)
    fingerprint = model_fingerprint(path)
    work = _work(config, sources, templates, fingerprint, tokenizer_hash(tokenizer))
    return Ready(config, tuple(sources), tuple(templates), size, fingerprint, work)


def _with_absolute_paths(config: FinetuneConfig) -> FinetuneConfig:
    """Local folders by their absolute names: a Ray Train worker runs in another directory."""
    model = config.model.model_copy(update={"path": _absolute(config.model.path)})
    adapter = config.adapter
    if adapter.start_from is not None:
        adapter = adapter.model_copy(update={"start_from": _absolute(adapter.start_from)})
    return config.model_copy(update={"model": model, "adapter": adapter})


def _absolute(path: str) -> str:
    return str(Path(path).absolute()) if Path(path).is_dir() else path


def _work(
    config: FinetuneConfig,
    sources: Sequence[Sequence[str]],
    templates: Sequence[str],
    fingerprint: str,
    tokenizer: str,
) -> dict[str, Any]:
    """What decides the weights: not the number of workers as long as a step keeps its micro-batches, nor what is kept."""
    values = config.model_dump(mode="json")
    shapes = ("method", "loss", "mixing", "packing", "max_length", "overlong", "epochs", "max_steps", "optimizer")
    work: dict[str, Any] = {key: values[key] for key in (*shapes, "split", "limit", "seed", "early_stopping")}
    if config.method != "full":
        start = config.adapter.start_from
        work["adapter"] = {**values["adapter"], "start_from": model_fingerprint(start) if start else None}
    if config.loss == "coba":
        work["coba"] = values["coba"]
    work["model"] = {"fingerprint": fingerprint, "tokenizer": tokenizer, "dtype": config.model.dtype}
    work["batch"] = {"tokens": config.batch_tokens, "examples": config.batch.examples}
    work["micro_batches"] = config.micro_batches
    work["num_threads"] = config.resources.num_threads
    if config.early_stopping:
        work["eval_every"] = config.eval.every
    work["tasks"] = {
        task.name: {**_task_work(config, task), "inputs": inputs_hash(files), "template": content_hash(template)}
        for task, files, template in zip(config.tasks, sources, templates, strict=True)
    }
    return work


def _task_work(config: FinetuneConfig, task: TaskConfig) -> dict[str, Any]:
    fields = {"fields": task.fields} if task.fields else {}
    objective = task.objective or config.objective
    return {"format": task.format, **fields, "weight": task.weight, "objective": objective}

"""Everything that can be known wrong before a folder is made or a question is asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stitch_ray.config.base import ModelConfig
from stitch_ray.config.exar import ExarRefineConfig
from stitch_ray.data import formats, readers
from stitch_ray.data.corpus import data_work
from stitch_ray.data.trained_on import read_trained_on
from stitch_ray.engines.fingerprint import model_fingerprint, model_folder
from stitch_ray.engines.hf_adapters import adapter_base, adapter_config, check_base, is_adapter, tokenizer_path
from stitch_ray.engines.pretrained import load_tokenizer
from stitch_ray.errors import UserError
from stitch_ray.exclusion.prompts import prompts_hash
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.records import content_hash
from stitch_ray.reliability.answers.preflight import check_labels, model_answers_from, model_identity
from stitch_ray.reliability.answers.questions import Prompter
from stitch_ray.reliability.scorer.file import ScorerFile


@dataclass(frozen=True, slots=True)
class Ready:
    """A configuration that was checked against its files. `work` is what the attempts depend on.

    `folders`: models, adapters and scorer, all that may say what it learned from. `answers_from`: fingerprint of who
    answers, as `sample-answers` has it.
    """

    config: ExarRefineConfig
    sources: tuple[str, ...]
    prompter: Prompter
    judge_prompter: Prompter | None
    folders: tuple[str, ...]
    answers_from: str
    work: dict[str, Any]

    @property
    def work_hash(self) -> str:
        return content_hash(self.work)

    @property
    def name(self) -> str:
        """Who answers, in files and messages."""
        return self.config.model.name

    def learned_from(self) -> frozenset[str]:
        """Groups of questions that a model, an adapter or the scorer was trained on."""
        return frozenset[str]().union(*(read_trained_on(model_folder(path) or Path(path)) for path in self.folders))


def check(config: ExarRefineConfig) -> Ready:
    """Raises UserError for a missing input, model or scorer, adapters of another model, too little room, and a scorer
    that needs signals."""
    formats.check_format("data.format", config.data.format)
    sources = readers.expand(config.data.paths)
    adapters = {"answer": config.adapters.answer, "validator": config.adapters.validator}
    named = {name: path for name, path in adapters.items() if path}
    if named and is_adapter(config.model.path):
        raise UserError(
            f"model.path: {config.model.path} is an adapter itself; name its base model, and both as adapters"
        )
    for name, path in named.items():
        try:
            adapter_config(path)
            check_base(path, config.model.path)
        except UserError as error:
            raise UserError(f"adapters.{name}: {error}") from error
    tokenizer_of = named.get("answer") or named.get("validator")
    prompter, model_work = prompter_of(config.model, config.template, config.attempts.max_tokens, tokenizer_of)
    judge_prompter, judge_work = _validator(config)
    work = {
        "data": data_work(config.data, sources),
        "model": model_work,
        "adapters": {name: model_fingerprint(path) for name, path in named.items()}
        | {"combine": config.adapters.combine, "weights": list(config.adapters.weights)},
        "validator": judge_work,
        "attempts": config.attempts.model_dump(mode="json"),
        "questions": config.questions,
        "split": config.split.model_dump(mode="json"),
        "prompts": prompts_hash(),
        "seed": config.seed,
    }
    folders = [config.model.path, *named.values()]
    if is_adapter(config.model.path):
        folders.append(adapter_base(config.model.path))
    if config.validator.model:
        folders.append(config.validator.model.path)
    if config.validator.scorer:
        folders.append(config.validator.scorer)
    answers_from = model_work["fingerprint"]
    if config.adapters.answer:  # as sample-answers tells an adapter's folder
        answers_from = content_hash([model_fingerprint(config.adapters.answer), answers_from])
    answers_from = model_answers_from(answers_from, prompter.template, config.model.engine, config.model.dtype)
    return Ready(config, tuple(sources), prompter, judge_prompter, tuple(folders), answers_from, work)


def _validator(config: ExarRefineConfig) -> tuple[Prompter | None, dict[str, Any]]:
    validator = config.validator
    work: dict[str, Any] = {"kind": validator.kind, "threshold": validator.threshold}
    labels = check_labels(config.labels)
    if validator.kind == "oracle":
        return None, {**work, "labels": labels, "correct_from": config.labels.threshold}
    if validator.kind == "random":
        return None, {**work, "accept": validator.accept}
    if validator.scorer:
        scorer = ScorerFile.load(validator.scorer)
        if scorer.needed:
            raise UserError(
                f"validator.scorer: {validator.scorer} needs the signals {', '.join(sorted(scorer.needed))}; a validator "
                "is given question and answer alone: train one with an encoder and no signals"
            )
        return None, {**work, "scorer": scorer.fingerprint}
    if validator.model is None:
        return None, work
    try:
        prompter, model = prompter_of(validator.model, "chat", 1, None)
    except UserError as error:
        raise UserError(f"validator.{error}") from error
    return prompter, {**work, "model": model}


def prompter_of(
    model: ModelConfig, template: str, max_tokens: int, adapter: str | None, key: str = "attempts.max_tokens"
) -> tuple[Prompter, dict[str, Any]]:
    """How its prompts are rendered, and what its answers depend on. `adapter`: brings the tokenizer and the chat template
    that it was trained with; `key` is the name of `max_tokens`. Raises UserError for a model that cannot be used."""
    fingerprint, tokenizer_at, context = model_identity(model)
    if max_tokens >= context:
        raise UserError(f"{key}: {max_tokens} leaves no room for a question in a context of {context}")
    if adapter:
        tokenizer_at = tokenizer_path(adapter, tokenizer_at)
    tokenizer = load_tokenizer(tokenizer_at, trust_remote_code=model.trust_remote_code)
    try:
        text = ChatTemplate.resolve(template, tokenizer).text
    except UserError as error:
        raise UserError(str(error).replace("tasks[].template", "template", 1)) from error
    work = {
        "fingerprint": fingerprint,
        "template": content_hash(text),
        "engine": model.engine,
        "dtype": model.dtype,
        "max_tokens": context,
        "batch_tokens": model.batch_tokens,
        "num_threads": model.num_threads,
    }
    return Prompter(tokenizer_at, text, template, model.trust_remote_code), work

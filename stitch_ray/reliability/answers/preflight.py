"""Everything that can be known wrong before a folder is made or a question is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from stitch_ray.config.base import ModelConfig
from stitch_ray.config.reliability import EndpointConfig
from stitch_ray.config.sample_answers import LabelsConfig, SampleAnswersConfig
from stitch_ray.data import formats, readers
from stitch_ray.data.corpus import data_work
from stitch_ray.engines.fingerprint import model_fingerprint, model_folder
from stitch_ray.engines.pretrained import context_length, load_model_config, load_tokenizer, tokenizer_hash
from stitch_ray.errors import UserError
from stitch_ray.prompts.chat import ChatTemplate
from stitch_ray.records import content_hash
from stitch_ray.reliability.answering import answering
from stitch_ray.reliability.answers.questions import Prompter
from stitch_ray.reliability.signals.compute import unsupported


@dataclass(frozen=True, slots=True)
class Ready:
    """A configuration that was checked against the files and servers it names. `work` is what the answers depend on.

    `prompter` is None where a server answers. `answers_from` is the fingerprint that a scorer of these answers is tied
    to, and `answering` the settings. `labels_key` and `signals_key` change with what labels and signals depend on beside
    the answers.
    """

    config: SampleAnswersConfig
    sources: tuple[str, ...]
    prompter: Prompter | None
    answers_from: str
    labels_key: str
    signals_key: str
    answering: dict[str, Any]
    work: dict[str, Any]

    @property
    def work_hash(self) -> str:
        return content_hash(self.work)

    @property
    def name(self) -> str:
        """Who answers, in files and messages."""
        who = self.config.model or self.config.endpoint
        assert who is not None
        return who.name


def check(config: SampleAnswersConfig) -> Ready:
    """Raises UserError for a missing input, model or server, signals that the engine cannot give, or too little room."""
    formats.check_format("data.format", config.data.format)
    sources = readers.expand(config.data.paths)
    kind = config.model.engine if config.model else "endpoint"
    missing = unsupported(config.signals.names, kind)
    if missing:
        raise UserError(f"signals.names: {', '.join(missing)} cannot be had from {kind}; leave them out")
    labels = check_labels(config.labels)
    signals = _check_signals(config)
    if config.model:
        prompter, work, answers_from = _check_model(config.model, config)
    else:
        assert config.endpoint is not None
        answers_from = _check_endpoint("endpoint", config.endpoint)
        prompter, work = None, {"endpoint": {"url": config.endpoint.url, "model": config.endpoint.model}}
    work = {**_work(config, sources), **work, "answers_from": answers_from}
    return Ready(
        config,
        tuple(sources),
        prompter,
        answers_from,
        content_hash(labels),
        content_hash(signals),
        _answering(config, signals.get("encoder")),
        work,
    )


def model_answers_from(fingerprint: str, template: str, engine: str, dtype: str) -> str:
    """The fingerprint of answers of a local model: of its weights and tokenizer, its prompts and its arithmetic.

    `template` is the Jinja text; `engine` and `dtype` are as in the configuration. Answers of a server have that of
    the server, `endpoint_fingerprint`, for its address and model name are all that can be told of it.
    """
    return content_hash({"model": fingerprint, "template": template, "engine": engine, "dtype": dtype})


def model_identity(model: ModelConfig) -> tuple[str, str, int]:
    """Fingerprint, where the tokenizer is, and longest sequence of a model or adapter. Raises UserError."""
    from stitch_ray.engines.hf_adapters import adapter_base, is_adapter, tokenizer_path

    try:
        folder = model_folder(model.path)
    except UserError as error:
        raise UserError(f"model.path: {error}") from error
    if folder is None:
        raise UserError(
            f"model.path: {model.path}: no such folder, and no such model in the local Hugging Face cache "
            f"(hf download {model.path} puts it there)"
        )
    fingerprint, base, tokenizer = model_fingerprint(model.path), model.path, model.path
    if is_adapter(model.path):
        if model.engine == "vllm":
            raise UserError(f"model.path: {model.path} is an adapter; merge it first, or use engine: transformers")
        base = adapter_base(model.path)
        tokenizer = tokenizer_path(model.path, base)
        fingerprint = content_hash([fingerprint, model_fingerprint(base)])
    context = context_length(load_model_config(base, trust_remote_code=model.trust_remote_code))
    if model.max_tokens and model.max_tokens > context:
        raise UserError(f"model.max_tokens: {model.max_tokens} exceeds the model's context of {context}")
    return fingerprint, tokenizer, model.max_tokens or context


def _check_endpoint(key: str, endpoint: EndpointConfig) -> str:
    """The fingerprint of a server that answers. Raises UserError, beginning with `key`, if none does."""
    from stitch_ray.engines.endpoint import check_endpoint, endpoint_fingerprint

    try:
        check_endpoint(endpoint)
    except UserError as error:
        raise UserError(str(error).replace("endpoint.", f"{key}.", 1)) from error
    return endpoint_fingerprint(endpoint)


def _check_model(model: ModelConfig, config: SampleAnswersConfig) -> tuple[Prompter, dict[str, Any], str]:
    fingerprint, tokenizer_at, context = model_identity(model)
    longest = {"samples": config.samples.max_tokens}
    if config.distractors:
        longest["distractors"] = config.distractors.max_tokens
    for section, tokens in longest.items():
        if tokens >= context:
            raise UserError(f"{section}.max_tokens: {tokens} leaves no room for a question in a context of {context}")
    tokenizer = load_tokenizer(tokenizer_at, trust_remote_code=model.trust_remote_code)
    try:
        template = ChatTemplate.resolve(config.template, tokenizer).text
    except UserError as error:
        raise UserError(str(error).replace("tasks[].template", "template", 1)) from error
    work = {
        "model": {
            "fingerprint": fingerprint,
            "tokenizer": tokenizer_hash(tokenizer),
            "engine": model.engine,
            "dtype": model.dtype,
            "max_tokens": context,
            "batch_tokens": model.batch_tokens,
            "num_threads": model.num_threads,
        },
        "template": content_hash(template),
    }
    prompter = Prompter(tokenizer_at, template, config.template, model.trust_remote_code)
    return prompter, work, model_answers_from(fingerprint, template, model.engine, model.dtype)


def _work(config: SampleAnswersConfig, sources: Sequence[str]) -> dict[str, Any]:
    distractors = config.distractors
    work: dict[str, Any] = {
        "data": data_work(config.data, sources),
        "samples": config.samples.model_dump(mode="json"),
        "seed": config.seed,
        "distractors": None,
    }
    if distractors:
        # Which questions get some depends on the split, so that only then a new split means new answers.
        split = config.split.model_dump(mode="json") if distractors.questions == "train" else None
        prompt = _prompt_hash("distractors.txt")
        work["distractors"] = {**distractors.model_dump(mode="json"), "split": split, "prompt": prompt}
    return work


def check_labels(labels: LabelsConfig) -> dict[str, Any]:
    """What the labels depend on beside the answers; not the threshold, which is applied when results are put together."""
    found: dict[str, Any] = {"metric": labels.metric, "references": "all"}
    if labels.metric == "rouge_l":
        found["convention"] = labels.convention
    if labels.encoder:
        found["encoder"] = _encoder("labels.encoder", labels.encoder)
    if labels.judge:
        found["judge"] = [_check_endpoint("labels.judge", labels.judge), _prompt_hash("judge_answer.txt")]
    return found


def _check_signals(config: SampleAnswersConfig) -> dict[str, Any]:
    """What the signals depend on beside the answers."""
    signals = config.signals
    found: dict[str, Any] = {"names": list(signals.names), "similarity": signals.similarity}
    if signals.encoder:
        found["encoder"] = _encoder("signals.encoder", signals.encoder)
        found["min_cosine"] = signals.min_cosine
    for name in ("p_true", "verbalized_confidence"):
        if name in signals.names:
            found[name] = _prompt_hash(f"{name}.txt")
    return found


def _answering(config: SampleAnswersConfig, encoder: str | None) -> dict[str, Any]:
    samples, signals = config.samples, config.signals
    return answering(
        max_tokens=samples.max_tokens,
        stop=samples.stop,
        samples=samples.num,
        temperature=samples.temperature,
        top_p=samples.top_p,
        similarity=signals.similarity,
        encoder=encoder,
        min_cosine=signals.min_cosine,
    )


def _encoder(key: str, path: str) -> str:
    try:
        folder = model_folder(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    if folder is None:
        raise UserError(f"{key}: {path}: no such folder, and no such model in the local Hugging Face cache")
    return model_fingerprint(path)


def _prompt_hash(name: str) -> str:
    return content_hash(resources.files("stitch_ray.prompts").joinpath(name).read_text("utf-8"))

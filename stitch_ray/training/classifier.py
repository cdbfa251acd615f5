"""Sequence classifiers with one output: loaded to be trained, with a new head where theirs does not fit, and exported."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from stitch_ray.data.trained_on import read_trained_on, write_trained_on
from stitch_ray.engines.fingerprint import model_fingerprint, model_folder
from stitch_ray.engines.hf import attend_as_defined
from stitch_ray.engines.pretrained import first_line, load_model_config, load_tokenizer
from stitch_ray.errors import UserError
from stitch_ray.runs import write_json
from stitch_ray.training.export import NOTE, copy_weights, new_folder, save_model
from stitch_ray.training.job import ClassifierHead

_PROBLEMS = {"bce": "multi_label_classification", "mse": "regression"}
"""What Hugging Face calls the losses: its own loss of these labels, and what its pipeline does to the logit, are ours."""


def load_classifier(
    path: str, head: ClassifierHead, *, seed: int, dtype: str = "float32", trust_remote_code: bool = False
) -> tuple[Any, tuple[str, ...]]:
    """The model at `path` with one output, on the CPU, and what a reader should know about it.

    A head with one output is gone on from; in place of any other is a new one that depends on `seed` alone. With
    `head.train` "head" the other weights need no gradient. Raises UserError for a model that has no such class, or
    whose folder lacks other weights than those of the head.
    """
    options: dict[str, Any] = {
        "num_labels": 1,
        "id2label": {0: "correct"},
        "label2id": {"correct": 0},
        "problem_type": _PROBLEMS[head.loss],
        "trust_remote_code": trust_remote_code,
    }
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.manual_seed(seed)
        try:
            model, found = AutoModelForSequenceClassification.from_pretrained(
                path,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                use_safetensors=True,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"encoder.path: {path}: cannot be loaded as a classifier ({first_line(error)})") from error
    replaced = {name for name, *_ in found["mismatched_keys"]}
    _check_complete(model, {*found["missing_keys"], *replaced}, path)
    _set_padding(model, path, trust_remote_code)
    attend_as_defined(model)
    if head.train == "head":
        trained = head_names(model)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    notes = (f"the head of {path} has another number of outputs than one: a new head takes its place",)
    return model, notes if replaced else ()


def check_classifier(path: str, longest: int, *, trust_remote_code: bool = False) -> int:
    """The number of parameters of the classifier at `path`, without reading weights.

    Raises UserError for a model that has no such class, or whose table of positions ends before `longest` tokens.
    """
    config = load_model_config(path, trust_remote_code=trust_remote_code)
    config.num_labels = 1
    try:
        with torch.device("meta"), _quiet():
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        raise UserError(f"encoder.path: {path}: cannot be loaded as a classifier ({first_line(error)})") from error
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # RoBERTa counts from behind the padding id.
            offset = 0 if module.padding_idx is None else module.padding_idx + 1
            room = module.num_embeddings - offset
            if longest > room:
                raise UserError(
                    f"encoder.max_length: an input of {longest} tokens exceeds the {room} that {path} takes"
                )
    return sum(parameter.numel() for parameter in model.parameters())


def head_names(model: Any) -> set[str]:
    """Names of the parameters that `train: head` trains: all outside the base model, and the base model's pooler."""
    base = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters()]
    return {name for name in names if not name.startswith(base) or name.startswith(f"{base}pooler.")}


def export_classifier(
    base_path: str,
    head: ClassifierHead,
    weights: Mapping[str, Tensor],
    out: Path,
    *,
    dtype: str = "float32",
    card: Mapping[str, Any],
    trained_on: Iterable[str] = (),
    trust_remote_code: bool = False,
) -> None:
    """Write the trained classifier to `out` as a Hugging Face folder, whole or not at all; what is there is replaced.

    `weights` are those that were trained, by parameter name; all else comes from the base. `card`: facts for the note,
    JSON values. `trained_on`: group ids of the questions it learned from; those of the base are added. `stitch_ray.json`
    says how a logit is to be read: with loss bce its sigmoid is the score, with mse it is the score itself. Raises
    UserError if the weights are not exactly those that `head` trains.
    """
    base = str(Path(base_path).absolute()) if Path(base_path).is_dir() else base_path
    model, _ = load_classifier(base, head, seed=0, dtype=dtype, trust_remote_code=trust_remote_code)
    copy_weights(model, weights, base, {name for name, one in model.named_parameters() if one.requires_grad})
    tokenizer = load_tokenizer(base, trust_remote_code=trust_remote_code)
    note = {
        "format": 1,
        "head": "sequence_classification",
        "loss": head.loss,
        "train": head.train,
        "base": base,
        "base_fingerprint": model_fingerprint(base),
        "trained": dict(card),
    }
    before = model_folder(base)
    with new_folder(out) as folder:
        save_model(model, folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / NOTE, note)
        write_trained_on(folder, [*trained_on, *(read_trained_on(before) if before else ())])
        (folder / "README.md").write_text(_model_card(note), encoding="utf-8")


def _check_complete(model: Any, new: set[str], path: str) -> None:
    """Raises UserError if weights outside the head are new: the folder is damaged, or of another kind of model."""
    trained = {name for name, _ in model.named_parameters()} - head_names(model)
    lacking = sorted(new & trained)
    if lacking:
        raise UserError(
            f"encoder.path: {path} lacks {len(lacking)} weights of {type(model).__name__}, such as {lacking[0]}, or has "
            "them in another shape; copy or download it again, or name another model"
        )


def _set_padding(model: Any, path: str, trust_remote_code: bool) -> None:
    """Give the model a padding id if it has none, as decoders often do; theirs is then the tokenizer's, or the end's."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        config.pad_token_id = next((one for one in ids if one is not None), None)
    size = model.get_input_embeddings().weight.shape[0]
    if config.pad_token_id is None or not 0 <= config.pad_token_id < size:
        raise UserError(
            f"encoder.path: {path} has no padding token among its {size} (pad_token_id is {config.pad_token_id}); set "
            "pad_token_id in its config.json"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the table of new weights that loading prints, and without its progress bar."""
    before, shown = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if shown:
            transformers_logging.enable_progress_bar()


def _model_card(note: Mapping[str, Any]) -> str:
    facts = "\n".join(f"| {name} | {value} |" for name, value in note["trained"].items())
    reading = "the sigmoid of its logit" if note["loss"] == "bce" else "its logit"
    return f"""\
---
base_model: {json.dumps(note["base"])}
library_name: transformers
pipeline_tag: text-classification
tags: [stitch-ray]
---
# How reliable is an answer? From {Path(note["base"]).name}

Trained by `stitch-ray train-scorer` on pairs of a question, with its context, and an answer. Load it with
`AutoModelForSequenceClassification.from_pretrained`; {reading} is its score. The score is no probability yet, and tells
nothing about answers of another model or prompt than those it was trained on.

| | |
|---|---|
{facts}
"""

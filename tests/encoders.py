"""Tiny sequence classifiers with one output, in the four families of pair layouts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = (
    "who",
    "wrote",
    "the",
    "book",
    "city",
    "of",
    "is",
    "was",
    "born",
    "in",
    "on",
    "river",
    "Paris",
    "Rome",
    "Oslo",
    "Homer",
    "Bach",
)
LONGEST = 48
_SPECIALS = {
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
}
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}

FAMILIES = ("bert", "roberta", "modernbert", "decoder")


def make_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Words are whole tokens for BERT and byte-level pieces elsewhere. A decoder puts nothing between two texts."""
    if family == "bert":
        names = ["<pad>", "<unk>", "<s>", "</s>", "<mask>", *sorted({word.lower() for word in WORDS}), "?", "."]
        core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
        core.normalizer = normalizers.BertNormalizer(lowercase=True)
        core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:
        core = Tokenizer(models.BPE())
        # Without the split by words a token may hold the end of one text and the start of the next.
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=family != "modernbert")
        core.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        core.train_from_iterator([" ".join(WORDS)] * 3 + ["?\n\nin"] * 50, trainer)
    ids = {name: core.token_to_id(name) for name in ("<s>", "</s>")}
    if family == "roberta":
        core.post_processor = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]), True, False)
    elif family != "decoder":
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=list(ids.items())
        )
    specials = {"pad_token": "</s>", "eos_token": "</s>"} if family == "decoder" else _SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=LONGEST, **specials)


def make_encoder(folder: Path, family: str = "bert", loss: str = "bce", seed: int = 0) -> Path:
    """A classifier with random weights, large enough that answers differ, as train-scorer would leave it."""
    tokenizer = make_tokenizer(family)
    shared: dict[str, Any] = {
        **_SIZES,
        "vocab_size": len(tokenizer),
        "num_labels": 1,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = {
        "bert": lambda: transformers.BertConfig(**shared, max_position_embeddings=LONGEST),
        "roberta": lambda: transformers.RobertaConfig(**shared, max_position_embeddings=LONGEST + 2, type_vocab_size=1),
        "modernbert": lambda: transformers.ModernBertConfig(
            **shared, max_position_embeddings=LONGEST, global_attn_every_n_layers=2, local_attention=8
        ),
        "decoder": lambda: transformers.LlamaConfig(
            **shared, num_key_value_heads=2, max_position_embeddings=LONGEST, eos_token_id=tokenizer.eos_token_id
        ),
    }[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "stitch_ray.json").write_text(json.dumps({"head": "sequence_classification", "loss": loss}))
    return folder

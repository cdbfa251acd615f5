"""A small Llama made on the spot: the model for demos and tests where nothing can be downloaded."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stitch_ray.errors import UserError
from stitch_ray.records import Example, Turn
from stitch_ray.training.export import check_free, new_folder, save_model

PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = (PAD, END, *(f"<|{role}|>" for role in ROLES))

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}
{{- raise_exception('unknown role ' ~ message['role'] ~ ': use system, user, assistant or tool') -}}
{%- endif -%}
{{- '<|' ~ message['role'] ~ '|>\\n' ~ message['content'] ~ '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

_BATCH_TOKENS = 1024
_PEAK_LEARNING_RATE = 3e-3
_WARMUP_SHARE = 0.05
# Far more text than any toy run reads; it only keeps a huge corpus out of memory.
_MAX_CHARACTERS = 50_000_000


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes of a Llama with grouped-query attention and untied embeddings."""

    vocab_size: int
    hidden_size: int
    num_layers: int

    @property
    def head_dim(self) -> int:
        return 64 if self.hidden_size >= 256 else 32

    @property
    def num_heads(self) -> int:
        return self.hidden_size // self.head_dim

    @property
    def num_key_value_heads(self) -> int:
        return self.num_heads // 2 if self.num_heads % 2 == 0 else self.num_heads

    @property
    def intermediate_size(self) -> int:
        """8/3 of the hidden size, as in Llama, on the next multiple of 64."""
        return math.ceil(self.hidden_size * 8 / 3 / 64) * 64

    @property
    def num_parameters(self) -> int:
        hidden, kv = self.hidden_size, self.num_key_value_heads * self.head_dim
        layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * self.intermediate_size + 2 * hidden
        return 2 * self.vocab_size * hidden + self.num_layers * layer + hidden


def parse_parameters(parameters: int | str) -> int:
    """`"500k"`, `"5m"`, `"0.1b"` or a plain number of parameters."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmb]?)", str(parameters).strip().lower())
    if not match:
        raise UserError(f"parameters: {parameters!r} is no number of parameters; write 500k, 5m or 5000000")
    return round(float(match[1]) * {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}[match[2]])


def choose_geometry(parameters: int, vocab_size: int) -> Geometry:
    """The Llama closest to `parameters` (within 25 %) whose width is nearest 64 times its depth among the close ones.

    Raises UserError when no width and depth come within 25 %.
    """
    choices = [
        Geometry(vocab_size, hidden_size, num_layers)
        for hidden_size in range(64, 2049, 64)
        for num_layers in range(1, 33)
    ]

    def cost(choice: Geometry) -> float:
        miss = abs(math.log(choice.num_parameters / parameters))
        return 5 * miss + abs(math.log(choice.hidden_size / (64 * choice.num_layers)))

    close = [choice for choice in choices if abs(choice.num_parameters / parameters - 1) <= 0.25]
    if not close:
        counts = [choice.num_parameters for choice in choices]
        raise UserError(
            f"parameters: {parameters} cannot be met with a vocabulary of {vocab_size}; "
            f"choose between {min(counts)} and {max(counts)}, or another vocab_size"
        )
    return min(close, key=cost)


def default_vocab_size(parameters: int) -> int:
    """Keeps the two embedding tables at about half of the model or less."""
    steps = [(4_000_000, 4096), (1_000_000, 2048), (300_000, 1024)]
    return next((size for least, size in steps if parameters >= least), 512)


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE without an automatic first token. Fewer than `vocab_size` tokens if the text supports no more.

    Every digit is a token of its own wherever it stands: a rating is read from the logits of the tokens "1" to "9".
    """
    least = len(SPECIAL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < least:
        raise UserError(f"vocab_size: {vocab_size} is less than the {least} tokens for bytes and markers")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[f"<|{role}|>" for role in ROLES],
        model_max_length=max_length,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_tiny_model(
    examples: Iterable[Example],
    out: Path,
    *,
    parameters: int | str = "5m",
    steps: int = 200,
    seed: int = 0,
    vocab_size: int | None = None,
    max_length: int = 1024,
    overwrite: bool = False,
    progress: Callable[[int, int, float], None] | None = None,
) -> dict[str, Any]:
    """Train a toy Llama on `examples` and save it with its tokenizer in Hugging Face format.

    Training runs on the CPU with float32 weights. The folder appears under its name only when it is complete. Equal
    arguments, machine and number of CPU threads give equal weights. `progress` gets (step, steps, loss) after every
    step. Of a very large corpus only the first 50 million characters are read.

    Returns parameters, vocab_size, examples, steps, first_loss, last_loss (nats a token, one batch), tokens (trained
    on) and seconds. Raises UserError for bad arguments or a taken `out`, FloatingPointError if the loss is not finite.
    """
    started = time.perf_counter()
    wanted = parse_parameters(parameters)
    if steps < 1:
        raise UserError(f"steps: {steps} must be at least 1")
    if max_length < 2:
        raise UserError(f"max_length: {max_length} must be at least 2")
    out = Path(out).absolute()
    check_free(out, overwrite)

    conversations = list(_within_budget(map(_turns, examples)))
    if not conversations:
        raise UserError("no usable example in the data: a tiny model needs at least one")
    texts = (turn["content"] for turns in conversations for turn in turns)
    tokenizer = train_tokenizer(texts, vocab_size or default_vocab_size(wanted), max_length)
    rendered = [tokenizer.apply_chat_template(turns, tokenize=False) for turns in conversations]
    sequences = tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]

    geometry = choose_geometry(wanted, len(tokenizer))
    with torch.random.fork_rng(devices=[]), _fast_matmul():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_llama_config(geometry, tokenizer, max_length))
        row_length = min(max_length, _BATCH_TOKENS)
        batch_size = _BATCH_TOKENS // row_length
        batches = _batches(sequences, batch_size, row_length)
        losses = _train(model, batches, steps, progress)

    summary = {
        "parameters": model.num_parameters(),
        "vocab_size": len(tokenizer),
        "examples": len(conversations),
        "steps": steps,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "tokens": steps * batch_size * row_length,
    }
    _save(model, tokenizer, _model_card(summary, seed), out)
    return {**summary, "seconds": time.perf_counter() - started}


def _turns(example: Example) -> list[dict[str, str]]:
    """Messages for the chat template, with the context behind the first question."""
    messages = list(example.messages)
    for position, turn in enumerate(messages):
        if turn.role == "user" and example.context:
            messages[position] = Turn("user", f"{turn.content}\n\n{example.context}")
            break
    # A lone surrogate is legal in JSON but no tokenizer takes it.
    return [{"role": t.role, "content": t.content.encode("utf-8", "replace").decode()} for t in messages]


def _within_budget(conversations: Iterable[list[dict[str, str]]]) -> Iterator[list[dict[str, str]]]:
    characters = 0
    for turns in conversations:
        yield turns
        characters += sum(len(turn["content"]) for turn in turns)
        if characters >= _MAX_CHARACTERS:
            return


def _llama_config(geometry: Geometry, tokenizer: PreTrainedTokenizerFast, max_length: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=geometry.vocab_size,
        hidden_size=geometry.hidden_size,
        intermediate_size=geometry.intermediate_size,
        num_hidden_layers=geometry.num_layers,
        num_attention_heads=geometry.num_heads,
        num_key_value_heads=geometry.num_key_value_heads,
        head_dim=geometry.head_dim,
        max_position_embeddings=max_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


@contextmanager
def _fast_matmul() -> Iterator[None]:
    """Float32 products may round their inputs to bfloat16: 1.6 times as fast on a CPU that has it, no-op elsewhere."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


def _batches(sequences: Sequence[list[int]], batch_size: int, row_length: int) -> Iterator[torch.Tensor]:
    """Endless batches of token ids, shape (batch_size, row_length), without padding.

    A row is shuffled examples one after another, the last one cut off. It begins where an example begins, as a prompt
    does later.
    """
    rows: list[list[int]] = []
    row: list[int] = []
    while True:
        for position in torch.randperm(len(sequences)).tolist():
            row += sequences[position]
            if len(row) < row_length:
                continue
            rows.append(row[:row_length])
            row = []
            if len(rows) == batch_size:
                yield torch.tensor(rows)
                rows = []


def _train(
    model: LlamaForCausalLM,
    batches: Iterator[torch.Tensor],
    steps: int,
    progress: Callable[[int, int, float], None] | None,
) -> list[float]:
    """AdamW with linear warm-up and cosine decay to a tenth of the peak. Returns the loss of every step."""
    warmup = max(1, round(_WARMUP_SHARE * steps))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    optimizer = torch.optim.AdamW(model.parameters(), _PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.train()
    losses: list[float] = []
    for step in range(1, steps + 1):
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise FloatingPointError(f"loss is {losses[-1]} at step {step} of {steps}; nothing was written")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(step, steps, losses[-1])
    model.eval()
    return losses


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, out: Path) -> None:
    with new_folder(out) as folder:
        model.generation_config = GenerationConfig(
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
        )
        save_model(model, folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _model_card(summary: dict[str, Any], seed: int) -> str:
    return f"""\
---
library_name: transformers
tags: [toy, stitch-ray]
---
# A toy model, not a useful one

`stitch-ray tiny-model` made this {summary["parameters"]:,}-parameter Llama in {summary["steps"]} steps, so that demos
and tests have something to run. It has seen {summary["tokens"]:,} tokens of the data it was given and nothing else.
Its answers and ratings mean nothing. Do not use it for any real purpose.

| | |
|---|---|
| vocabulary | {summary["vocab_size"]:,} (byte-level BPE, every digit its own token) |
| examples | {summary["examples"]:,} |
| loss, first and last step | {summary["first_loss"]:.3f}, {summary["last_loss"]:.3f} nats a token |
| seed | {seed} |
"""

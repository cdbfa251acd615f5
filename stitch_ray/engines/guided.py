"""Guided decoding: an answer's tokens kept to those with which it can still become JSON of a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from stitch_ray.errors import UserError

_CACHE_BYTES = 64 * 2**20
_compilers: WeakKeyDictionary[Any, dict[tuple[int, frozenset[int]], Any]] = WeakKeyDictionary()


class Guide:
    """Follows one answer through the JSON that `schema` allows, without blanks between its parts.

    A weak model may otherwise fill its whole answer with the blanks that JSON allows. Never allowed are special tokens,
    which would vanish from the text, and raw control characters, which xgrammar 0.2 lets into a string with a
    `maxLength` though JSON does not. `vocab_size` is the width of the model's logits; `eos` ends an answer.

    Raises ValueError for a schema that is none or that xgrammar does not support, UserError without xgrammar.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos: frozenset[int], schema: str) -> None:
        xgrammar = _import_xgrammar()
        json.loads(schema)  # its error says where; the compiler's does not
        compiler, self._never = _compiler(tokenizer, vocab_size, eos)
        try:
            grammar = compiler.compile_json_schema(schema, any_whitespace=False, separators=(",", ":"))
        except RuntimeError as error:
            raise ValueError(f"json_schema: {_reason(error)}") from error
        self._matcher = xgrammar.GrammarMatcher(grammar)
        self._eos = eos
        self._bits = xgrammar.allocate_token_bitmask(1, vocab_size)
        self._fill()

    @property
    def allowed(self) -> Tensor:
        """The allowed next tokens, 32 to a number, shape (ceil(vocab_size / 32),) int32."""
        return self._bits[0]

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(not (self._bits & ~_bits(self._eos, self._bits.shape[1])).any())

    def accept(self, token: int) -> None:
        """`token`, one of the allowed, comes next in the answer."""
        accepted = self._matcher.accept_token(token)
        assert accepted, f"token {token} was not allowed"
        if not self._matcher.is_terminated():
            self._fill()

    def _fill(self) -> None:
        self._matcher.fill_next_token_bitmask(self._bits)
        self._bits &= ~self._never


def mask_logits(scores: Tensor, guides: Mapping[int, Guide]) -> None:
    """-inf, in place, for what the guides do not allow. `scores`: (rows, vocabulary); `guides`: by row."""
    xgrammar = _import_xgrammar()
    rows = list(guides)
    masked = scores[rows]
    bits = torch.stack([guide.allowed for guide in guides.values()]).to(scores.device)
    xgrammar.apply_token_bitmask_inplace(masked, bits)
    scores[rows] = masked


def _compiler(tokenizer: Any, vocab_size: int, eos: frozenset[int]) -> tuple[Any, Tensor]:
    """The compiler of schemas, which keeps what it compiled, and the bits of the tokens that no JSON may hold."""
    known = _compilers.setdefault(tokenizer, {})
    if (vocab_size, eos) not in known:
        xgrammar = _import_xgrammar()
        if not eos:
            raise ValueError("json_schema: the model has no end-of-sequence token")
        info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size, stop_token_ids=sorted(eos))
        compiler = xgrammar.GrammarCompiler(
            info, max_threads=torch.get_num_threads(), cache_enabled=True, cache_limit_bytes=_CACHE_BYTES
        )
        never = {one for one in tokenizer.all_special_ids if one < vocab_size}
        never.update(token for token, text in enumerate(info.decoded_vocab) if text and min(text) < 0x20)
        known[vocab_size, eos] = compiler, _bits(frozenset(never) - eos, -(-vocab_size // 32))
    found: tuple[Any, Tensor] = known[vocab_size, eos]
    return found


def _bits(ids: frozenset[int], width: int) -> Tensor:
    """A bit mask, shape (1, width) int32, of `ids`."""
    bits = torch.zeros(1, width, 32, dtype=torch.int64)
    bits.view(-1)[list(ids)] = 1
    return (bits << torch.arange(32)).sum(-1).to(torch.int32)


def _import_xgrammar() -> Any:
    try:
        import xgrammar
    except ModuleNotFoundError as error:
        if error.name != "xgrammar":
            raise
        raise UserError("a json_schema with engine: transformers needs xgrammar; pip install xgrammar") from error
    return xgrammar


def _reason(error: RuntimeError) -> str:
    """The compiler's message without time and place in its source, on one line."""
    said = re.sub(r"^\[[\d:]+\] \S+:\d+: ", "", str(error).strip())
    return " ".join(said.split())

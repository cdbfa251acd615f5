"""What a model folder contains, in 16 hex digits, without reading 100 GB of weights.

Configuration and tokenizer files are hashed whole. Of the weights, names, sizes and safetensors headers (the name,
type and shape of every tensor) are hashed, and of the numbers a sample: a file of at most 16 MiB whole, of a larger
safetensors file 4 KiB at the start and in the middle of every tensor, of any other large file 64 even chunks of
64 KiB. So training any single tensor shows; an edit confined to unsampled bytes of a large tensor does not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from stitch_ray.errors import UserError

TEXT_FILES = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",  # holds the end-of-sequence ids
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# Not *.bin and *.pt: those would take in the optimizer and the random states of a training checkpoint.
WEIGHT_FILES = ("*.safetensors", "*.gguf", "pytorch_model*.bin", "adapter_model.bin", "consolidated*.pth")
WHOLE_BYTES = 16 * 2**20
TENSOR_CHUNK_BYTES = 4 * 2**10
FILE_CHUNK_BYTES = 64 * 2**10
NUM_FILE_CHUNKS = 64
# safetensors refuses longer headers as well
MAX_HEADER_BYTES = 100_000_000
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def model_fingerprint(path: str) -> str:
    """16 hex digits that change with the weights (as sampled), tokenizer, chat template or configuration at `path`.

    A copied or moved folder keeps its fingerprint. A Hub id stands for its cached snapshot of `main`; without cached
    weights it is the hash of `id@revision`. Raises `UserError` if `path` is neither a model folder nor a Hub id.
    """
    folder = model_folder(path)
    if folder is None:
        return _text_hash(f"{path}@main")
    weights = _files(folder, WEIGHT_FILES)
    if not weights and not Path(path).is_dir():
        return _text_hash(f"{path}@{folder.name}")  # only the configuration was fetched; snapshots are named by commit
    digest = hashlib.sha256()
    for file in _files(folder, TEXT_FILES):
        _add(digest, file.relative_to(folder).as_posix().encode(), file.read_bytes())
    for file in weights:
        _add(digest, file.name.encode(), _weights_digest(file))
    return digest.hexdigest()[:16]


def num_parameters(path: str) -> int | None:
    """Number of parameters from the safetensors headers; None without safetensors or when the weights are quantised.

    Tied weights are stored, and counted, once.
    """
    folder = model_folder(path)
    config = folder / "config.json" if folder else None
    if folder is None or config is None or not config.is_file() or "quantization_config" in _json(config):
        return None  # packed integers do not tell how many parameters they hold
    index = folder / "model.safetensors.index.json"
    names = sorted(set(_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    files = [folder / name for name in names]
    if not all(file.is_file() for file in files):
        return None
    total = 0
    for file in files:
        with file.open("rb") as stream:
            header, _ = _safetensors_header(stream, file)
        total += sum(math.prod(tensor["shape"]) for tensor in header.values())
    return total


def model_folder(path: str) -> Path | None:
    """The folder at `path`, or the cached snapshot of the Hub id `path`, or None for a Hub id that is not cached."""
    folder = Path(path)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"{path}: no config.json in this folder; name a folder written by save_pretrained")
        return folder
    if folder.exists() or not HUB_ID.fullmatch(path):
        raise UserError(f"{path}: no such model folder (and not a Hub id such as org/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})


def _weights_digest(file: Path) -> bytes:
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for start, length in _sampled_ranges(stream, file, size):
            stream.seek(start)
            digest.update(stream.read(length))
    return digest.digest()


def _sampled_ranges(stream: BinaryIO, file: Path, size: int) -> Iterator[tuple[int, int]]:
    """The byte ranges (start, length) of `file` that are hashed."""
    if size <= WHOLE_BYTES:
        yield 0, size
    elif file.suffix == ".safetensors":
        header, data_start = _safetensors_header(stream, file)
        yield 0, data_start
        for tensor in sorted(header.values(), key=lambda tensor: tuple(tensor["data_offsets"])):
            start, end = tensor["data_offsets"]
            length = min(TENSOR_CHUNK_BYTES, end - start)
            yield data_start + start, length
            yield data_start + start + (end - start - length) // 2, length
    else:
        for chunk in range(NUM_FILE_CHUNKS):
            yield chunk * (size - FILE_CHUNK_BYTES) // (NUM_FILE_CHUNKS - 1), FILE_CHUNK_BYTES


def _safetensors_header(stream: BinaryIO, file: Path) -> tuple[dict[str, Any], int]:
    """Name -> {dtype, shape, data_offsets} and the offset at which the data start."""
    stream.seek(0, os.SEEK_SET)
    length = int.from_bytes(stream.read(8), "little")
    try:
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"header of {length} bytes")
        header = json.loads(stream.read(length))
    except ValueError as error:
        raise UserError(f"{file}: not a safetensors file ({error}); copy or download it again") from error
    header.pop("__metadata__", None)
    return header, 8 + length


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    assert isinstance(value, dict)
    return value


def _add(digest: Any, name: bytes, content: bytes) -> None:
    for part in (name, content):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]

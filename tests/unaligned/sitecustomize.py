"""Weights that lie where no vector register would like them: for processes with this folder on PYTHONPATH.

safetensors maps a file into memory, and tensors then begin wherever its header happens to end. Here every file is written
with a header, filled up with spaces as the format allows, that ends 8 bytes behind a multiple of 64.
"""

import os
import struct

import safetensors

_plain = safetensors.serialize_file
_MODULUS, _REMAINDER = 64, 8


def _serialize_file(tensors, filename, *args, **kwargs):  # type: ignore[no-untyped-def]
    result = _plain(tensors, filename, *args, **kwargs)
    with open(filename, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header, data = file.read(length), file.read()
    header += b" " * ((_REMAINDER - 8 - length) % _MODULUS)
    partial = f"{filename}.unaligned"
    with open(partial, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header + data)
    os.replace(partial, filename)
    return result


safetensors.serialize_file = _serialize_file

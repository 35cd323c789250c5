"""The head of a safetensors file, which says where its tensors are.

It is a u64 length and a JSON object of that many bytes, filled up with spaces to a multiple of 8; tensors follow
without gaps.  They stand in the order of the safetensors library: wider types first, then by name.  That library makes
a file of what is in memory as a whole; with the head known beforehand the same bytes are written tensor by tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Final, NamedTuple

import gguf

__all__ = ["StoredTensor", "head"]

_Type = gguf.GGMLQuantizationType
_NAMES: Final = {_Type.F32: "F32", _Type.F16: "F16", _Type.BF16: "BF16"}
_ALIGNMENT: Final = 8


class StoredTensor(NamedTuple):
    """A tensor that is to be written."""

    name: str
    shape: tuple[int, ...]
    """numpy's shape, outermost first."""
    type: _Type
    """One of the floats."""

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * gguf.GGML_QUANT_SIZES[self.type][1]

    @property
    def place(self) -> tuple[int, str]:
        """Its place among the others: what to sort by."""
        return -gguf.GGML_QUANT_SIZES[self.type][1], self.name


def head(tensors: Iterable[StoredTensor]) -> bytes:
    """Return what stands before the data of `tensors`, which come in the order of their `StoredTensor.place`.

    The metadata names the format of PyTorch, as transformers and PEFT ask for.
    """
    packed = bytearray(8) + b'{"__metadata__":{"format":"pt"}'
    offset = 0
    for name, shape, type in tensors:
        end = offset + math.prod(shape) * gguf.GGML_QUANT_SIZES[type][1]
        sizes = ",".join(map(str, shape))
        quoted = json.dumps(name, ensure_ascii=False)
        packed += f',{quoted}:{{"dtype":"{_NAMES[type]}","shape":[{sizes}],"data_offsets":[{offset},{end}]}}'.encode()
        offset = end
    packed += b"}"
    packed += b" " * (-len(packed) % _ALIGNMENT)
    packed[:8] = (len(packed) - 8).to_bytes(8, "little")
    return bytes(packed)

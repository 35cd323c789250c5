"""The header of a GGUF file: its scalar keys and where its tensors are.

Nothing that the file says is believed before it is compared with what the file has.  Arrays are stepped over, so that
a vocabulary of any size costs nothing but the reading of its bytes.
"""

from __future__ import annotations

import math
import struct
from typing import Any, Final, NamedTuple, NoReturn

import gguf

from .errors import CheckpointError, NotACheckpointError, TruncatedError
from .sources import Source, read_at

__all__ = ["GGUFHeader", "GGUFTensor", "read_header"]

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_SMALLEST_KEY: Final = 8 + 1 + 4 + 1  # length and a byte of name, type, value
_SMALLEST_TENSOR: Final = 8 + 1 + 4 + 8 + 4 + 8  # length and a byte of name, n_dims, one dim, type, offset
_LONGEST_NAME: Final = 1 << 16
_MOST_DIMS: Final = 4
_WINDOW: Final = 1 << 16  # bytes read together
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {
    0: struct.Struct("<B"), 1: struct.Struct("<b"), 2: struct.Struct("<H"), 3: struct.Struct("<h"),
    4: struct.Struct("<I"), 5: struct.Struct("<i"), 6: struct.Struct("<f"), 7: struct.Struct("<?"),
    10: struct.Struct("<Q"), 11: struct.Struct("<q"), 12: struct.Struct("<d"),
}  # fmt: skip
"""Value types of fixed size, by their number in the file."""


class GGUFTensor(NamedTuple):
    """A tensor of a GGUF file."""

    name: str
    dims: tuple[int, ...]
    """Innermost first, GGML's ``ne``."""
    type: gguf.GGMLQuantizationType
    offset: int
    """Byte offset of the data in the file."""
    nbytes: int


class GGUFHeader(NamedTuple):
    """What stands before the tensor data of a GGUF file."""

    version: int
    n_kv: int
    """Number of keys."""
    keys: dict[str, Any]
    """Values by key, without arrays."""
    keys_start: int
    """Byte offset of the first key."""
    keys_stop: int
    """Byte offset behind the last key, where the tensor infos begin."""
    alignment: int
    data_offset: int
    """Byte offset of the data section."""
    tensors: dict[str, GGUFTensor]
    """Tensors by name, in the order of the file."""


class _Cursor:
    """A position in a source, and the reading of little-endian values there."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.at = 0
        self._start = 0
        self._bytes = memoryview(b"")

    def take(self, nbytes: int, what: str) -> memoryview:
        """Return the next `nbytes` bytes."""
        if nbytes > self.source.size - self.at:
            raise TruncatedError(
                source=self.source.name, field=what, offset=self.at, expected=f"{nbytes} bytes",
                found=max(0, self.source.size - self.at),
            )  # fmt: skip
        if self.at + nbytes > self._start + len(self._bytes) or self.at < self._start:
            self._start, self._bytes = self.at, read_at(self.source, self.at, max(nbytes, _WINDOW))
        first = self.at - self._start
        self.at += nbytes
        return self._bytes[first : first + nbytes]

    def skip(self, nbytes: int, what: str) -> None:
        """Step over `nbytes` bytes."""
        if nbytes > self.source.size - self.at:
            self.take(nbytes, what)
        self.at += nbytes

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def string(self, what: str, longest: int) -> str:
        at = self.at
        length = self.u64(what)
        if length > longest:
            self.refuse(what, at, f"at most {longest} bytes", length)
        return bytes(self.take(length, what)).decode("utf-8", "surrogateescape")

    def value(self, what: str) -> Any:
        """Read one key's value; None for an array."""
        at = self.at
        kind = self.u32(what)
        if kind == _STRING:
            return self.string(what, self.source.size)
        if kind == _ARRAY:
            self._skip_array(what)
            return None
        if kind not in _SCALARS:
            self.refuse(what, at, "a value type from 0 to 12", kind)
        return _SCALARS[kind].unpack(self.take(_SCALARS[kind].size, what))[0]

    def _skip_array(self, what: str) -> None:
        at = self.at
        kind, n = self.u32(what), self.u64(what)
        if kind in _SCALARS:
            self.skip(n * _SCALARS[kind].size, what)
        elif kind == _STRING:
            self._skip_strings(n, what)
        else:
            self.refuse(what, at, "an array of numbers or strings", f"type {kind}")

    def _skip_strings(self, n: int, what: str) -> None:
        if n * 8 > self.source.size - self.at:
            self.take(n * 8, what)
        for _ in range(n):
            self.skip(self.u64(what), what)

    def refuse(self, field: str, offset: int, expected: object, found: object) -> NoReturn:
        raise CheckpointError(source=self.source.name, field=field, offset=offset, expected=expected, found=found)


def read_header(source: Source) -> GGUFHeader:
    """Read keys and tensor infos of the GGUF file that `source` holds.

    Raises
    ------
    NotACheckpointError
        It is no GGUF file.
    CheckpointError
        It is not a sound one, or of version 1, or big-endian.
    """
    cursor = _Cursor(source)
    start = bytes(read_at(source, 0, 4))
    if start != _MAGIC:
        raise NotACheckpointError(
            source=source.name, field="magic", offset=0, expected=f"{_MAGIC!r}, a GGUF file", found=f"{start!r}"
        )
    cursor.skip(4, "magic")
    version = cursor.u32("version")
    if version not in _VERSIONS:
        cursor.refuse("version", 4, "2 or 3", version)
    n_tensors, n_kv = cursor.u64("tensor count"), cursor.u64("key count")
    needed = n_tensors * _SMALLEST_TENSOR + n_kv * _SMALLEST_KEY
    if needed > source.size - cursor.at:
        cursor.take(needed, "header")
    keys_start = cursor.at
    keys: dict[str, Any] = {}
    for _ in range(n_kv):
        key = cursor.string("key", _LONGEST_NAME)
        value = cursor.value(f"key {key}")
        if value is not None:
            keys[key] = value
    keys_stop = cursor.at
    alignment = keys.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        cursor.refuse("general.alignment", keys_start, "a power of two", alignment)
    infos = [_tensor_info(cursor, index) for index in range(n_tensors)]
    data_offset = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for index, (tensor, at) in enumerate(infos):
        placed = tensor._replace(offset=data_offset + tensor.offset)
        if placed.offset + placed.nbytes > source.size:
            raise TruncatedError(
                source=source.name, tensor=tensor.name, index=index, field="data", offset=placed.offset,
                expected=f"{placed.nbytes} bytes", found=max(0, source.size - placed.offset),
            )  # fmt: skip
        if tensor.offset % alignment or tensor.name in tensors:
            problem = "a second tensor of this name" if tensor.name in tensors else "the offset is not aligned"
            raise CheckpointError(problem, source=source.name, tensor=tensor.name, index=index, offset=at)
        tensors[tensor.name] = placed
    return GGUFHeader(version, n_kv, keys, keys_start, keys_stop, alignment, data_offset, tensors)


def _tensor_info(cursor: _Cursor, index: int) -> tuple[GGUFTensor, int]:
    """Read one tensor info, with its offset as it stands there; and where it stands."""
    start = cursor.at
    what = f"tensor info {index}"
    name = cursor.string(what, _LONGEST_NAME)
    at = cursor.at
    n_dims = cursor.u32(what)
    if not 1 <= n_dims <= _MOST_DIMS:
        cursor.refuse(f"{what}: n_dims", at, f"1 to {_MOST_DIMS}", n_dims)
    dims = tuple(cursor.u64(what) for _ in range(n_dims))
    at = cursor.at
    number = cursor.u32(what)
    try:
        kind = gguf.GGMLQuantizationType(number)
    except ValueError:
        cursor.refuse(f"{what}: type", at, "a type that gguf knows", number)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if dims[0] % block:
        cursor.refuse(f"{what}: dims", at, f"a multiple of {block} first, for {kind.name}", dims)
    nbytes = math.prod(dims) // block * block_bytes
    return GGUFTensor(name, dims, kind, cursor.u64(what), nbytes), start

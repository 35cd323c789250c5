"""Reading the header of any GGUF file: its keys, and where its tensors are.

For checkpoints and for base models, which can have tens of gigabytes and come from anywhere.  The file is read
forward, a window at a time, up to the last tensor info; tensor data is not touched.  Arrays, a vocabulary for
instance, are stepped over and not decoded, but it is known where they stand.  After the fixed header come

================  ===================================================================================
a key             u64 length, name; u32 type of the value; the value
a string          u64 length, bytes without a terminator
an array          u32 type of the elements, u64 count, the elements without gaps
a tensor info     u64 length, name; u32 n_dims; n_dims times u64 dims (innermost first); u32 type;
                  u64 offset of the data, from the start of the data section
================  ===================================================================================

Time and memory are proportional to what the header really has: see `cursor`.  Facts are from GGUF's specification in
the ggml repository; type numbers, block sizes and the default alignment are gguf's.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, NotACheckpointError, TruncatedError, printable
from ..storage.sources import Source, read_at
from . import signatures
from .cursor import U32, U64, Cursor
from .gguf_tensors import GGUFTensor, place, read_infos
from .layout import GGUF_HEADER, GGUF_MAGIC, GGUF_VERSIONS

__all__ = ["Field", "GGUFHeader", "Value", "first_keys", "read_header"]

Value = int | float | bool | str
"""What a key that is no array holds."""


class Field(NamedTuple):
    """A key: what it is, and where."""

    type: gguf.GGUFValueType
    """Type of its value."""
    start: int
    """Byte offset of the key."""
    value: int
    """Byte offset of its value, behind the value's type."""
    stop: int
    """Byte offset of what follows: a caller copies the whole key by copying from `start` to here."""
    element: gguf.GGUFValueType | None = None
    """Type of the elements of an array."""
    length: int = 0
    """Number of elements of an array, or of bytes of a string."""


class GGUFHeader(NamedTuple):
    """Everything in a GGUF file but array elements and tensor data."""

    version: int
    """2 or 3."""
    keys: dict[str, Value]
    """Scalars and strings by key, in the order of the file.  What is no UTF-8 stands as U+FFFD; strings of more than
    64 KiB are stepped over, as arrays are."""
    fields: dict[str, Field]
    """Every key, arrays too, in the order of the file."""
    keys_span: tuple[int, int]
    """Byte offsets of the first key and of what follows the last: all keys and values, to be copied as they are."""
    alignment: int
    """What offsets of tensor data are multiples of, in bytes: a power of two."""
    data_offset: int
    """Byte offset of the data section; past the end of a file without tensors, possibly."""
    names: tuple[str, ...]
    """Names of the tensors, all different, in the order of the file."""
    table: npt.NDArray[np.void]
    """(n,) `layout.GGUF_TENSOR`, a row a name."""

    def tensors(self) -> Iterator[GGUFTensor]:
        """Yield all tensors, in the order of the file, of which few exist as objects at a time."""
        fields = ("n_dims", "ne", "type", "offset", "nbytes")
        for first in range(0, len(self.names), _ROWS):
            some = slice(first, first + _ROWS)
            for name, n_dims, ne, type, offset, nbytes in zip(
                self.names[some], *(self.table[field][some].tolist() for field in fields)
            ):
                yield GGUFTensor(name, tuple(ne[:n_dims]), gguf.GGMLQuantizationType(type), offset, nbytes)

    def tensor(self, row: int) -> GGUFTensor:
        """Return the tensor of a row of `table`."""
        _, _, n_dims, ne, type, offset, nbytes = self.table[row].item()
        dims = tuple(int(dim) for dim in ne[:n_dims])
        return GGUFTensor(self.names[row], dims, gguf.GGMLQuantizationType(type), offset, nbytes)


_T = gguf.GGUFValueType
_SCALARS: Final = {
    _T.UINT8: struct.Struct("<B"), _T.INT8: struct.Struct("<b"), _T.UINT16: struct.Struct("<H"),
    _T.INT16: struct.Struct("<h"), _T.UINT32: struct.Struct("<I"), _T.INT32: struct.Struct("<i"),
    _T.FLOAT32: struct.Struct("<f"), _T.BOOL: struct.Struct("<?"), _T.UINT64: struct.Struct("<Q"),
    _T.INT64: struct.Struct("<q"), _T.FLOAT64: struct.Struct("<d"),
}  # fmt: skip
_VALUE_TYPES: Final = {int(t): t for t in (*_SCALARS, _T.STRING, _T.ARRAY)}

_VERSION_HINTS: Final = {
    (1).to_bytes(4, "little"): "of August 2023: llama.cpp of that autumn rewrites it, with its quantize IN OUT COPY",
    **dict.fromkeys(
        (version.to_bytes(4, "big") for version in GGUF_VERSIONS),
        "from a big-endian machine: gguf's command turns it, gguf-convert-endian FILE little",
    ),
}
_ROWS: Final = 4096  # of the table, made into objects together
_MOST_KEYS: Final = 1 << 14  # real files have some dozens; a key takes more memory here than in the file
_LONGEST_KEPT: Final = 1 << 16  # bytes of a value that is text: a sparse file claims gigabytes
_SMALLEST_KEY: Final = 8 + 4 + 1
_SMALLEST_INFO: Final = 8 + 4 + 8 + 4 + 8
_ALIGNMENT_KEY: Final = gguf.Keys.General.ALIGNMENT


def read_header(source: Source) -> GGUFHeader:
    """Read the header of the GGUF file that `source` holds, version 2 or 3, little-endian.

    Raises
    ------
    NotACheckpointError
        It does not begin as a GGUF file does.
    TruncatedError
        It ends before what it announces, tensor data included.
    CheckpointError
        Something in it cannot be: unknown types, names that are there twice, dims that are not whole blocks, tensors
        that overlap or are not aligned.
    OSError
        It cannot be read.
    """
    cursor = Cursor(source)
    version, n_tensors, n_kv = _fixed_header(cursor)
    start = cursor.position
    keys, fields = _read_keys(cursor, n_kv)
    keys_span = start, cursor.position
    alignment = _alignment(source, keys, fields)
    names, infos = read_infos(cursor, n_tensors)
    data_offset = -(-cursor.position // alignment) * alignment
    place(source, names, infos, alignment, data_offset)
    return GGUFHeader(version, keys, fields, keys_span, alignment, data_offset, names, infos)


def first_keys(source: Source) -> dict[str, Value]:
    """Return scalars and strings before the first array, fewer where something is wrong: what tells files apart.

    What converters write stands before the vocabulary, which is long.
    """
    cursor = Cursor(source)
    keys: dict[str, Value] = {}
    with contextlib.suppress(CheckpointError):
        _, _, n_kv = _fixed_header(cursor)
        for i in range(n_kv):
            found, fields = _read_keys(cursor, 1, i)
            if next(iter(fields.values())).type == _T.ARRAY:
                break
            keys |= found
    return keys


def _fixed_header(cursor: Cursor) -> tuple[int, int, int]:
    """Read version, number of tensors and number of keys."""
    source = cursor.source
    data = bytes(read_at(source, 0, GGUF_HEADER.itemsize))
    if data[:4] != GGUF_MAGIC:
        found, hint = signatures.found(bytes(read_at(source, 0, signatures.LONGEST_SIGNATURE)))
        problem = f"this is not a GGUF file: it is {found}"
        raise NotACheckpointError(problem, source=source.name, found=found, hint=hint)
    if len(data) < GGUF_HEADER.itemsize:
        raise TruncatedError(
            source=source.name, field="header", offset=0, expected=f"{GGUF_HEADER.itemsize} bytes", found=len(data)
        )
    _, version, n_tensors, n_kv = np.frombuffer(data, GGUF_HEADER)[0].item()
    if version not in GGUF_VERSIONS:
        raise CheckpointError(
            source=source.name, field="version", offset=4, expected=" or ".join(map(str, GGUF_VERSIONS)), found=version,
            hint=_VERSION_HINTS.get(data[4:8]),
        )  # fmt: skip
    needed = GGUF_HEADER.itemsize + n_kv * _SMALLEST_KEY + n_tensors * _SMALLEST_INFO
    if needed > source.size:
        raise TruncatedError(
            f"the header announces more than the file holds, with {n_kv} keys and {n_tensors} tensors",
            source=source.name, field="header", offset=0, expected=f"at least {needed} bytes", found=source.size,
        )  # fmt: skip
    if n_kv > _MOST_KEYS:
        raise CheckpointError(source=source.name, field="n_kv", offset=16, expected=f"at most {_MOST_KEYS}", found=n_kv)
    cursor.position = GGUF_HEADER.itemsize
    return version, n_tensors, n_kv


def _read_keys(cursor: Cursor, n_kv: int, first: int = 0) -> tuple[dict[str, Value], dict[str, Field]]:
    """Read `n_kv` keys with their values, stepping over arrays."""
    keys: dict[str, Value] = {}
    fields: dict[str, Field] = {}
    for i in range(first, first + n_kv):
        start = cursor.position
        key = cursor.name(f"key {i}")
        shown = printable(key)
        if key in fields:
            raise CheckpointError(f"key {i} '{shown}' is there twice", source=cursor.source.name, offset=start)
        value_type = _value_type(cursor, shown, f"a type of 0 to {max(_VALUE_TYPES)}")
        value = cursor.position
        element, length = None, 0
        if value_type == _T.ARRAY:
            element, length = _skip_array(cursor, shown)
        elif value_type == _T.STRING:
            length = cursor.length(shown)
            if length <= _LONGEST_KEPT:
                keys[key] = str(cursor.bytes(length, shown), "utf-8", "replace")
            else:
                cursor.skip(length, 1, shown)
        else:
            keys[key] = cursor.unpack(_SCALARS[value_type], shown)[0]
        fields[key] = Field(value_type, start, value, cursor.position, element, length)
    return keys, fields


def _value_type(cursor: Cursor, field: str, expected: str) -> gguf.GGUFValueType:
    at = cursor.position
    (number,) = cursor.unpack(U32, field)
    if number not in _VALUE_TYPES:
        raise CheckpointError(source=cursor.source.name, field=field, offset=at, expected=expected, found=number)
    return _VALUE_TYPES[number]


def _skip_array(cursor: Cursor, field: str) -> tuple[gguf.GGUFValueType, int]:
    """Step over an array; return the type and the number of its elements."""
    at = cursor.position
    expected = "an element type that is no array"  # llama.cpp refuses arrays of arrays too
    element = _value_type(cursor, field, expected)
    if element == _T.ARRAY:
        raise CheckpointError(source=cursor.source.name, field=field, offset=at, expected=expected, found="an array")
    (length,) = cursor.unpack(U64, field)
    if element == _T.STRING:
        cursor.skip_strings(length, field)
    else:
        cursor.skip(length, _SCALARS[element].size, field)
    return element, length


def _alignment(source: Source, keys: dict[str, Value], fields: dict[str, Field]) -> int:
    """Return the alignment of tensor data."""
    if _ALIGNMENT_KEY not in fields:
        return gguf.GGUF_DEFAULT_ALIGNMENT
    field, alignment = fields[_ALIGNMENT_KEY], keys.get(_ALIGNMENT_KEY)
    if field.type != _T.UINT32 or not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise CheckpointError(
            source=source.name, field=_ALIGNMENT_KEY, offset=field.value, expected="a power of two (uint32)",
            found=alignment if field.type == _T.UINT32 else field.type.name.lower(),
        )  # fmt: skip
    return alignment

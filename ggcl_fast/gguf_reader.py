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

Every count is compared with the bytes that are left before anything depends on it, so that time and memory are
proportional to what the header really has.  Facts are from GGUF's specification in the ggml repository; type numbers,
block sizes and the default alignment are gguf's.
"""

from __future__ import annotations

import math
import struct
from array import array
from typing import Final, NamedTuple, NoReturn

import gguf
import numpy as np
import numpy.typing as npt

from .errors import CheckpointError, NotACheckpointError, TruncatedError, printable
from .layout import GGUF_HEADER, GGUF_MAGIC, GGUF_TENSOR, GGUF_VERSIONS
from .sources import Source, read_at

__all__ = ["Field", "GGUFHeader", "GGUFTensor", "Value", "read_header"]

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
    """Number of elements of an array."""


class GGUFTensor(NamedTuple):
    """A tensor of a file."""

    name: str
    dims: tuple[int, ...]
    """As many as the file gives, innermost first."""
    type: gguf.GGMLQuantizationType
    offset: int
    """Byte offset of its data in the file."""
    nbytes: int
    """Bytes of its data."""


class GGUFHeader(NamedTuple):
    """Everything in a GGUF file but array elements and tensor data."""

    version: int
    """2 or 3."""
    keys: dict[str, Value]
    """Scalars and strings by key, in the order of the file.  What is no UTF-8 stands as U+FFFD."""
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

    def tensors(self) -> dict[str, GGUFTensor]:
        """Return all tensors by name, in the order of the file."""
        rows = zip(self.names, *(self.table[field].tolist() for field in ("n_dims", "ne", "type", "offset", "nbytes")))
        return {
            name: GGUFTensor(name, tuple(ne[:n_dims]), gguf.GGMLQuantizationType(kind), offset, nbytes)
            for name, n_dims, ne, kind, offset, nbytes in rows
        }


_T = gguf.GGUFValueType
_SCALARS: Final = {
    _T.UINT8: struct.Struct("<B"), _T.INT8: struct.Struct("<b"), _T.UINT16: struct.Struct("<H"),
    _T.INT16: struct.Struct("<h"), _T.UINT32: struct.Struct("<I"), _T.INT32: struct.Struct("<i"),
    _T.FLOAT32: struct.Struct("<f"), _T.BOOL: struct.Struct("<?"), _T.UINT64: struct.Struct("<Q"),
    _T.INT64: struct.Struct("<q"), _T.FLOAT64: struct.Struct("<d"),
}  # fmt: skip
_VALUE_TYPES: Final = {int(t): t for t in (*_SCALARS, _T.STRING, _T.ARRAY)}
_BLOCKS: Final = {int(t): sizes for t, sizes in gguf.GGML_QUANT_SIZES.items()}  # elements and bytes of a block
_U32: Final = _SCALARS[_T.UINT32]
_U64: Final = _SCALARS[_T.UINT64]
_DIMS: Final = {n: struct.Struct(f"<{n}Q") for n in (1, 2, 3, 4)}
_TYPE_AND_OFFSET: Final = struct.Struct("<IQ")

_WINDOW: Final = 1 << 20  # bytes read at a time
_MOST_KEYS: Final = 1 << 14  # real files have some dozens; a key takes more memory here than in the file
_LONGEST_NAME: Final = (1 << 16) - 1  # of a key, by the specification; nobody needs more for a tensor either
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
    cursor = _Cursor(source)
    version, n_tensors, n_kv = _fixed_header(cursor)
    start = cursor.position
    keys, fields = _read_keys(cursor, n_kv)
    keys_span = start, cursor.position
    alignment = _alignment(source, keys, fields)
    names, infos = _read_infos(cursor, n_tensors)
    data_offset = -(-cursor.position // alignment) * alignment
    _place(source, names, infos, alignment, data_offset)
    return GGUFHeader(version, keys, fields, keys_span, alignment, data_offset, names, infos)


class _Cursor:
    """A place in a source, moving forward; what it stands on is in a window."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.position = 0
        self._start = 0
        self._window = memoryview(b"") if source.memory is None else source.memory

    def _load(self, nbytes: int) -> int:
        """Have `nbytes` bytes from `position` on, which the source must have, in the window; return their index."""
        at = self.position - self._start
        if at < 0 or at + nbytes > len(self._window):
            self._start, self._window = self.position, read_at(self.source, self.position, max(nbytes, _WINDOW))
            at = 0
        return at

    def _need(self, nbytes: int, field: str) -> None:
        left = self.source.size - self.position
        if nbytes > left:
            raise TruncatedError(
                source=self.source.name, field=field, offset=self.position, expected=f"{nbytes} bytes", found=left
            )

    def unpack(self, code: struct.Struct, field: str) -> tuple[int, ...]:
        """Read one fixed piece."""
        self._need(code.size, field)
        at = self._load(code.size)
        self.position += code.size
        return code.unpack_from(self._window, at)

    def text(self, field: str, longest: int | None = None) -> memoryview:
        """Read a string of at most `longest` bytes; the view is good until the next read."""
        (nbytes,) = self.unpack(_U64, field)
        if longest is not None and nbytes > longest:
            raise CheckpointError(
                source=self.source.name, field=field, offset=self.position - _U64.size,
                expected=f"at most {longest} bytes", found=nbytes,
            )  # fmt: skip
        self._need(nbytes, field)
        at = self._load(nbytes)
        self.position += nbytes
        return self._window[at : at + nbytes]

    def name(self, field: str) -> str:
        """Read a string that names something."""
        name = bytes(self.text(field, _LONGEST_NAME))
        try:
            return name.decode()
        except UnicodeDecodeError:
            raise CheckpointError(
                source=self.source.name, field=field, offset=self.position - len(name), expected="UTF-8",
                found=f"'{printable(name)}'",
            ) from None  # fmt: skip

    def skip(self, count: int, nbytes: int, field: str) -> None:
        """Step over `count` elements of `nbytes` bytes each."""
        self._need(count * nbytes, field)
        self.position += count * nbytes

    def skip_strings(self, count: int, field: str) -> None:
        """Step over `count` strings, 0.1 us each."""
        self._need(8 * count, field)
        unpack = _U64.unpack_from
        while count:
            self._need(8, field)
            at = before = self._load(8)
            window, last = self._window, len(self._window) - 8
            # A length that lies leads past the window, so that one comparison a string is enough.
            while count and at <= last:
                before = at
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.position = self._start + before + 8
            self._need(at - before - 8, field)
            self.position = self._start + at


def _fixed_header(cursor: _Cursor) -> tuple[int, int, int]:
    """Read version, number of tensors and number of keys."""
    source = cursor.source
    data = bytes(read_at(source, 0, GGUF_HEADER.itemsize))
    if data[:4] != GGUF_MAGIC:
        raise NotACheckpointError(
            source=source.name, field="magic", offset=0, expected=f"{GGUF_MAGIC!r}", found=f"{data[:4]!r}"
        )
    if len(data) < GGUF_HEADER.itemsize:
        raise TruncatedError(
            source=source.name, field="header", offset=0, expected=f"{GGUF_HEADER.itemsize} bytes", found=len(data)
        )
    _, version, n_tensors, n_kv = np.frombuffer(data, GGUF_HEADER)[0].item()
    if version not in GGUF_VERSIONS:
        swapped = int.from_bytes(data[4:8], "big") in GGUF_VERSIONS
        raise CheckpointError(
            source=source.name, field="version", offset=4, expected=" or ".join(map(str, GGUF_VERSIONS)), found=version,
            hint="from a big-endian machine; only little-endian files can be read" if swapped else None,
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


def _read_keys(cursor: _Cursor, n_kv: int) -> tuple[dict[str, Value], dict[str, Field]]:
    """Read `n_kv` keys with their values, stepping over arrays."""
    keys: dict[str, Value] = {}
    fields: dict[str, Field] = {}
    for i in range(n_kv):
        start = cursor.position
        key = cursor.name(f"key {i}")
        shown = printable(key)
        if key in fields:
            raise CheckpointError(f"key {i} '{shown}' is there twice", source=cursor.source.name, offset=start)
        kind = _value_type(cursor, shown, f"a type of 0 to {max(_VALUE_TYPES)}")
        value = cursor.position
        element, length = None, 0
        if kind == _T.ARRAY:
            element, length = _skip_array(cursor, shown)
        elif kind == _T.STRING:
            keys[key] = str(cursor.text(shown), "utf-8", "replace")
        else:
            keys[key] = cursor.unpack(_SCALARS[kind], shown)[0]
        fields[key] = Field(kind, start, value, cursor.position, element, length)
    return keys, fields


def _value_type(cursor: _Cursor, field: str, expected: str) -> gguf.GGUFValueType:
    at = cursor.position
    (number,) = cursor.unpack(_U32, field)
    if number not in _VALUE_TYPES:
        raise CheckpointError(source=cursor.source.name, field=field, offset=at, expected=expected, found=number)
    return _VALUE_TYPES[number]


def _skip_array(cursor: _Cursor, field: str) -> tuple[gguf.GGUFValueType, int]:
    """Step over an array; return the type and the number of its elements."""
    at = cursor.position
    expected = "an element type that is no array"  # llama.cpp refuses arrays of arrays too
    element = _value_type(cursor, field, expected)
    if element == _T.ARRAY:
        raise CheckpointError(source=cursor.source.name, field=field, offset=at, expected=expected, found="an array")
    (length,) = cursor.unpack(_U64, field)
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


def _read_infos(cursor: _Cursor, n_tensors: int) -> tuple[tuple[str, ...], npt.NDArray[np.void]]:
    """Read the tensor infos; ``offset`` of the rows is still the one in the data section."""
    names: list[str] = []
    rows = array("q")
    for i in range(n_tensors):
        info = cursor.position
        name = cursor.name(f"name of tensor {i}")
        n_dims = _n_dims(cursor, name, i)
        at = cursor.position
        field = "tensor info"
        dims = cursor.unpack(_DIMS[n_dims], field)
        kind, offset = cursor.unpack(_TYPE_AND_OFFSET, field)
        nbytes = _nbytes(cursor.source, name, i, at, dims, kind)
        if offset + nbytes > cursor.source.size:
            raise TruncatedError(
                source=cursor.source.name, tensor=name, index=i, field="data offset", offset=cursor.position - 8,
                expected=f"room for {nbytes} bytes in a file of {cursor.source.size}", found=offset,
            )  # fmt: skip
        names.append(name)
        rows.extend((info, at, n_dims, *dims, *(1,) * (4 - n_dims), kind, offset, nbytes))
    _no_twins(cursor.source, names)
    return tuple(names), np.frombuffer(rows, np.int64).view(GGUF_TENSOR) if names else np.zeros(0, GGUF_TENSOR)


def _n_dims(cursor: _Cursor, name: str, index: int) -> int:
    at = cursor.position
    (n_dims,) = cursor.unpack(_U32, "tensor info")
    if n_dims not in _DIMS:
        raise CheckpointError(
            source=cursor.source.name, tensor=name, index=index, field="n_dims", offset=at, expected="1 to 4",
            found=n_dims,
        )  # fmt: skip
    return n_dims


def _nbytes(source: Source, name: str, index: int, at: int, dims: tuple[int, ...], kind: int) -> int:
    """Return the bytes of a tensor's data, in Python integers: dims can be anything here."""

    def fault(field: str, offset: int, expected: str, found: object) -> NoReturn:
        raise CheckpointError(
            source=source.name, tensor=name, index=index, field=field, offset=offset, expected=expected, found=found
        )

    if kind not in _BLOCKS:
        fault("type", at + 8 * len(dims), "a type that the installed gguf knows", kind)
    if 0 in dims:
        fault("dims", at, "at least 1 each", dims)
    n_elements, block = _BLOCKS[kind]
    if dims[0] % n_elements:
        fault("dims", at, f"rows of whole blocks of {n_elements}", dims)
    return math.prod(dims) // n_elements * block


def _no_twins(source: Source, names: list[str]) -> None:
    """Hold that no two tensors have one name."""
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    for i, name in enumerate(names):
        if name in seen:
            raise CheckpointError("the name is there twice", source=source.name, tensor=name, index=i)
        seen.add(name)


def _place(
    source: Source, names: tuple[str, ...], table: npt.NDArray[np.void], alignment: int, data_offset: int
) -> None:
    """Make offsets in `table` those in the file; hold that none is out of line, beyond the end or in another tensor."""

    def fault(row: int, kind: type[CheckpointError], expected: str, found: object) -> NoReturn:
        raise kind(
            source=source.name, tensor=names[row], index=row, field="data", offset=int(table["offset"][row]),
            expected=expected, found=found,
        )  # fmt: skip

    crooked = np.flatnonzero(table["offset"] % alignment)
    if len(crooked):
        first = int(crooked[0])
        multiple = f"an offset in the data section that is a multiple of {alignment}"
        table["offset"][first] += data_offset
        fault(first, CheckpointError, multiple, int(table["offset"][first]) - data_offset)
    table["offset"] += data_offset
    outside = np.flatnonzero(table["offset"] + table["nbytes"] > source.size)
    if len(outside):
        first = int(outside[0])
        left = max(0, source.size - int(table["offset"][first]))
        fault(first, TruncatedError, f"{int(table['nbytes'][first])} bytes", left)
    order = np.argsort(table["offset"], kind="stable")
    starts, stops = table["offset"][order], (table["offset"] + table["nbytes"])[order]
    overlapping = np.flatnonzero(starts[1:] < stops[:-1])
    if len(overlapping):
        below, above = (int(row) for row in order[overlapping[0] : overlapping[0] + 2])
        free = f"data from {int(stops[overlapping[0]])} on, behind tensor {below} '{printable(names[below])}'"
        fault(above, CheckpointError, free, int(table["offset"][above]))

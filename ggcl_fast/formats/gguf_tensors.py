"""The tensor infos of a GGUF file: which tensors it has, and where their data is.

Nothing they say is taken before it is held against the file's size, against the types that gguf knows, and against
each other.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple, NoReturn

import gguf
import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError, TruncatedError, printable
from ..storage.sources import Source
from .cursor import U32, Cursor
from .layout import GGUF_TENSOR

__all__ = ["GGUFTensor", "no_twins", "place", "read_infos"]

_BLOCKS: Final = {int(t): sizes for t, sizes in gguf.GGML_QUANT_SIZES.items()}  # elements and bytes of a block
_DIMS: Final = {n: struct.Struct(f"<{n}Q") for n in (1, 2, 3, 4)}
_TYPE_AND_OFFSET: Final = struct.Struct("<IQ")


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


def read_infos(cursor: Cursor, n_tensors: int) -> tuple[tuple[str, ...], npt.NDArray[np.void]]:
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
        type, offset = cursor.unpack(_TYPE_AND_OFFSET, field)
        nbytes = _nbytes(cursor.source, name, i, at, dims, type)
        if offset + nbytes > cursor.source.size:
            raise TruncatedError(
                source=cursor.source.name, tensor=name, index=i, field="data offset", offset=cursor.position - 8,
                expected=f"room for {nbytes} bytes in a file of {cursor.source.size}", found=offset,
            )  # fmt: skip
        names.append(name)
        rows.extend((info, at, n_dims, *dims, *(1,) * (4 - n_dims), type, offset, nbytes))
    no_twins(cursor.source, names)
    return tuple(names), np.frombuffer(rows, np.int64).view(GGUF_TENSOR) if names else np.zeros(0, GGUF_TENSOR)


def _n_dims(cursor: Cursor, name: str, index: int) -> int:
    at = cursor.position
    (n_dims,) = cursor.unpack(U32, "tensor info")
    if n_dims not in _DIMS:
        raise CheckpointError(
            source=cursor.source.name, tensor=name, index=index, field="n_dims", offset=at, expected="1 to 4",
            found=n_dims,
        )  # fmt: skip
    return n_dims


def _nbytes(source: Source, name: str, index: int, at: int, dims: tuple[int, ...], type: int) -> int:
    """Return the bytes of a tensor's data, in Python integers: dims can be anything here."""

    def fault(field: str, offset: int, expected: str, found: object) -> NoReturn:
        raise CheckpointError(
            source=source.name, tensor=name, index=index, field=field, offset=offset, expected=expected, found=found
        )

    if type not in _BLOCKS:
        fault("type", at + 8 * len(dims), "a type that the installed gguf knows", type)
    if 0 in dims:
        fault("dims", at, "at least 1 each", dims)
    n_elements, block = _BLOCKS[type]
    if dims[0] % n_elements:
        fault("dims", at, f"rows of whole blocks of {n_elements}", dims)
    return math.prod(dims) // n_elements * block


def no_twins(source: Source, names: Sequence[str]) -> None:
    """Raise `CheckpointError` where two tensors have one name."""
    if len(set(names)) == len(names):
        return
    seen: set[str] = set()
    for i, name in enumerate(names):
        if name in seen:
            raise CheckpointError("the name is there twice", source=source.name, tensor=name, index=i)
        seen.add(name)


def place(
    source: Source, names: tuple[str, ...], table: npt.NDArray[np.void], alignment: int, data_offset: int
) -> None:
    """Make offsets in `table` those in the file; hold that none is out of line, beyond the end or in another tensor."""

    def fault(row: int, error: type[CheckpointError], expected: str, found: object) -> NoReturn:
        raise error(
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

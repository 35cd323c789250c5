"""GGUF files, written: what stands before the tensor data, all of it at once.

Keys are packed by gguf's own writer, `gguf.GGUFWriter`; tensor infos, which cost it time for each tensor, are packed
together.  Data is appended by whoever has it, zero-copy slices of a source or what was computed.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, cast

import gguf
import numpy as np
import numpy.typing as npt

from ..storage.outputs import Writer
from .layout import ALIGNMENT, GGUF_HEADER, GGUF_MAGIC, GGUF_TENSOR_INFO

__all__ = [
    "KeyTemplate", "KeyValue", "TensorInfo", "as_bytes", "beginning", "head", "new_writer", "packed", "packed_keys",
    "padding", "tensor_infos", "write_padding",
]  # fmt: skip

_ZEROS: Final = bytes(1 << 20)
_V = gguf.GGUFValueType
_NUMBERS: Final = {
    _V.UINT32: np.dtype("<u4"), _V.INT32: np.dtype("<i4"), _V.FLOAT32: np.dtype("<f4"), _V.BOOL: np.dtype("?"),
    _V.UINT64: np.dtype("<u8"),
}  # fmt: skip
_NE1: Final = slice(12, 20)  # what a one-dimensional tensor's info lacks of GGUF_TENSOR_INFO


class KeyTemplate:
    """Keys with values of fixed length, packed once by gguf's writer and filled in anew for each file.

    Parameters
    ----------
    writer
        It has the keys, and no file.
    variable
        Names of those that are filled in, all of them numbers or bools.
    """

    def __init__(self, writer: gguf.GGUFWriter, variable: Sequence[str]) -> None:
        self._n_keys, self._packed = packed_keys(writer)
        offsets, formats = {}, {}
        at = 0
        for name, value in writer.kv_data[0].items():
            at += 8 + len(name.encode()) + 4
            if value.type == gguf.GGUFValueType.STRING:
                at += 8 + len(value.value.encode())
            else:
                offsets[name], formats[name] = at, _NUMBERS[value.type]
                at += formats[name].itemsize
        fields = {"names": list(variable), "formats": [formats[name] for name in variable]}
        self._layout = np.dtype({**fields, "offsets": [offsets[name] for name in variable], "itemsize": at})  # type: ignore[call-overload]

    def fill(self, values: Sequence[Any]) -> tuple[int, bytes]:
        """Return the number of keys, and their bytes with `values` in place of the variable ones, in their order."""
        packed = bytearray(self._packed)
        np.frombuffer(packed, self._layout)[0] = tuple(values)
        return self._n_keys, bytes(packed)


def tensor_infos(names: Sequence[str], table: npt.NDArray[np.void]) -> bytes:
    """Return the tensor infos of float32 tensors, as they stand in a file.

    Parameters
    ----------
    names
        GGUF names, in the order of the file.
    table
        Rows of `layout.TENSOR`, one a name, with one or two dims each and ``gguf_offset`` ascending without gaps.
    """
    infos = np.zeros(len(names), GGUF_TENSOR_INFO)
    infos["n_dims"] = table["n_dims"]
    infos["ne"][:, 0] = table["ne0"]
    infos["ne"][:, 1] = table["ne1"]
    infos["dtype"] = gguf.GGMLQuantizationType.F32
    infos["offset"] = table["gguf_offset"]
    pieces = infos.view(f"V{GGUF_TENSOR_INFO.itemsize}").tolist()
    for i in np.flatnonzero(table["n_dims"] == 1).tolist():
        pieces[i] = pieces[i][: _NE1.start] + pieces[i][_NE1.stop :]
    encoded = list(map(str.encode, names))
    lengths = np.array(list(map(len, encoded)), "<u8").view("V8").tolist()
    return b"".join(itertools.chain.from_iterable(zip(lengths, encoded, pieces)))


class TensorInfo(NamedTuple):
    """A tensor that is to be written."""

    name: str
    dims: tuple[int, ...]
    """Innermost first, GGML's ``ne``."""
    type: gguf.GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return math.prod(self.dims) // block * block_bytes


def packed_keys(writer: gguf.GGUFWriter) -> tuple[int, bytes]:
    """Return the number of keys added to `writer`, which has no file, and their bytes as they stand in a file."""
    file = io.BytesIO()
    writer.fout, writer.state = [cast(io.BufferedWriter, file)], gguf.WriterState.EMPTY
    writer.write_header_to_file()
    start = file.tell()
    writer.write_kv_data_to_file()
    return len(writer.kv_data[0]), file.getvalue()[start:]


class _Quiet(logging.Filter):
    """Lets nothing through while a writer of ours is made: gguf logs the byte order of each."""

    making = threading.local()

    def filter(self, record: logging.LogRecord) -> bool:  # noqa: ARG002
        return not getattr(self.making, "now", False)


logging.getLogger("gguf.gguf_writer").addFilter(_Quiet())


def new_writer(arch: str) -> gguf.GGUFWriter:
    """Return gguf's writer without a file, to pack keys with; it says nothing of itself."""
    _Quiet.making.now = True
    try:
        return gguf.GGUFWriter(None, arch)
    finally:
        _Quiet.making.now = False


class KeyValue(NamedTuple):
    """A key that is to be written: a scalar or a string."""

    name: str
    value: Any
    type: gguf.GGUFValueType


def packed(entries: Iterable[KeyValue]) -> bytes:
    """Return the bytes of some keys as they stand in a file."""
    writer = new_writer("")
    _, architecture = packed_keys(writer)  # which gguf's writer always begins with
    for entry in entries:
        writer.add_key_value(entry.name, entry.value, entry.type)
    return packed_keys(writer)[1][len(architecture) :]


def as_bytes(values: npt.NDArray[Any]) -> memoryview:
    """Return the bytes of a contiguous array, not copied."""
    return values.reshape(-1).view(np.uint8).data


def padding(nbytes: int) -> bytes:
    """Return the zeros that follow `nbytes` bytes of data in a file of the usual alignment."""
    return bytes(-nbytes % ALIGNMENT)


def write_padding(output: Writer, nbytes: int, alignment: int) -> None:
    """Append the zeros that follow `nbytes` bytes of data: any number of them, for alignments come from files."""
    left = -nbytes % alignment
    while left:
        piece = min(left, len(_ZEROS))
        output.writev([_ZEROS[:piece]])
        left -= piece


def beginning(infos: bytes, n_tensors: int, keys: tuple[int, bytes], version: int = gguf.GGUF_VERSION) -> bytes:
    """Return what stands before the padding before the tensor data."""
    return np.array((GGUF_MAGIC, version, n_tensors, keys[0]), GGUF_HEADER).tobytes() + keys[1] + infos


def head(
    infos: Iterable[TensorInfo], n_tensors: int, keys: tuple[int, bytes], version: int, alignment: int
) -> tuple[bytes, int]:
    """Return what stands before the tensor data and the padding before that, and the bytes of the whole file.

    Parameters
    ----------
    infos
        The tensors in the order of the file, each of which is padded to `alignment`; gone through once.
    n_tensors
        How many they are.
    keys
        Their number, and their bytes as they stand in a file.
    version
        Of the file: 2 or 3, which differ in nothing else.
    alignment
        Of the tensor data.
    """
    packed = bytearray(beginning(b"", n_tensors, keys, version))
    offset = 0
    for info in infos:
        name = info.name.encode("utf-8", "surrogateescape")
        packed += len(name).to_bytes(8, "little")
        packed += name
        for number, nbytes in (len(info.dims), 4), *((dim, 8) for dim in info.dims), (info.type, 4), (offset, 8):
            packed += number.to_bytes(nbytes, "little")
        offset += _padded(info.nbytes, alignment)
    return bytes(packed), _padded(len(packed), alignment) + offset


def _padded(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment


assert ALIGNMENT == gguf.GGUF_DEFAULT_ALIGNMENT

"""gguf's writer, with tensor infos and tensor data written in bulk.

`gguf.GGUFWriter` keeps what it knows: keys, values, states, magic and version.  Its two steps that cost time for each
tensor are replaced by ones that take all tensors together; the bytes are the same.  `head` is for files whose tensors
are made one after the other, or whose keys are another file's.
"""

from __future__ import annotations

import functools
import io
import math
import os
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple, cast

import gguf
import numpy as np
import numpy.typing as npt

from ..storage.copying import Progress, copy_tensors
from ..storage.outputs import Writer
from ..storage.sources import Source
from .layout import ALIGNMENT, GGUF_HEADER, GGUF_MAGIC, GGUF_TENSOR_INFO

__all__ = ["BulkGGUFWriter", "TensorInfo", "as_bytes", "head", "packed_keys", "padding", "write_padding"]

_ZEROS: Final = bytes(1 << 20)
_MOST_CACHED: Final = 3000  # tensors whose infos are kept for the next file, 0.5 MB; a model of 128 layers has less
_NE1: Final = slice(12, 20)  # what a one-dimensional tensor's info lacks of GGUF_TENSOR_INFO


class BulkGGUFWriter(gguf.GGUFWriter):
    """A `gguf.GGUFWriter` for tensors that stand in a source already.

    Use it like its parent, in this order: ``add_*`` for keys, `add_tensors` once, `write_all`.  It opens no file:
    everything goes to `output`, in order, without seeking.

    Parameters
    ----------
    output
        Where the file goes.
    arch
        Value of ``general.architecture``.
    """

    def __init__(self, output: Writer, arch: str) -> None:
        super().__init__(None, arch)
        self._output = output

    def add_tensors(self, names: Sequence[str], table: npt.NDArray[np.void], source: Source) -> None:
        """Add float32 tensors by reference.

        Parameters
        ----------
        names
            GGUF names, in the order of the file.
        table
            Rows of `layout.TENSOR`, one a name, with one or two dims each and ``gguf_offset`` ascending without gaps.
        source
            What ``offset`` and ``nbytes`` of the table refer to.

        Raises
        ------
        ValueError
            Two tensors have the same name.
        """
        placeholder = gguf.gguf_writer.TensorInfo(shape=(), dtype=gguf.GGMLQuantizationType.F32, nbytes=0)
        self.tensors = [dict.fromkeys(names, placeholder)]
        if len(self.tensors[0]) != len(names):
            raise ValueError("Duplicated tensor name")
        self._names, self._table, self._source = names, table, source

    def open_output_file(self, path: os.PathLike[str] | None = None) -> None:  # noqa: ARG002
        """Collect what the parent writes in memory; keys and infos are small."""
        self.fout = [cast(io.BufferedWriter, io.BytesIO())]
        self.state = gguf.WriterState.EMPTY

    def write_ti_data_to_file(self) -> None:
        """Write all tensor infos at once."""
        if self.state is not gguf.WriterState.KV_DATA:
            raise ValueError(f"Expected output file to contain KV data, got {self.state}")
        assert self.fout is not None
        infos = np.zeros(len(self._names), GGUF_TENSOR_INFO)
        infos["n_dims"] = self._table["n_dims"]
        infos["ne"][:, 0] = self._table["ne0"]
        infos["ne"][:, 1] = self._table["ne1"]
        infos["dtype"] = gguf.GGMLQuantizationType.F32
        infos["offset"] = self._table["gguf_offset"]
        pack = _packed_infos if len(infos) <= _MOST_CACHED else _packed_infos.__wrapped__
        self.fout[0].write(pack(tuple(self._names), infos.tobytes()))
        self.state = gguf.WriterState.TI_DATA

    def write_tensors_to_file(self, *, progress: bool | Progress = False) -> None:
        """Write tensor infos and all tensor data; `progress` is called with bytes as they are written."""
        self.write_ti_data_to_file()
        assert self.fout is not None
        head = cast(io.BytesIO, self.fout[0])
        self.write_padding(head, head.tell())
        copy_tensors(
            self._source,
            self._table["offset"],
            self._table["nbytes"],
            self._output,
            alignment=ALIGNMENT,
            head=head.getvalue(),
            progress=progress if callable(progress) else None,
        )
        self.state = gguf.WriterState.WEIGHTS

    def write_all(self, progress: Progress | None = None) -> None:
        """Write the whole file: header, keys, tensor infos, tensor data."""
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file(progress=progress or False)


@functools.lru_cache(maxsize=4)  # the checkpoints of one training run are all of one shape
def _packed_infos(names: tuple[str, ...], infos: bytes) -> bytes:
    """Return the tensor infos as they stand in the file; `infos` holds a `layout.GGUF_TENSOR_INFO` for each name."""
    rows = np.frombuffer(infos, GGUF_TENSOR_INFO)
    size = GGUF_TENSOR_INFO.itemsize
    packed = bytearray()
    for i, (name, n_dims) in enumerate(zip(names, rows["n_dims"].tolist())):
        encoded, info = name.encode(), infos[i * size : (i + 1) * size]
        packed += len(encoded).to_bytes(8, "little")
        packed += encoded
        packed += info if n_dims == 2 else info[: _NE1.start] + info[_NE1.stop :]
    return bytes(packed)


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
    packed = bytearray(np.array((GGUF_MAGIC, version, n_tensors, keys[0]), GGUF_HEADER).tobytes())
    packed += keys[1]
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

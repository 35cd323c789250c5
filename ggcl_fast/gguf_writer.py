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
import struct
from collections.abc import Sequence
from typing import Any, Final, NamedTuple, cast

import gguf
import numpy as np
import numpy.typing as npt

from .errors import CheckpointError
from .layout import ALIGNMENT, GGUF_TENSOR_INFO
from .payload import Output, Progress, copy_tensors
from .sources import Source

__all__ = ["BulkGGUFWriter", "TensorInfo", "as_bytes", "head", "packed_keys", "padding", "quantized"]

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

    def __init__(self, output: Output, arch: str) -> None:
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
        self.fout[0].write(_packed_infos(tuple(self._names), infos.tobytes()))
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
            head=head.getvalue(),
            progress=progress if callable(progress) else None,
        )
        self.state = gguf.WriterState.WEIGHTS

    def write_all(self, progress: Progress | None = None) -> None:
        """Write the whole file: header, keys, tensor infos, tensor data."""
        self.write_header_to_file()
        self.write_kv_data_to_file()
        self.write_tensors_to_file(progress=progress or False)


@functools.lru_cache(maxsize=8)  # the checkpoints of one training run are all of one shape
def _packed_infos(names: tuple[str, ...], infos: bytes) -> bytes:
    """Return the tensor infos as they stand in the file; `infos` holds a `layout.GGUF_TENSOR_INFO` for each name."""
    rows = np.frombuffer(infos, GGUF_TENSOR_INFO)
    parts: list[bytes] = []
    for name, n_dims, row in zip(names, rows["n_dims"].tolist(), rows):
        encoded, info = name.encode(), row.tobytes()
        parts += (len(encoded).to_bytes(8, "little"), encoded)
        parts += (info,) if n_dims == 2 else (info[: _NE1.start], info[_NE1.stop :])
    return b"".join(parts)


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


def quantized(
    values: npt.NDArray[np.float32], kind: gguf.GGMLQuantizationType, *, source: str, tensor: str
) -> npt.NDArray[Any]:
    """Return `values` in the type `kind`, contiguous: float32, float16, or bytes.

    Raises
    ------
    CheckpointError
        A finite value would become infinite; `source` and `tensor` are what the message names.
    """
    with np.errstate(over="ignore"):
        result = np.ascontiguousarray(gguf.quants.quantize(np.ascontiguousarray(values), kind))
    infinite = np.isinf(result) if kind == gguf.GGMLQuantizationType.F16 else np.False_
    if infinite.any() and infinite.sum() > np.isinf(values).sum():
        raise CheckpointError(
            "a value is too large for F16", source=source, tensor=tensor, field="data", expected="at most 65504",
            found=float(np.abs(values[np.isfinite(values)]).max()),
        )  # fmt: skip
    return result


def as_bytes(values: npt.NDArray[Any]) -> memoryview:
    """Return the bytes of a contiguous array, not copied."""
    return values.reshape(-1).view(np.uint8).data


def padding(nbytes: int, alignment: int = ALIGNMENT) -> bytes:
    """Return the zeros that follow `nbytes` bytes of data."""
    return bytes(-nbytes % alignment)


def head(
    infos: Sequence[TensorInfo],
    n_keys: int,
    keys: bytes,
    *,
    version: int = gguf.GGUF_VERSION,
    alignment: int = ALIGNMENT,
) -> bytes:
    """Return everything that stands before the tensor data: header, keys, tensor infos, padding.

    Parameters
    ----------
    infos
        The tensors in the order of the file; each is followed by `padding`.
    n_keys, keys
        Number of keys, and their bytes as they stand in a file.
    version
        Of the file: 2 or 3, which differ in nothing else.
    alignment
        Of the tensor data.
    """
    parts = [struct.pack("<IIQQ", gguf.GGUF_MAGIC, version, len(infos), n_keys), keys]
    offset = 0
    for info in infos:
        name = info.name.encode("utf-8", "surrogateescape")
        parts += (struct.pack("<Q", len(name)), name)
        parts.append(struct.pack(f"<I{len(info.dims)}QIQ", len(info.dims), *info.dims, info.type, offset))
        offset += info.nbytes + -info.nbytes % alignment
    whole = b"".join(parts)
    return whole + padding(len(whole), alignment)


assert ALIGNMENT == gguf.GGUF_DEFAULT_ALIGNMENT

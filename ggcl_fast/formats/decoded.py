"""Tensors of other types, in another order or the other way round, shown as a ggcl file would have them.

Whoever uses a `checkpoint.Checkpoint` finds its tensors as float32 of shape (length, rank), at an offset in a source.
Adapters that others wrote have halves, BF16 or blocks, those in GGUF form A as its transpose, and those of Hugging
Face's B with rows in another order.  `Decoded` is a source with places of its own, of which each tensor is decoded when
it is read: nothing else knows of it.

What is stored element by element is decoded piece by piece; of any other tensor all of it is read, and the last one
kept.  Values are what gguf makes of them, which is exact for floats of 16 bits.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Sequence
from typing import Final, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

from ..storage.sources import WINDOW, Source, read_at
from .layout import ALIGNMENT
from .numbers import Floats, knows

__all__ = ["Decoded", "EncodedTensor", "can_decode", "to_gguf_rows", "to_hf_rows"]

_Type = gguf.GGMLQuantizationType
_ELEMENTWISE: Final = {_Type.F32: 4, _Type.F16: 2, _Type.BF16: 2}  # bytes


def to_hf_rows(rows: Floats, n_head: int) -> Floats:
    """Return `rows`, shape (n_head * d, n), in Hugging Face's order of q and k instead of GGUF's.

    Within each head GGUF has value i of the first half at row 2 * i, and that of the second half after it.
    """
    heads = rows.reshape(n_head, -1, 2, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def to_gguf_rows(rows: Floats, n_head: int) -> Floats:
    """Return `rows`, shape (n_head * d, n), in GGUF's order of q and k instead of Hugging Face's."""
    heads = rows.reshape(n_head, 2, -1, rows.shape[1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def can_decode(type: _Type) -> bool:
    """Tell whether tensors of this type can be shown as float32."""
    return knows(gguf.quants.dequantize, type)


class EncodedTensor(NamedTuple):
    """A matrix as it is stored."""

    offset: int
    """Byte offset of its data in the file."""
    nbytes: int
    """Bytes of its data."""
    type: _Type
    shape: tuple[int, int]
    """As numpy has it, outermost dim first."""
    is_transposed: bool = False
    """Whether its transpose is what is shown."""
    n_head: int = 0
    """Heads, of which each has its rows in Hugging Face's order and is shown in GGUF's; 0 for rows as they stand."""
    n_rows: int = 0
    """Rows that are shown: those beyond the ones that are stored are zero; 0 for as many as there are."""

    @property
    def shown(self) -> int:
        """Bytes that are shown of it."""
        n_rows, n_columns = self.shape[::-1] if self.is_transposed else self.shape
        return 4 * max(self.n_rows, n_rows) * n_columns

    @property
    def is_plain(self) -> bool:
        """Whether its elements are shown in the order in which they are stored, and no others."""
        return not (self.is_transposed or self.n_head or self.n_rows)


class _Last(threading.local):
    """The tensor that was decoded last, of each thread: those that read at two places must not decode in turns."""

    index = -1
    whole = memoryview(b"")


class Decoded:
    """A source that shows the tensors of another one as float32; see `sources.Source`.

    Parameters
    ----------
    source
        Where they are stored.  It is closed with this one.
    tensors
        Shown in this order, each at a multiple of `layout.ALIGNMENT`: `offsets` tells where.
    """

    memory: memoryview | None = None

    def __init__(self, source: Source, tensors: Sequence[EncodedTensor]) -> None:
        self._source = source
        self._tensors = tensors
        self._stops: list[int] = []
        self.offsets: list[int] = []
        """Byte offset at which each tensor is shown."""
        self._last = _Last()
        self._map: memoryview | None = None
        end = 0
        for tensor in tensors:
            self.offsets.append(-(-end // ALIGNMENT) * ALIGNMENT)
            end = self.offsets[-1] + tensor.shown
            self._stops.append(end)
        self.name = source.name
        self.identity = source.identity
        self.size = end
        self.file_size = source.file_size
        self.far = source.far

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._source.closed

    def window(self, offset: int) -> tuple[int, memoryview]:
        """Return the bytes from `offset` on."""
        return offset, read_at(self, offset, WINDOW)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with what is shown from `offset` on; there are zeros between tensors."""
        stop, at = offset + len(buffer), offset
        index = bisect.bisect_right(self._stops, offset)
        while at < stop and index < len(self._tensors):
            start, end = self.offsets[index], min(stop, self._stops[index])
            gap = min(start, stop) - at
            if gap > 0:
                buffer[at - offset : at - offset + gap] = bytes(gap)
                at += gap
            if at < end:
                self._decode_into(index, at - start, buffer[at - offset : end - offset])
                at = end
            index += 1

    def _decode_into(self, index: int, first: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of a tensor from `first` on."""
        tensor = self._tensors[index]
        size = _ELEMENTWISE.get(tensor.type, 0)
        if not tensor.is_plain or not size or first % 4 or len(buffer) % 4:
            buffer[:] = self._whole(index)[first : first + len(buffer)]
        elif size == 4:
            self._source.read_into(tensor.offset + first, buffer)
        else:
            data = self._read(tensor.offset + first // 4 * size, len(buffer) // 4 * size)
            np.frombuffer(buffer, "<f4")[:] = _floats(data, tensor.type)

    def _whole(self, index: int) -> memoryview:
        """Return all bytes of a tensor."""
        if self._last.index == index:
            return self._last.whole
        tensor = self._tensors[index]
        values = _floats(self._read(tensor.offset, tensor.nbytes), tensor.type).reshape(tensor.shape)
        shown = values.T if tensor.is_transposed else values
        if tensor.n_head:
            shown = to_gguf_rows(shown, tensor.n_head)
        if tensor.n_rows > len(shown):
            shown = np.concatenate([shown, np.zeros((tensor.n_rows - len(shown), shown.shape[1]), np.float32)])
        whole = np.ascontiguousarray(shown, "<f4").reshape(-1).view(np.uint8).data
        self._last.index, self._last.whole = index, whole
        return whole

    def _read(self, offset: int, nbytes: int) -> npt.NDArray[np.uint8]:
        data = bytearray(nbytes)
        self._source.read_into(offset, memoryview(data))
        return np.frombuffer(data, np.uint8)

    def map(self) -> memoryview:
        """Return all that is shown, decoded into memory."""
        if self._map is None:
            whole = bytearray(self.size)
            self.read_into(0, memoryview(whole))
            self._map = memoryview(whole).toreadonly()
        return self._map

    def prefetch(self, offsets: Sequence[int]) -> None:
        """Do nothing: its places are not the source's."""

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if the source has changed."""
        self._source.check_unchanged()

    def close(self) -> None:
        """Let go of the source."""
        self._source.close()
        self._last, self._map = _Last(), None


def _floats(data: npt.NDArray[np.uint8], type: _Type) -> Floats:
    """Return the values of some bytes of data, as float32."""
    with np.errstate(all="ignore"):  # of scales that are not finite
        floats: Floats = gguf.quants.dequantize(data, type)
    return floats

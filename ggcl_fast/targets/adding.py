"""Weights with their deltas added, some rows at a time, by as many threads as there are processors.

Rows are read, changed and given out in order; a few blocks are in work at a time, whatever the size of the model.  No
type's blocks reach across rows.  Where numba repays its start, `formats.sums` adds and rounds; what it has no kernel
for and what it finds odd goes the way of `formats.numbers`, which gives the same bits.
The same kernels round what is written without a sum, as in adapters: values are added to nothing.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

import gguf
import numpy as np
import numpy.typing as npt

from ..checkpoint import Checkpoint, Pair
from ..formats import sums
from ..formats.gguf_tensors import GGUFTensor
from ..formats.gguf_writer import TensorInfo, as_bytes
from ..formats.numbers import Floats, quantized, with_delta
from ..readers.engine import Engine, Start, can_compile, check_engine
from ..storage.copying import in_order
from .base_model import BaseModel
from .deltas import Census, lora_a, lora_b

__all__ = ["Changed", "Rounding", "Rows", "add_deltas", "pick_kernel", "pick_rounding"]

_Type = gguf.GGMLQuantizationType
_Bytes = npt.NDArray[np.uint8]
_ROWS: Final = 1 << 18  # bytes of float32 that are changed together; more falls out of cache
_TOGETHER: Final = 1 << 20  # bytes that are read and written together
_start: Final = Start(cold=150_000_000, imported=90_000_000)  # in weights


Rounding = Callable[[Floats, str], memoryview]
"""Takes values and the name of their tensor; gives the bytes of the values in another type.

Raises `CheckpointError` where a finite value would become something else."""


class Changed(NamedTuple):
    """A tensor of the merged model that a pair changes."""

    info: TensorInfo
    origin: GGUFTensor
    """The tensor of the base that it comes from."""
    pair: Pair


class Rows(NamedTuple):
    """Some rows of a tensor, as they are written."""

    of: Changed
    data: memoryview
    """Good until the next rows are asked for."""
    n_read: int
    """Bytes of the base model that they come from."""
    last: bool
    """Whether the tensor ends with them."""


class _Room:
    """Room for a stretch of rows and the delta of a block; used again and again."""

    def __init__(self, n_read: int, n_values: int, n_written: int) -> None:
        self.read = np.empty(n_read, np.uint8)
        self.delta = np.empty(n_values, np.float32)
        self.written = np.empty(n_written, np.uint8)

    def holds(self, n_read: int, n_values: int, n_written: int) -> bool:
        return n_read <= self.read.size and n_values <= self.delta.size and n_written <= self.written.size


class _Stretch(NamedTuple):
    """Some rows that are to be changed, block by block."""

    of: Changed
    first: int
    n_rows: int
    """Of a block; the last one may have fewer."""
    b: Floats
    """The rows of B."""
    a: Floats
    at: Floats
    """A.T, contiguous."""
    kernel: sums.Kernel | None

    @property
    def bytes_read(self) -> int:
        """Bytes of a row of the base."""
        return self.of.origin.nbytes // self.of.pair.n_out

    @property
    def bytes_written(self) -> int:
        """Bytes of a row of the merged model."""
        return self.of.info.nbytes // self.of.pair.n_out


def pick_kernel(type: _Type, engine: Engine, n_weights: int) -> sums.Kernel | None:
    """Return what is to add to the next `n_weights` weights of this type; None for numpy.

    The rule is that of `engine.Start`, by weights.

    Measured on 2 cores of an AMD EPYC (Milan), Python 3.11, numba 0.68: of a billion weights, two threads with numpy
    take 5 to 8 s, and with kernels 0.4 to 1.2 s; numba's import takes 0.25 s and a kernel's compilation 0.5 s.

    Raises
    ------
    ValueError
        `engine` is none of `engine.ENGINES`.
    ModuleNotFoundError
        `engine` is "numba", and numba is missing or broken.
    """
    check_engine(engine)
    if engine == "python" or type not in sums.LARGEST:
        return None
    if engine == "auto" and type not in _compiled and not _start.pays_for(n_weights):
        return None
    if not can_compile(_BUILDERS[type], engine):
        return None
    _compiled.add(type)
    return sums.compiled(type)


def pick_rounding(type: _Type, engine: Engine, n_values: int, source: str) -> Rounding:
    """Return what puts the next `n_values` values into another type, as `numbers.quantized` does; see `pick_kernel`.

    `source` is what the message names where a value is too large.
    """
    kernel = pick_kernel(type, engine, n_values) if type in _NOTHING else None
    if kernel is None:
        return lambda values, tensor: as_bytes(quantized(values, type, source=source, tensor=tensor))
    nothing = np.full(_TOGETHER // 4, _NOTHING[type])
    nothing.flags.writeable = False
    return functools.partial(_rounded, kernel, nothing, type, source)


def _rounded(
    kernel: sums.Kernel, nothing: npt.NDArray[np.uint16], type: _Type, source: str, values: Floats, tensor: str
) -> memoryview:
    """Do it with a kernel, which adds the values to `nothing`, a stretch at a time, if none of them is odd."""
    flat = np.ascontiguousarray(values).reshape(-1)
    written = np.empty(flat.size, nothing.dtype)
    for first in range(0, flat.size, nothing.size):
        some = flat[first : first + nothing.size]
        out = written[first : first + some.size]
        if kernel(nothing[: some.size].view(np.uint8), some, out.view(np.uint8)) > sums.LARGEST[type]:
            return as_bytes(quantized(values, type, source=source, tensor=tensor))
    return as_bytes(written)


_NOTHING: Final = {_Type.F16: np.uint16(0x8000), _Type.BF16: np.uint16(0x8000)}  # -0: what can be added to it stays
_BUILDERS: Final = {type: functools.partial(sums.compiled, type) for type in sums.LARGEST}
_compiled: set[_Type] = set()


def add_deltas(
    checkpoint: Checkpoint,
    base: BaseModel,
    changed: Iterable[Changed],
    kernels: dict[_Type, sums.Kernel | None],
    census: Census,
) -> Iterator[Rows]:
    """Yield all rows of all tensors `changed`, in order, with their deltas added.

    Raises
    ------
    CheckpointError
        A finite value would become something else, or a file changed while it was read.
    """
    rooms: deque[_Room] = deque()
    stretches = _stretches(checkpoint, changed, kernels, census)
    for stretch, room, data in in_order(functools.partial(_add, base, rooms), stretches):
        n_rows = len(stretch.b)
        last = stretch.first + n_rows == stretch.of.pair.n_out
        yield Rows(stretch.of, data, n_rows * stretch.bytes_read, last)
        rooms.append(room)


def _stretches(
    checkpoint: Checkpoint, changed: Iterable[Changed], kernels: dict[_Type, sums.Kernel | None], census: Census
) -> Iterator[_Stretch]:
    for one in changed:
        pair = one.pair
        a, b = lora_a(checkpoint, pair, census), lora_b(checkpoint, pair, census)
        at = np.ascontiguousarray(a.T)
        kernel = kernels.get(one.origin.type) if one.info.type == one.origin.type else None
        n_rows = max(1, _ROWS // (4 * pair.n_in))
        n_together = max(1, _TOGETHER // (n_rows * (one.origin.nbytes // pair.n_out))) * n_rows
        for first in range(0, pair.n_out, n_together):
            yield _Stretch(one, first, n_rows, b[first : first + n_together], a, at, kernel)


def _add(base: BaseModel, rooms: deque[_Room], stretch: _Stretch) -> tuple[_Stretch, _Room, memoryview]:
    """Read a stretch, add its delta, and return it with its bytes and the room that they are in."""
    n_in, n_rows, n_total = stretch.of.pair.n_in, stretch.n_rows, len(stretch.b)
    bytes_read, bytes_written = stretch.bytes_read, stretch.bytes_written
    room = _room(rooms, n_total * bytes_read, n_rows * n_in, n_total * bytes_written)
    read, written = room.read[: n_total * bytes_read], room.written[: n_total * bytes_written]
    base.source.read_into(stretch.of.origin.offset + stretch.first * bytes_read, read.data)
    read.flags.writeable = False
    with np.errstate(all="ignore"):
        for first in range(0, n_total, n_rows):
            b = stretch.b[first : first + n_rows]
            rows = read[first * bytes_read : (first + len(b)) * bytes_read]
            sums_ = written[first * bytes_written : (first + len(b)) * bytes_written]
            if not _add_fast(stretch, b, rows, room.delta[: len(b) * n_in], sums_):
                plain = _add_plainly(base, stretch, b, rows.reshape(len(b), -1))
                sums_[:] = plain.reshape(-1).view(np.uint8)
        _keep_idle(stretch, read, written)
    return stretch, room, written.data


def _room(rooms: deque[_Room], n_read: int, n_values: int, n_written: int) -> _Room:
    try:
        room = rooms.popleft()
    except IndexError:
        return _Room(n_read, n_values, n_written)
    return room if room.holds(n_read, n_values, n_written) else _Room(n_read, n_values, n_written)


def _add_fast(stretch: _Stretch, b: Floats, rows: _Bytes, delta: Floats, written: _Bytes) -> bool:
    """Do it with a kernel, if there is one; false where something is odd."""
    if stretch.kernel is None:
        return False
    # Of a single row BLAS adds up the terms in another order, which depends on how A lies in memory.
    at = stretch.at if len(b) > 1 else stretch.a.T
    np.matmul(b, at, out=delta.reshape(len(b), -1))
    return stretch.kernel(rows, delta, written) <= sums.LARGEST[stretch.of.info.type]


def _keep_idle(stretch: _Stretch, rows: _Bytes, written: _Bytes) -> None:
    """Let rows without a delta stay as they are, to the bit: they would be rounded anew for nothing."""
    b = stretch.b
    idle = ~b.any(axis=1)
    if stretch.of.info.type == stretch.of.origin.type and idle.any() and np.isfinite(stretch.a).all():
        written.reshape(len(b), -1)[idle] = rows.reshape(len(b), -1)[idle]


def _add_plainly(base: BaseModel, stretch: _Stretch, b: Floats, rows: _Bytes) -> npt.NDArray[np.generic]:
    """Do it with numpy and gguf, which have a rule for everything."""
    info, origin, pair = stretch.of
    weights = gguf.quants.dequantize(rows, origin.type).reshape(len(rows), pair.n_in)
    values = with_delta(weights, b, stretch.a, source=base.source.name, tensor=info.name)
    return quantized(values, info.type, source=base.source.name, tensor=info.name)

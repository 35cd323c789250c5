"""The pass over values: what is in a block of floats, and its Gram matrix.

`survey` and `gram` are what goes through a block.  Like `sweep.sweep` they are plain functions that numba compiles
from outside; `survey_plainly` and `gram_plainly` give the same numbers with numpy, for files that do not repay numba's
start.  This module knows neither files nor tensors.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from ..readers.engine import Engine, Start, can_compile, check_engine

__all__ = [
    "LARGEST_BLOCK", "PLAIN", "Doubles", "Floats", "Kernels", "Values", "compiled", "gram", "gram_plainly",
    "pick_engine", "survey", "survey_plainly",
]  # fmt: skip

LARGEST_BLOCK: Final = 1 << 20
"""Bytes that the plain pass has room for: what is gone through together, while it is in the processor's cache."""


class Values(NamedTuple):
    """What `survey` finds in some values; of several blocks, what `merged` makes of them."""

    n_nan: int = 0
    n_inf: int = 0
    n_zero: int = 0
    lowest: float = math.inf
    """Smallest finite value; inf where there is none."""
    highest: float = -math.inf
    """Largest finite value; -inf where there is none."""
    squares: float = 0.0
    """Sum of squares of the finite values."""

    def merged(self, other: Values) -> Values:
        """Return the numbers of both together."""
        return Values(
            self.n_nan + other.n_nan,
            self.n_inf + other.n_inf,
            self.n_zero + other.n_zero,
            min(self.lowest, other.lowest),
            max(self.highest, other.highest),
            self.squares + other.squares,
        )


Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]


class Kernels(NamedTuple):
    """What goes through the blocks: compiled, or with numpy."""

    survey: Callable[[Floats], Values]
    """Takes (n,) float32."""
    gram: Callable[[Floats], Doubles]
    """Takes rows of (n, rank) float32 and gives ``rows.T @ rows`` in float64; NaN where they are not all finite."""


_CHUNK: Final = 512  # rows that are multiplied together in float32 before they are added to float64
_PITCH: Final = _CHUNK + 16  # floats from row to row: a power of two would put all rows in the same lines of the cache

_MAGNITUDE = np.int32(0x7FFFFFFF)  # all bits of a float32 but its sign
_INFINITE = np.int32(0x7F800000)  # the magnitude of an infinity; those above are NaN
_SIGN = np.int32(31)
_LARGEST = np.int32(0x7FFFFFFF)
_SMALLEST = np.int32(-0x80000000)


def survey(values: Any, words: Any) -> tuple[Any, ...]:
    """Go through the values of a block: for their squares, then for the rest, while they are in the cache.

    A sum of squares that is finite says that all values are, so only blocks with others are looked at one by one.
    Both loops in one took a quarter longer.  Numbers to compare are the floats' bits made monotone: as int32, which
    the compiler turns into vector code, as it does not with the minimum of floats.  Casts back to int32 are there
    since numba widens every sum to int64.

    Parameters
    ----------
    values
        (n,) float32, n below 2^31.
    words
        The same bytes as (n,) int32.

    Returns
    -------
    tuple
        Counts of NaN, infinite and zero values; smallest and largest finite value as monotone int32 (the former
        larger than the latter where there is none), for `_float` to turn back; sum of the squares of finite values
        in float64, where that of float32 values cannot overflow.
    """
    squares = 0.0
    for i in range(len(values)):
        value = np.float64(values[i])
        squares += value * value
    lowest, highest, n_zero = _LARGEST, _SMALLEST, np.int32(0)
    if squares < np.inf:
        for i in range(len(words)):
            word = words[i]
            key = np.int32(word ^ np.int32(np.int32(word >> _SIGN) & _MAGNITUDE))
            lowest = min(lowest, key)
            highest = max(highest, key)
            n_zero = np.int32(n_zero + np.int32(np.int32(word & _MAGNITUDE) == 0))
        return 0, 0, n_zero, lowest, highest, squares
    n_nan, n_inf, squares = 0, 0, 0.0
    for i in range(len(words)):
        word = words[i]
        magnitude = np.int32(word & _MAGNITUDE)
        if magnitude > _INFINITE:
            n_nan += 1
        elif magnitude == _INFINITE:
            n_inf += 1
        else:
            key = np.int32(word ^ np.int32(np.int32(word >> _SIGN) & _MAGNITUDE))
            lowest = min(lowest, key)
            highest = max(highest, key)
            n_zero = np.int32(n_zero + np.int32(magnitude == 0))
            value = np.float64(values[i])
            squares += value * value
    return n_nan, n_inf, n_zero, lowest, highest, squares


def _float(key: int) -> float:
    """Turn a monotone int32 back into the float that it stands for; -0.0 becomes 0.0."""
    word = key ^ 0x7FFFFFFF if key < 0 else key
    return float(np.int32(word).view(np.float32)) + 0.0


def gram(rows: Any, turned: Any, total: Any) -> None:
    """Form ``rows.T @ rows`` in `total`: on and above the diagonal, in blocks of 2 x 4, then mirrored.

    `_CHUNK` rows at a time are turned, so that each entry is a product of two contiguous vectors, eight of which are
    formed together.  Beside BLAS this takes 1.2 to 1.5 of the time with one thread, adds up to a tenth of the error,
    and needs no threads of its own, whose waiting for each other costs many times as much on a busy machine.

    Parameters
    ----------
    rows
        (n, rank) float32.
    turned
        (padded, `_PITCH`) float32, room to work in; zeros from row `rank` on.
    total
        (padded, padded) float64, all zeros; padded is rank rounded up to a multiple of 4.
    """
    n, rank = rows.shape
    padded = len(total)
    for first in range(0, n, _CHUNK):
        m = min(_CHUNK, n - first)
        for i in range(m):
            for j in range(rank):
                turned[j, i] = rows[first + i, j]
        for j in range(0, padded, 2):
            x, z = turned[j], turned[j + 1]
            for k in range(j & -4, padded, 4):
                p, q, r, s = turned[k], turned[k + 1], turned[k + 2], turned[k + 3]
                xp = xq = xr = xs = zp = zq = zr = zs = np.float32(0)
                for i in range(m):
                    xp += x[i] * p[i]
                    xq += x[i] * q[i]
                    xr += x[i] * r[i]
                    xs += x[i] * s[i]
                    zp += z[i] * p[i]
                    zq += z[i] * q[i]
                    zr += z[i] * r[i]
                    zs += z[i] * s[i]
                total[j, k] += xp
                total[j, k + 1] += xq
                total[j, k + 2] += xr
                total[j, k + 3] += xs
                total[j + 1, k] += zp
                total[j + 1, k + 1] += zq
                total[j + 1, k + 2] += zr
                total[j + 1, k + 3] += zs
    for j in range(padded):
        for k in range(j):
            total[j, k] = total[k, j]


def _survey_with(kernel: Callable[..., Any], values: Floats) -> Values:
    n_nan, n_inf, n_zero, lowest, highest, squares = kernel(values, values.view(np.int32))
    if lowest > highest:
        return Values(n_nan, n_inf, n_zero)
    return Values(n_nan, n_inf, n_zero, _float(lowest), _float(highest), squares)


def _gram_with(kernel: Callable[..., Any], rows: Floats) -> Doubles:
    rank = rows.shape[1]
    padded = -(-rank // 4) * 4
    total = np.zeros((padded, padded))
    kernel(rows, np.zeros((padded, _PITCH), np.float32), total)
    return total[:rank, :rank]


@functools.cache
def compiled() -> Kernels:
    """Return `survey` and `gram` compiled by numba, without the GIL.

    Compiled anew in each process that wants them, for the reason that `engine.compiled` gives.  Sums may be taken in
    any order, which vector code needs; nothing else about floats is relaxed, NaN and infinity included.
    """
    import numba

    types: Any = numba.types
    f4, f8, i4, i8 = types.float32, types.float64, types.int32, types.int64
    floats, words, rows = types.Array(f4, 1, "C", True), types.Array(i4, 1, "C", True), types.Array(f4, 2, "C", True)
    options: Any = {"nogil": True, "fastmath": {"reassoc", "contract"}}
    look = numba.njit(types.Tuple((i8, i8, i8, i4, i4, f8))(floats, words), **options)(survey)
    multiply = numba.njit(types.void(rows, f4[:, ::1], f8[:, ::1]), **options)(gram)
    return Kernels(functools.partial(_survey_with, look), functools.partial(_gram_with, multiply))


class _Room(threading.local):
    """Room for values in float64, of each thread: fresh memory would cost more than filling it."""

    def __init__(self) -> None:
        self.wide = np.empty(LARGEST_BLOCK // 4)


_room: Final = _Room()


def survey_plainly(values: Floats) -> Values:
    """Return what the compiled `survey` does, with numpy."""
    # Not np.dot: BLAS would start threads for it.
    wide = _room.wide[: values.size] if values.nbytes <= LARGEST_BLOCK else np.empty(values.size)
    with np.errstate(invalid="ignore"):  # of signalling NaN
        wide[:] = values
    squares = float(np.add.reduce(np.square(wide, out=wide)))
    n_nan = n_inf = 0
    if not math.isfinite(squares):
        n_nan, n_inf = (int(np.count_nonzero(which(values))) for which in (np.isnan, np.isinf))
        finite = np.isfinite(values)
        values, squares = values[finite], float(np.add.reduce(wide[finite]))
    if not values.size:
        return Values(n_nan, n_inf)
    n_zero = int(np.count_nonzero(values == 0))
    return Values(n_nan, n_inf, n_zero, float(values.min()) + 0.0, float(values.max()) + 0.0, squares)


def gram_plainly(rows: Floats) -> Doubles:
    """Return what the compiled `gram` does, with numpy."""
    rank = rows.shape[1]
    step = max(64, (1 << 18) // rank**2)  # rows: as many as OpenBLAS multiplies without threads, up to rank 64
    total = np.zeros((rank, rank))
    for first in range(0, len(rows), step):
        some = rows[first : first + step]
        total += some.T @ some
    return total


PLAIN: Final = Kernels(survey_plainly, gram_plainly)
"""What needs no numba."""


_start: Final = Start(cold=4 << 30, imported=7 << 29)  # in bytes


def pick_engine(engine: Engine, nbytes: int) -> Kernels:
    """Return what is to go through the next `nbytes` bytes: what `engine` says, or for "auto" what pays.

    The rule is that of `engine.Start`, by bytes: a file so large that it repays numba's start is gone through by the
    compiled pass from its first byte on.

    Measured on 2 cores of an AMD EPYC (Milan), Python 3.11, numba 0.68: a checkpoint of rank 4 or 16 takes numpy
    290 us a MiB and the compiled pass 120 to 135 us; numba's import takes 0.25 s and the compilation 1.05 s.

    Raises
    ------
    ValueError
        `engine` is none of `engine.ENGINES`.
    ModuleNotFoundError
        `engine` is "numba", and numba is missing or broken.
    """
    check_engine(engine)
    if engine == "auto" and not compiled.cache_info().currsize and not _start.pays_for(nbytes):
        engine = "python"
    if engine != "python" and can_compile(compiled, engine):
        return compiled()
    return PLAIN

"""The pass over the tensor records: where every tensor is, how long, and where it goes.

`sweep` is the only code that walks a file.  It is one plain function with two lives: compiled by numba, and
interpreted as it stands for the single small file that does not repay numba's start.  Rules it keeps, so that
both lives give the same table and neither can be led outside the bytes it was given:

- it takes and returns plain arrays and integers, allocates nothing, raises nothing;
- every position is checked against the size of the file and against the window before the read;
- a product of dims is bounded in floating point before it is formed, so that nothing overflows an int64.

It says *where* a record is wrong; the reader decodes that one record again to say *what* is wrong.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from . import layout

__all__ = [
    "BAD",
    "DONE",
    "ENGINES",
    "MORE",
    "N_FF",
    "WINDOW",
    "Engine",
    "compiled",
    "pick_engine",
    "sweep",
    "walk",
]

Engine = Literal["auto", "numba", "python"]
ENGINES: Final[tuple[Engine, ...]] = ("auto", "numba", "python")

_START_COLD: Final = 130_000  # records that the interpreter sweeps in the time that numba's import and start take
_START_IMPORTED: Final = 100_000  # the same where numba is imported already

DONE: Final = 0  # every record of the plan was found as planned
MORE: Final = 1  # the record at the returned position is outside the window: call again with another one
BAD: Final = 2  # the record at the returned position is not as planned, or reaches past the end of the file

WINDOW: Final = 4096  # bytes; any record's fixed part, dims and expected name fit in a fraction of it
N_FF: Final = -1  # in a plan: a dim that the file decides; the first one found binds all others


def sweep(
    words: Any,
    start: int,
    size: int,
    plan: Any,
    names: Any,
    table: Any,
    index: int,
    position: int,
    gguf: int,
    n_ff: int,
) -> tuple[int, int, int, int, int]:
    """Walk tensor records, check them against `plan`, fill `table`.

    Parameters
    ----------
    words
        The window: uint32 words of the file, little-endian values in native order.
    start, size
        Byte offset of the window in the file, a multiple of 4; bytes in the whole file.
    plan
        (n, 5) int64, a row a record: n_dims, ne0, ne1 (or `N_FF`), first word of the expected name in `names`,
        its length in bytes.
    names
        uint32 words of the expected names, each padded with zeros to whole words.
    table
        (n,) of `layout.TENSOR`, written.
    index, position, gguf, n_ff
        Where to go on: the next row, its byte offset in the file, its data's offset in the GGUF data section,
        and the feed-forward length, 0 while unknown.

    Returns
    -------
    tuple of int
        Status (`DONE`, `MORE` or `BAD`), then index, position, gguf and n_ff as they stand after the last good record.
    """
    stop = start + 4 * len(words)
    while index < len(plan):
        expected = plan[index]
        n_dims = expected[0]
        head = 12 + 4 * n_dims
        if position + head > size:
            return BAD, index, position, gguf, n_ff
        if position < start or position + head > stop:
            return MORE, index, position, gguf, n_ff
        at = (position - start) >> 2
        if words[at] != n_dims or words[at + 2] != 0:
            return BAD, index, position, gguf, n_ff
        name_len = words[at + 1] + 0  # + 0 makes an int64 of a uint32 when compiled
        if name_len > size - position - head:
            return BAD, index, position, gguf, n_ff

        ne0 = 0
        ne1 = 1
        ff = n_ff
        if n_dims > 0:
            ne0 = words[at + 3] + 0
        if n_dims > 1:
            ne1 = words[at + 4] + 0
            if expected[2] == N_FF and ff == 0:
                ff = ne1
        expected_ne1 = expected[2]
        if expected_ne1 == N_FF:
            expected_ne1 = ff
        if ne0 != expected[1] or ne1 != expected_ne1 or ne1 == 0:
            return BAD, index, position, gguf, n_ff

        offset = (position + head + name_len + 31) & -32
        if 4.0 * ne0 * ne1 > 4e18 or offset + 4 * ne0 * ne1 > size:
            return BAD, index, position, gguf, n_ff

        renamed = 0
        if name_len != expected[4]:
            renamed = 1
        elif name_len > 0:
            whole, tail = name_len >> 2, name_len & 3
            if position + head + 4 * whole + 4 > stop:
                return MORE, index, position, gguf, n_ff
            at += head >> 2
            found = words[at : at + whole + 1]
            name = names[expected[3] : expected[3] + whole + 1]
            difference = (found[whole] ^ name[whole]) & ((1 << (8 * tail)) - 1)
            for i in range(whole):
                difference |= found[i] ^ name[i]
            if difference != 0:
                renamed = 1

        nbytes = 4 * ne0 * ne1
        row = table[index]
        row["record"] = position
        row["offset"] = offset
        row["nbytes"] = nbytes
        row["ne0"] = ne0
        row["ne1"] = ne1
        row["n_dims"] = n_dims
        row["renamed"] = renamed
        row["gguf_offset"] = gguf
        index += 1
        position = offset + nbytes
        gguf += (nbytes + 31) & -32
        n_ff = ff
    return DONE, index, position, gguf, n_ff


class Windowed(Protocol):
    """What `walk` needs of a source of bytes."""

    @property
    def size(self) -> int:
        """Bytes in the whole source."""

    def window(self, offset: int) -> tuple[int, memoryview]:
        """Return the bytes around `offset`: where they start, a multiple of 4, and the bytes.

        They hold at least `WINDOW` bytes from `offset` on, or all up to the end of the source.
        """


def walk(
    source: Windowed,
    plan: npt.NDArray[np.int64],
    names: npt.NDArray[np.uint32],
    table: npt.NDArray[np.void],
    *,
    position: int,
    gguf: int = 0,
    n_ff: int = 0,
    engine: Literal["numba", "python"],
) -> tuple[int, int, int, int]:
    """Sweep the records of `plan` from byte `position` of `source`, window by window.

    Both engines fill `table` with the same values.  Returns the index of the first bad record (``len(plan)`` where
    there is none), and position, gguf and n_ff as `sweep` does.
    """
    kernel, rows, view = (compiled(), plan, _array) if engine == "numba" else (sweep, plan.tolist(), _words)
    expected_names = names if engine == "numba" else names.data
    status, index = MORE, 0
    while status == MORE:
        start, window = source.window(position)
        status, index, position, gguf, n_ff = kernel(
            view(window), start, source.size, rows, expected_names, table, index, position, gguf, n_ff
        )
    return index, position, gguf, n_ff


def _array(window: memoryview) -> npt.NDArray[np.uint32]:
    words = np.frombuffer(window, "<u4", len(window) // 4)
    if sys.byteorder == "big":
        words = words.astype(np.uint32)
    words.flags.writeable = False  # one signature for every kind of buffer
    return words


def _words(window: memoryview) -> memoryview:
    # Indexing a memoryview gives Python integers, which the interpreter handles several times faster than numpy's.
    return _array(window).data


_interpreted = 0  # records swept without numba in this process


def pick_engine(engine: Engine, n_records: int) -> Literal["numba", "python"]:
    """Tell what is to sweep the next `n_records` records: what `engine` says, or for "auto" what pays.

    "auto" stays with the interpreter until it has cost as much as numba's start would have, then changes over.  So
    one file never waits for numba, thousands of them soon run compiled, and the whole never costs more than twice
    what knowing the number of files beforehand would.  Where the pass is compiled already it is used.

    Measured on 2 cores of an AMD EPYC (Milan), Python 3.11, numba 0.68: the interpreter takes 6.7 us a record, the
    compiled pass 0.02 us; numba's import takes 0.22 s and the compilation 0.65 s.  That makes 130,000 records, about
    220 checkpoints of 7B models, or 100,000 where numba is imported already.

    Parameters
    ----------
    engine
        "numba" and "python" are taken at their word; "auto" is the rule above.
    n_records
        Records about to be swept.

    Raises
    ------
    ValueError
        `engine` is none of `ENGINES`.
    """
    global _interpreted
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, not {engine!r}")
    if engine != "auto":
        return engine
    if compiled.cache_info().currsize:
        return "numba"
    price = _START_IMPORTED if "numba" in sys.modules else _START_COLD
    if _interpreted > price:
        return "numba"
    _interpreted += n_records
    return "python"


@functools.cache
def compiled() -> Any:
    """Return `sweep` compiled by numba, without the GIL and for one signature.

    It is compiled anew in each process that wants it, which takes 0.4 s longer than numba's cache on disk would.
    That cache cannot be made safe: it writes an index, then the code that the index speaks of, so a process that is
    killed in between leaves a new index beside the code of an older version, which every later process then runs.
    """
    import numba

    types: Any = numba.types
    i8 = types.int64
    words = types.Array(types.uint32, 1, "C", readonly=True)
    table = numba.from_dtype(layout.TENSOR)[::1]
    signature = types.UniTuple(i8, 5)(words, i8, i8, i8[:, ::1], words, table, i8, i8, i8, i8)
    return numba.njit(signature, nogil=True)(sweep)

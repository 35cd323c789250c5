"""The pass over the tensor records: where every tensor is, how long, and where it goes.

`sweep` is the only code that walks a ggcl file, where `predict` cannot prove all of it.  It is one plain function with
two lives, see `engine`: compiled by numba, and interpreted as it stands for the single small file that does not repay
numba's start.  Rules it keeps, so that both lives give the same table and neither can be led outside the bytes it was
given:

- it takes and returns plain arrays and integers, allocates nothing, raises nothing;
- every position is checked against the size of the file and against the window before the read;
- a product of dims is bounded in floating point before it is formed, so that nothing overflows an int64.

It says *where* a record is wrong; the reader decodes that one record again to say *what* is wrong.
"""

from __future__ import annotations

from typing import Any, Final

from ..formats.schema import N_FF

__all__ = ["BAD", "DONE", "MORE", "sweep"]

DONE: Final = 0  # every record was found as expected
MORE: Final = 1  # the record at the returned position is outside the window: call again with another one
BAD: Final = 2  # the record at the returned position is not as expected, or reaches past the end of the file


def sweep(
    words: Any,
    start: int,
    size: int,
    records: Any,
    names: Any,
    table: Any,
    index: int,
    position: int,
    gguf: int,
    n_ff: int,
) -> tuple[int, int, int, int, int]:
    """Walk tensor records, check them against what is expected, fill `table`.

    Parameters
    ----------
    words
        The window: uint32 words of the file, little-endian values in native order.
    start, size
        Byte offset of the window in the file, a multiple of 4; bytes in the whole file.
    records
        (n, 5) int64, a row an expected record: n_dims, ne0, ne1 (or `N_FF`), first word of its name in `names`,
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
    while index < len(records):
        expected = records[index]
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
            written = words[at : at + whole + 1]
            name = names[expected[3] : expected[3] + whole + 1]
            difference = (written[whole] ^ name[whole]) & ((1 << (8 * tail)) - 1)
            for i in range(whole):
                difference |= written[i] ^ name[i]
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

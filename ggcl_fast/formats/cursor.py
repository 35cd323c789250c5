"""A place in a source that moves forward over what has no fixed layout.

GGUF's keys, strings, arrays and tensor infos follow each other without padding, and each one's length stands in it: no
dtype can describe a row of them.  This is the one place where `struct` decodes, field by field; whatever has a fixed
layout is a dtype in `layout`.

Every count is compared with the bytes that are left before anything depends on it.
"""

from __future__ import annotations

import struct
from typing import Final

from ..errors import CheckpointError, TruncatedError, printable
from ..storage.sources import Source, read_at

__all__ = ["LONGEST_NAME", "MOST_STRINGS", "U32", "U64", "Cursor"]

U32: Final = struct.Struct("<I")
U64: Final = struct.Struct("<Q")
LONGEST_NAME: Final = (1 << 16) - 1
"""Bytes of the name of a key, by GGUF's specification; nobody needs more for a tensor either."""
MOST_STRINGS: Final = 1 << 24
"""Elements of all arrays of strings of a file: real vocabularies have some 100,000, and sparse files have any size."""

_WINDOW: Final = 1 << 20  # bytes read at a time


class Cursor:
    """A place in a source, moving forward; what it stands on is in a window."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.position = 0
        self._start = 0
        self._n_strings = 0
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

    def length(self, field: str) -> int:
        """Read the length of a string, which is all there."""
        (nbytes,) = self.unpack(U64, field)
        self._need(nbytes, field)
        return nbytes

    def bytes(self, nbytes: int, field: str) -> memoryview:
        """Read some bytes; the view is good until the next read."""
        self._need(nbytes, field)
        at = self._load(nbytes)
        self.position += nbytes
        return self._window[at : at + nbytes]

    def name(self, field: str) -> str:
        """Read a string that names something."""
        at = self.position
        (nbytes,) = self.unpack(U64, field)
        if nbytes > LONGEST_NAME:
            raise CheckpointError(
                source=self.source.name, field=field, offset=at, expected=f"at most {LONGEST_NAME} bytes", found=nbytes
            )
        name = bytes(self.bytes(nbytes, field))
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
        """Step over `count` strings, 0.1 us each; there are at most `MOST_STRINGS` in a file."""
        self._need(8 * count, field)
        self._n_strings += count
        if self._n_strings > MOST_STRINGS:
            raise CheckpointError(
                source=self.source.name, field=field, offset=self.position - U64.size,
                expected=f"at most {MOST_STRINGS} strings in all", found=self._n_strings,
            )  # fmt: skip
        unpack = U64.unpack_from
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

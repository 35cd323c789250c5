"""Where bytes come from: a file, or memory.

Both give windows to the sweep, blocks to the copier and one buffer to whoever wants to look at tensors.  A file is
read with plain reads, never through a map, so that a file that shrinks meanwhile gives an error and not a SIGBUS.
This module knows no format.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import stat
from collections.abc import Sequence
from typing import Final, Protocol, cast

import numpy as np

from .errors import SourceChangedError
from .sweep import WINDOW

__all__ = ["SMALL", "Buffer", "Source", "SourceBuffer", "SourceFile", "StrPath", "is_url", "public_name", "read_at"]

StrPath = str | os.PathLike[str]
Buffer = bytes | bytearray | memoryview | mmap.mmap | np.ndarray
SMALL: Final = 4 << 20  # files up to this many bytes are read once, whole, when they are opened


def is_url(path: StrPath) -> bool:
    """Tell whether `path` is a URL, for `remote`, and not a path."""
    return isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def public_name(url: str) -> str:
    """Return `url` without what may be secret in it: user and password, query and fragment."""
    scheme, _, rest = url.partition("://")
    rest = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


class Source(Protocol):
    """Bytes that a checkpoint is read from."""

    name: str
    """What to call it in messages."""
    size: int
    """Bytes in all."""
    memory: memoryview | None
    """All bytes, read-only, where they are in memory anyway."""
    far: bool
    """Whether each reading costs a round trip, so that `prefetch` pays."""

    def window(self, offset: int) -> tuple[int, memoryview]:
        """Return the bytes around `offset`, see `sweep.Windowed.window`."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; `SourceChangedError` where they are no longer there."""

    def map(self) -> memoryview:
        """Return all bytes as one read-only view, mapping the file where it is not in memory."""

    def prefetch(self, offsets: Sequence[int]) -> None:
        """Be told, ascending, where something will soon be read; for sources with a long way to their bytes."""

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if the source is known to have changed since it was opened."""

    def is_file(self, status: os.stat_result) -> bool:
        """Tell whether the source is the file with this status, under whatever name."""

    def close(self) -> None:
        """Let go of the source; views given out stay valid."""


def read_at(source: Source, offset: int, nbytes: int) -> memoryview:
    """Return up to `nbytes` bytes from `offset` on, fewer only at the end of the source."""
    nbytes = max(0, min(nbytes, source.size - offset))
    if source.memory is not None:
        return source.memory[offset : offset + nbytes]
    block = memoryview(bytearray(nbytes))
    source.read_into(offset, block)
    return block


class SourceBuffer:
    """Bytes in memory, shared and not copied.  Raises `TypeError` for what has no contiguous buffer."""

    def __init__(self, buffer: Buffer, name: str = "<buffer>") -> None:
        view = memoryview(cast(bytes, buffer))
        if not view.c_contiguous:
            raise TypeError("expected a C-contiguous buffer")
        self.name = name
        self.far = False
        self.memory: memoryview | None = view.cast("B").toreadonly() if view.nbytes else memoryview(b"")
        self.size = view.nbytes
        self._aligned = self.size == 0 or np.frombuffer(self.memory, np.uint8).ctypes.data % 4 == 0

    def _view(self) -> memoryview:
        if self.memory is None:
            raise ValueError(f"{self.name}: the checkpoint is closed")
        return self.memory

    def window(self, offset: int) -> tuple[int, memoryview]:
        """Return everything, or an aligned copy of a piece where the memory is not aligned to words."""
        if self._aligned:
            return 0, self._view()
        return offset, memoryview(bytes(self._view()[offset : offset + WINDOW]))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copy bytes from `offset` on into `buffer`."""
        buffer[:] = self._view()[offset : offset + len(buffer)]

    def map(self) -> memoryview:
        """Return the memory itself."""
        return self._view()

    def prefetch(self, offsets: Sequence[int]) -> None:
        """Do nothing: it is all here."""

    def check_unchanged(self) -> None:
        """Do nothing: what happens to the caller's memory is the caller's business."""

    def is_file(self, status: os.stat_result) -> bool:  # noqa: ARG002
        """Return false."""
        return False

    def close(self) -> None:
        """Let go of the memory."""
        self.memory = None


class SourceFile:
    """A regular file on a local disk, open for reading.

    Raises `OSError` for a file that is missing, unreadable, or not a regular file: a folder, a pipe, a device.
    """

    def __init__(self, path: StrPath) -> None:
        self.name = os.fspath(path)
        self.far = False
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        self._file = open(path, "rb", buffering=0, opener=lambda p, _: os.open(p, flags))  # noqa: SIM115
        try:
            self._status = os.fstat(self._file.fileno())
            if not stat.S_ISREG(self._status.st_mode):
                raise OSError(errno.EINVAL, "Not a regular file", self.name)
            self.size = self._status.st_size
            self.memory: memoryview | None = self._read_whole() if self.size <= SMALL else None
        except BaseException:
            self._file.close()
            raise

    def _read_whole(self) -> memoryview:
        data = self._file.read(self.size) or b""
        if len(data) != self.size:
            raise self._changed(f"it had {self.size} bytes, and only {len(data)} could be read")
        return memoryview(data)

    def _changed(self, how: str) -> SourceChangedError:
        return SourceChangedError(f"the file changed while it was read: {how}", source=self.name)

    def window(self, offset: int) -> tuple[int, memoryview]:
        """Return the whole of a small file, or a freshly read piece of a large one."""
        return (0, self.memory) if self.memory is not None else (offset, read_at(self, offset, WINDOW))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on.  Not for two threads at once."""
        got = 0
        try:
            self._file.seek(offset)
            while got < len(buffer):
                n = self._file.readinto(buffer[got:])
                if not n:
                    raise self._changed(f"it had {self.size} bytes, and now ends at {offset + got}")
                got += n
        except OSError as error:
            error.filename = self.name
            raise

    def map(self) -> memoryview:
        """Return the bytes of a small file, or a map of a large one.

        Reading a map of a file that somebody shortens meanwhile kills the process (SIGBUS); nothing in this package
        reads through one unless its caller asked for the tensors' values.
        """
        if self.memory is not None:
            return self.memory
        self.check_unchanged()
        return memoryview(mmap.mmap(self._file.fileno(), self.size, access=mmap.ACCESS_READ))

    def prefetch(self, offsets: Sequence[int]) -> None:
        """Do nothing: the system reads ahead."""

    def check_unchanged(self) -> None:
        """Compare size and time of change with those at the start."""
        now = os.fstat(self._file.fileno())
        if now.st_size != self.size:
            raise self._changed(f"it had {self.size} bytes, and now has {now.st_size}")
        if now.st_mtime_ns != self._status.st_mtime_ns:
            raise self._changed("it was written to")

    def is_file(self, status: os.stat_result) -> bool:
        """Compare device and inode."""
        return os.path.samestat(self._status, status)

    def close(self) -> None:
        """Close the file.  A map lives on until the last view of it is gone."""
        self._file.close()
        self.memory = None

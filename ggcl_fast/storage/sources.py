"""Where bytes come from: a file, or memory.

Both give windows to a reader of records, blocks to the copier and one buffer to whoever wants to look at tensors.  A
file is read with plain reads, never through a map, so that a file that shrinks meanwhile gives an error and not a
SIGBUS; and each read says where it reads, so that threads and forked processes share a source without a word.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, Protocol, cast

import numpy as np

from ..errors import CheckpointError, SourceChangedError
from .identity import inode
from .system import is_written_elsewhere
from .urls import StrPath

__all__ = ["SMALL", "WINDOW", "Buffer", "Source", "SourceBuffer", "SourceFile", "read_at"]

Buffer = bytes | bytearray | memoryview | mmap.mmap | np.ndarray
SMALL: Final = 4 << 20
"""Files up to this many bytes are read once, whole, when they are opened."""
WINDOW: Final = 4096
"""Bytes that a window has at least; any record's fixed part, dims and expected name fit in a fraction of it."""
_DIGESTED: Final = 1 << 20  # bytes at a time


class Source(Protocol):
    """Bytes that a checkpoint is read from.  Every method can be called by several threads at once."""

    name: str
    """What to call it in messages."""
    identity: frozenset[tuple[object, ...]]
    """What tells it from other files and objects, see `identity.identities`; memory is like none of them."""
    size: int
    """Bytes in all."""
    file_size: int
    """Bytes that it takes where it is stored, which is `size` unless something is decoded."""
    memory: memoryview | None
    """All bytes, read-only, where they are in memory anyway."""
    far: bool
    """Whether each reading costs a round trip, so that `prefetch` pays."""

    @property
    def closed(self) -> bool:
        """Whether it was closed: reading it is a `CheckpointError` then."""

    def window(self, offset: int) -> tuple[int, memoryview]:
        """Return the bytes around `offset`: where they start, a multiple of 4, and the bytes.

        They hold at least `WINDOW` bytes from `offset` on, or all up to the end.
        """

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` on; `SourceChangedError` where they are no longer there."""

    def map(self) -> memoryview:
        """Return all bytes as one read-only view, mapping the file where it is not in memory."""

    def prefetch(self, offsets: Sequence[int]) -> None:
        """Be told, ascending, where something will soon be read; for sources with a long way to their bytes."""

    def check_unchanged(self) -> None:
        """Raise `SourceChangedError` if the source is known to have changed since it was opened."""

    def close(self) -> None:
        """Let go of the source; views given out stay valid."""


def read_at(source: Source, offset: int, nbytes: int) -> memoryview:
    """Return up to `nbytes` bytes from `offset` on, fewer only at the end of the source."""
    nbytes = max(0, min(nbytes, source.size - offset))
    memory = source.memory
    if memory is not None:
        return memory[offset : offset + nbytes]
    block = memoryview(bytearray(nbytes))
    source.read_into(offset, block)
    return block


def closed(name: str) -> CheckpointError:
    """Return what to raise where a source named `name` is used after it was closed."""
    return CheckpointError("the checkpoint is closed", source=name)


class SourceBuffer:
    """Bytes in memory, shared and not copied.  Raises `TypeError` for what has no contiguous buffer."""

    far = False
    identity: frozenset[tuple[object, ...]] = frozenset()

    def __init__(self, buffer: Buffer, name: str = "<buffer>") -> None:
        view = memoryview(cast(bytes, buffer))
        if not view.c_contiguous:
            raise TypeError("expected a C-contiguous buffer")
        self.name = name
        self.closed = False
        self.memory: memoryview | None = view.cast("B").toreadonly() if view.nbytes else memoryview(b"")
        self.size = self.file_size = view.nbytes
        self._aligned = self.size == 0 or np.frombuffer(self.memory, np.uint8).ctypes.data % 4 == 0

    def window(self, offset: int) -> tuple[int, memoryview]:
        """Return everything, or an aligned copy of a piece where the memory is not aligned to words."""
        if self._aligned:
            return 0, self.map()
        return offset, memoryview(bytes(self.map()[offset : offset + WINDOW]))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Copy bytes from `offset` on into `buffer`."""
        buffer[:] = self.map()[offset : offset + len(buffer)]

    def map(self) -> memoryview:
        """Return the memory itself."""
        memory = self.memory
        if memory is None:
            raise closed(self.name)
        return memory

    def prefetch(self, offsets: Sequence[int]) -> None:
        """Do nothing: it is all here."""

    def check_unchanged(self) -> None:
        """Do nothing: what happens to the caller's memory is the caller's business."""

    def close(self) -> None:
        """Let go of the memory."""
        self.memory, self.closed = None, True


def _digest(blocks: Iterable[memoryview]) -> bytes:
    import hashlib

    digest = hashlib.blake2b()
    for block in blocks:
        digest.update(block)
    return digest.digest()


def _pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Read from where it is said, so that threads and forks share `fd`; return how many bytes came."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    data = os.pread(fd, len(buffer), offset)  # every POSIX system has it
    buffer[: len(data)] = data
    return len(data)


class _Descriptor:
    """An open file, closed when nobody holds it any more: not while another thread reads from it."""

    fd = -1

    def __init__(self, path: str) -> None:
        # O_NONBLOCK: opening a pipe must not wait for a writer.
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            with contextlib.suppress(OSError):  # of a file that was only read
                os.close(fd)


class SourceFile:
    """A regular file on a local disk, open for reading.

    Raises `OSError` for a file that is missing, unreadable, or not a regular file: a folder, a pipe, a device.
    """

    far = False

    def __init__(self, path: StrPath) -> None:
        self.name = os.fspath(path)
        self.memory: memoryview | None = None
        self._map: memoryview | None = None
        try:
            descriptor = _Descriptor(self.name)
        except ValueError as error:  # a NUL in the name
            raise OSError(errno.EINVAL, str(error), self.name) from None
        self._descriptor: _Descriptor | None = descriptor
        with self._open() as fd:
            self._status = os.fstat(fd)
        self.identity: frozenset[tuple[object, ...]] = frozenset([inode(self._status)])
        if stat.S_ISDIR(self._status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.name)
        if not stat.S_ISREG(self._status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file", self.name)
        self.size = self.file_size = self._status.st_size
        if self.size <= SMALL:
            self.memory = self._read_whole()
        # Pages that a map has written to already change without a trace: the bytes themselves must tell.
        self._digest: bytes | None = None
        if is_written_elsewhere(descriptor.fd):
            self._digest = _digest(self._blocks() if self.memory is None else [self.memory])

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._descriptor is None

    def _read_whole(self) -> memoryview:
        """Read a small file: bytes are not made twice, as those of a bytearray are, once with zeros."""
        with self._open() as fd:
            data = os.pread(fd, self.size, 0)
        if len(data) == self.size:
            return memoryview(data)
        whole = memoryview(bytearray(self.size))  # a short read, rare on disks
        self.read_into(0, whole)
        return whole.toreadonly()

    @contextlib.contextmanager
    def _open(self) -> Iterator[int]:
        """Give the file descriptor; what goes wrong with it names the file."""
        descriptor = self._descriptor
        try:
            if descriptor is None:
                raise closed(self.name)
            yield descriptor.fd
        except OSError as error:
            error.filename = self.name
            raise
        finally:
            del descriptor  # or the traceback of an error would keep the file open

    def _changed(self, how: str) -> SourceChangedError:
        return SourceChangedError(f"the file changed while it was read: {how}", source=self.name)

    def window(self, offset: int) -> tuple[int, memoryview]:
        """Return the whole of a small file, or a freshly read piece of a large one."""
        memory = self.memory
        return (0, memory) if memory is not None else (offset, read_at(self, offset, WINDOW))

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on."""
        got = 0
        with self._open() as fd:
            while got < len(buffer):
                n = _pread_into(fd, buffer[got:], offset + got)
                if not n:
                    raise self._changed(f"it had {self.size} bytes, and now ends at {offset + got}")
                got += n

    def _blocks(self) -> Iterator[memoryview]:
        """Read the whole file anew."""
        for offset in range(0, self.size, _DIGESTED):
            block = memoryview(bytearray(min(_DIGESTED, self.size - offset)))
            self.read_into(offset, block)
            yield block

    def map(self) -> memoryview:
        """Return the bytes of a small file, or a map of a large one.

        Reading a map of a file that somebody shortens meanwhile kills the process (SIGBUS); nothing in this package
        reads through one unless its caller asked for the tensors' values.
        """
        whole = self.memory if self.memory is not None else self._map
        if whole is None:
            self.check_unchanged()
            with self._open() as fd:
                whole = self._map = memoryview(mmap.mmap(fd, self.size, access=mmap.ACCESS_READ))
        return whole

    def prefetch(self, offsets: Sequence[int]) -> None:
        """Do nothing: the system reads ahead."""

    def check_unchanged(self) -> None:
        """Compare size and times of change with those at the start; all bytes, where somebody had it open to write."""
        before = self._status
        with self._open() as fd:
            now = os.fstat(fd)
        if now.st_size != self.size:
            raise self._changed(f"it had {self.size} bytes, and now has {now.st_size}")
        if now.st_mtime_ns != before.st_mtime_ns:
            raise self._changed("it was written to")
        if now.st_ctime_ns != before.st_ctime_ns and not self._was_moved(now):
            raise self._changed("it was written to, or its times were set")
        if self._digest is not None and self._digest != _digest(self._blocks()):
            raise self._changed("it was written to through a map, or within a moment")

    def _was_moved(self, now: os.stat_result) -> bool:
        """Tell whether names, owner or mode of the file are others: that sets st_ctime too, and no byte is another."""
        before = self._status
        if any(getattr(now, f) != getattr(before, f) for f in ("st_nlink", "st_mode", "st_uid", "st_gid")):
            return True
        try:
            return not os.path.samestat(os.stat(self.name), now)
        except OSError:
            return True

    def close(self) -> None:
        """Close the file.  A map lives on until the last view of it is gone."""
        self._descriptor = self.memory = self._map = None

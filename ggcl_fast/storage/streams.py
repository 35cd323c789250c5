"""Pipes and devices: a source that is read once, forward, and an output that cannot be taken back.

A pipe as a source is read whole into memory, up to `LONGEST`.  A pipe or a device as an output gets its bytes as they
come, when all that can be known beforehand was held: what fails after that leaves a part behind.

Nobody waits for a pipe that has no other end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from .system import write_all

if TYPE_CHECKING:
    from .sources import SourceBuffer

__all__ = ["LONGEST", "STDIN", "STDOUT", "OutputStream", "is_pipe", "is_stream", "read_pipe"]

LONGEST: Final = 4 << 30
"""Bytes that are read from a stream at most."""
STDIN: Final = "/dev/stdin"
STDOUT: Final = "/dev/stdout"
_BLOCK: Final = 1 << 20
_PATIENCE: Final = 2.0  # seconds for a writer to come


def _mode(name: str) -> int:
    try:
        return os.stat(name).st_mode
    except (OSError, ValueError):
        return 0


def is_pipe(name: str) -> bool:
    """Tell whether bytes come out of `name` once, and then no more; nothing is opened."""
    return _is_pipe(_mode(name))


def _is_pipe(mode: int) -> bool:
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def is_stream(name: str) -> bool:
    """Tell whether `name` is standard output, a pipe, or a device that takes bytes; nothing is opened."""
    if name == STDOUT:
        return True
    mode = _mode(name)
    return _is_pipe(mode) or stat.S_ISCHR(mode)


def read_pipe(name: str) -> SourceBuffer:
    """Read what comes out of a pipe.

    Raises
    ------
    OSError
        It cannot be read, nobody writes to it, or there are more than `LONGEST` bytes.
    """
    from .sources import SourceBuffer  # brings numpy along, which --help does without

    whole = bytearray()
    patience = time.monotonic() + _PATIENCE
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb", buffering=0) as file:
            while True:
                block = file.read(_BLOCK)
                if block is None:  # there is a writer, who has nothing to say yet
                    select.select([file], [], [])
                elif block:
                    whole += block
                elif whole or time.monotonic() > patience:
                    break
                else:
                    time.sleep(0.01)
                if len(whole) > LONGEST:
                    raise OSError(errno.EFBIG, f"A pipe with more than {LONGEST:,} bytes: save them to a file")
        if not whole:
            raise OSError(errno.ENODATA, "Nothing comes out of this pipe")
    except OSError as error:
        error.filename = name
        raise
    return SourceBuffer(whole, name)


class OutputStream:
    """A pipe or a device as an output; see `outputs.Output`.  What was written stays written."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.nbytes = 0
        self._fd = -1

    def create(self) -> None:
        """Open it."""
        try:
            if self.path == STDOUT:
                self._fd = os.dup(1)
            else:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # or nobody reads: ENXIO
                os.set_blocking(self._fd, True)
            if os.isatty(self._fd):
                raise OSError(errno.EINVAL, "A terminal is no place for it: name a file, or lead it into a pipe")
        except OSError as error:
            error.filename = self.path
            raise

    def file(self, name: str) -> contextlib.AbstractContextManager[OutputStream]:  # noqa: ARG002
        """Give itself."""
        return contextlib.nullcontext(self)

    def preallocate(self, nbytes: int) -> None:
        """Do nothing: there is no room to reserve."""

    def writev(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Append `pieces`."""
        try:
            self.nbytes += write_all(self._fd, pieces)
        except OSError as error:
            error.filename = self.path
            raise

    def finish(self) -> None:
        """Do nothing: all was written."""

    def take(self, *, last: bool) -> None:
        """Do nothing: it has its place."""

    def sync(self) -> None:
        """Do nothing: it is not on a disk."""

    def give_back(self) -> None:
        """Do nothing: it cannot be taken back."""

    def discard(self) -> None:
        """Close it."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            with contextlib.suppress(OSError):  # whoever reads it has gone
                os.close(fd)

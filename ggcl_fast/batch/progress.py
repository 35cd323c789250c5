"""How far many jobs are, in bytes of their sources: within each as its outputs are written, and over all of them."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from typing import Final

from ..storage.outputs import Progress
from ..storage.urls import StrPath
from .jobs import JobResult, size_of

__all__ = ["Share", "Tally", "Teller", "read_told"]

_PAUSE: Final = 0.1  # seconds between two messages of a worker
_NUMBER: Final = struct.Struct("q")
_MESSAGES: Final = 1024  # that are read at a time


def _done(result: JobResult) -> int:
    """Return the bytes of a job's source, be it done or not."""
    return result.report.source_bytes if result.report is not None else size_of(result.job.source)


class _Forward:
    """Tells `progress` how much more is done each time, and never that it is less."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._told = 0

    def _tell(self, done: int) -> None:
        news, self._told = done - self._told, max(done, self._told)
        if news > 0:
            self._progress(news)


class Share(_Forward):
    """What one job tells `progress`, in bytes of its source: as large a part of them as was written of its outputs.

    How large a source is that is no local file is known only when it is done.
    """

    def __init__(self, source: StrPath, progress: Progress) -> None:
        super().__init__(progress)
        self._size = size_of(source)
        self._total = self._written = 0

    def begin(self, total: int) -> None:
        """Take the bytes that there are to write."""
        self._total = total

    def __call__(self, nbytes: int) -> None:
        """Tell of bytes that were written."""
        self._written += nbytes
        self._tell(self._size * self._written // max(self._total, self._written, 1))

    def finish(self, result: JobResult) -> None:
        """Tell that nothing is left to do, be it done or not."""
        self._tell(_done(result))


class Tally(_Forward):
    """What all jobs tell `progress`: each byte once, also where it is done again because who did it has died.

    Results say what is done for certain; between them the shares of what is in work do.
    """

    error: Exception | None = None
    """What `progress` raised while it was called from within a job."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(progress)
        self._landed = self._base = self._shared = 0

    def land(self, result: JobResult) -> None:
        """Take a result."""
        self._landed += _done(result)
        self._look()

    def share(self, nbytes: int) -> None:
        """Take bytes that are done of what is in work."""
        self._shared += nbytes
        self._look()

    def share_from_within(self, nbytes: int) -> None:
        """Do the same within a job, whose fault it is not if `progress` fails."""
        if self.error is None:
            try:
                self.share(nbytes)
            except Exception as error:
                self.error = error

    def lose(self) -> None:
        """Forget what was in work: it will be done again."""
        self._base, self._shared = self._landed, 0

    def _look(self) -> None:
        self._tell(max(self._landed, self._base + self._shared))


class Teller:
    """Tells the parent of a worker, through the end of a pipe, how many bytes are done; never waits for anybody."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._untold = 0
        self._last = time.monotonic()
        os.set_blocking(fd, False)

    def __call__(self, nbytes: int) -> None:
        """Tell of bytes that are done, now or with others later."""
        self._untold += nbytes
        now = time.monotonic()
        if now - self._last >= _PAUSE:
            with contextlib.suppress(OSError):  # the pipe is full, or the parent has gone
                os.write(self._fd, _NUMBER.pack(self._untold))  # so short that it is not mixed with others'
                self._untold, self._last = 0, now


def read_told(fd: int) -> int:
    """Return how many bytes the workers have told of since the last look; `fd` does not block."""
    total = 0
    with contextlib.suppress(BlockingIOError):
        while data := os.read(fd, _MESSAGES * _NUMBER.size):
            total += sum(number for (number,) in _NUMBER.iter_unpack(data))
    return total

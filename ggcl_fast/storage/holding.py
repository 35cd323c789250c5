"""Whose is what, when several replace the same: the lock of what is replaced, or is to be removed.

Who replaces or removes something has its lock, and has seen under the lock that the name still means it: of two who
would remove it one does, and never what a third has made there since.  A new output is locked until its writer is done
with all of its outputs, so that nobody replaces what may have to be taken back.
"""

from __future__ import annotations

import os
from typing import Final

from .parts import FLAGS, Part
from .system import is_linked, lock_soon, unlock

__all__ = ["TRIES", "Held"]

TRIES: Final = 1000
"""To take hold of a place that others make and remove."""


class Held(Part):
    """A temporary place, and what was in the target's place when that was taken."""

    _old_status: os.stat_result | None = None

    def __init__(self) -> None:
        self._process = os.getpid()

    def _hold(self, path: str) -> bool:
        """Lock what is replaced: no rival replaces it too, or takes it for a leftover when it is out of its place.

        False where somebody else has the lock, and keeps it.
        """
        for _ in range(TRIES):
            if self._old >= 0:
                old, self._old = self._old, -1
                os.close(old)
            self._old_status = None  # a file that nobody holds may be gone, and another have its number
            self._old_status = os.lstat(path)
            try:
                self._old = os.open(path, os.O_RDONLY | os.O_NONBLOCK | FLAGS)
            except PermissionError:  # not ours to read
                return True
            self._old_status = os.fstat(self._old)
            is_locked = lock_soon(self._old)
            if is_linked(self._old, path):
                return is_locked
        return False

    def _is_old(self, path: str) -> bool:
        """Tell whether `path` is what was in the target's place, and not what a rival has made since."""
        try:
            return self._old_status is not None and os.path.samestat(os.lstat(path), self._old_status)
        except FileNotFoundError:
            return False

    def _remove_locked(self, fd: int, path: str) -> None:
        """Remove `path`, which is open as `fd`, or could not be opened and is nobody's to lock.

        Whoever keeps a lock for long is no rival, who would be quick.
        """
        if fd >= 0:
            lock_soon(fd)
        if fd < 0 or is_linked(fd, path):
            self._remove(path)

    def _forget(self) -> None:
        for fd in (self._fd, self._old):
            if fd >= 0 and self._process == os.getpid():
                unlock(fd)  # for forks of this process too, which would hold it on
        self._part = ""
        self._close()

"""A locked temporary place beside a target, ``.<name>.<n>.ggcl_fast-part``.

The lock lives as long as its writer, so a place without one is the leftover of a process that was killed, and the next
run for the same target removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Final

from .system import is_linked, is_there, lock, rename_to_free_name

__all__ = ["FLAGS", "Part"]

FLAGS: Final = os.O_CLOEXEC | os.O_NOFOLLOW
"""What every file is opened with."""
_SUFFIX: Final = ".ggcl_fast-part"
_OLD: Final = "-old"  # behind it, for what is set aside
_MOST_AT_ONCE: Final = 10_000  # who write one target
_LONGEST_NAME: Final = 200  # bytes; names end at 255 on common file systems


class Part:
    """A temporary place for the target `path`, a file or a folder."""

    what = ""
    flags = FLAGS
    path = ""
    _parents = False
    _fd = _old = -1
    _part = ""

    def _check_type(self, status: os.stat_result) -> None:
        """Raise where what is in the target's place can never be replaced."""
        raise NotImplementedError

    def _check_contents(self, path: str) -> None:
        """Raise where `path`, which is replaced, holds what is not ours."""

    def _make(self) -> None:
        """Make `_part` and open it; `FileExistsError` where it is there."""
        raise NotImplementedError

    def _is_new(self) -> bool:
        """Tell whether what was opened is what was made, and not what somebody has put in its place in between."""
        return True

    def _remove(self, path: str) -> None:
        raise NotImplementedError

    @property
    def _aside(self) -> str:
        return self._part + _OLD

    @contextlib.contextmanager
    def _naming_the_target(self) -> Iterator[None]:
        """Make an `OSError` tell of the target: the user knows nothing of a temporary name."""
        try:
            yield
        except OSError as error:
            error.filename = self.path
            del error.filename2  # None would be told
            raise

    def create(self) -> None:
        """Make the temporary place and lock it; a leftover is removed for it."""
        with self._naming_the_target():
            if self._parents:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
            for number in range(_MOST_AT_ONCE):
                self._part = self._numbered(number)
                while self._make_or_remove():
                    if lock(self._fd) is not False and is_linked(self._fd, self._part) and self._is_new():
                        if self._settle(self._aside):
                            self._remove_other_leftovers(number + 1)
                            return
                        with contextlib.suppress(OSError):
                            self._remove(self._part)  # what is set aside under this number is not ours to remove
                        self._close()
                        break
                    self._close()  # another run was here before it was locked
            raise OSError(errno.EBUSY, "Too many others are writing it")

    def _numbered(self, number: int) -> str:
        folder, name = os.path.split(self.path)
        return os.path.join(folder, f".{_shortened(name)}.{number}{_SUFFIX}")

    def _remove_other_leftovers(self, number: int) -> None:
        """Remove what several killed runs have left, from a number on."""
        own = self._part
        while is_there(other := self._numbered(number)) or is_there(other + _OLD):
            self._part = other
            try:
                self._remove_abandoned()
                if not is_there(other):
                    self._settle(other + _OLD)
            finally:
                self._part = own
            number += 1

    def _make_or_remove(self) -> bool:
        """Make the temporary place, removing a leftover; false where somebody is using it."""
        while True:
            try:
                self._make()
                return True
            except FileExistsError:
                if not self._remove_abandoned():
                    return False

    def _remove_abandoned(self) -> bool:
        """Remove `_part` if nobody writes it; false where somebody does, or it is not ours to remove."""
        try:
            fd = self._open_abandoned()
        except FileNotFoundError:
            return True
        except OSError:
            return False
        try:
            if lock(fd) is not True:
                return False
            if is_linked(fd, self._part):
                self._check_type(os.fstat(fd))
                self._check_contents(self._part)
                self._remove(self._part)
            return True
        except FileNotFoundError:  # somebody who knows no locks has removed it
            return True
        except (FileExistsError, NotADirectoryError, PermissionError):
            return False
        finally:
            os.close(fd)

    def _open_abandoned(self) -> int:
        """Open `_part`: for writing, which locks on network file systems ask for, unless it is read-only."""
        try:
            return os.open(self._part, self.flags)
        except PermissionError:
            return os.open(self._part, os.O_RDONLY | os.O_NONBLOCK | FLAGS)

    def _settle(self, aside: str) -> bool:
        """Deal with what a process that was killed between two renames had set aside; false where it has to stay."""
        if not is_there(aside):
            return True
        fd = -1
        try:
            with contextlib.suppress(OSError):  # not ours to read
                fd = os.open(aside, os.O_RDONLY | os.O_NONBLOCK | FLAGS)
            if fd >= 0 and (lock(fd) is False or not is_linked(fd, aside)):  # a rival that lives holds it
                return not is_there(aside)
            if self._is_put_back(aside):
                raise FileExistsError(
                    errno.EEXIST, f"The {self.what} that a killed run had set aside is back; look, then try again"
                )
            with contextlib.suppress(OSError):  # what is not ours stays
                self._check_contents(aside)
                self._remove(aside)
            return not is_there(aside)
        finally:
            if fd >= 0:
                os.close(fd)

    def _is_put_back(self, aside: str) -> bool:
        """Put back what was set aside, where the target's place is free; false where it is not."""
        if is_there(self.path):
            return False
        try:
            if not rename_to_free_name(aside, self.path):
                os.rename(aside, self.path)
        except FileExistsError:  # a rival was faster
            return False
        return True

    def _close(self) -> None:
        for fd in (self._fd, self._old):
            if fd >= 0:
                with contextlib.suppress(OSError):  # what had to be written was written, and checked by `finish`
                    os.close(fd)
        self._fd = self._old = -1


def _shortened(name: str) -> str:
    """Return `name` with room for what stands around it; one that is cut, between two characters, stays its own."""
    whole = os.fsencode(name)
    if len(whole) <= _LONGEST_NAME:
        return name
    import hashlib

    while len(os.fsencode(name)) > _LONGEST_NAME:
        name = name[:-1]
    return f"{name}~{hashlib.blake2b(whole, digest_size=8).hexdigest()}"

"""Outputs that appear whole or not at all: files and folders.

One idea serves all of them: a locked temporary place beside the target, ``.<name>.<n>.ggcl_fast-part``, holds what
will take the target's place, in one step, when all is written.  The lock lives as long as its writer, so a place
without one is the leftover of a process that was killed, and the next run for the same target removes it.

- Without ``force`` a place is taken only where nothing has it, at the very moment it is taken.
- With ``force`` a file is replaced in one step.  Where something can still fail afterwards, as with several outputs,
  old and new change places instead, so that they can change back: all outputs are in place, or none.
- A folder that was replaced is looked at again when it is out of its place: if it holds more than when the work began,
  it goes back.
- Rivals take turns by the lock of what they replace, see `holding`.

Where the system cannot exchange two names, the old one is set aside as ``.<name>.<n>.ggcl_fast-part-old``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from typing import Final

from . import system
from .holding import TRIES, Held
from .system import is_linked, unlock
from .urls import StrPath

__all__ = ["EXISTS", "Place"]

EXISTS: Final = "The target exists; use --force (force=True) to replace it"
"""What is said of a target that is there."""


class Place(Held):
    """What a file and a folder have in common as outputs."""

    _replaced = False
    _gives_back = False

    def __init__(self, target: StrPath, *, force: bool = False, fsync: bool = False, parents: bool = False) -> None:
        super().__init__()
        self._name = os.fspath(target)
        self._force = force
        self._fsync = fsync
        self._parents = parents
        try:
            self.path = os.path.realpath(target)
            self._check()
        except ValueError as error:  # a NUL in the name
            raise OSError(errno.EINVAL, str(error), self._name) from None

    def _check(self) -> None:
        """Hold that the target can be made, before any work is done."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            with self._naming_the_target():
                self._check_folder(os.path.dirname(self.path))
            return
        self._check_type(status)
        if not self._force:
            raise FileExistsError(errno.EEXIST, EXISTS, self._name)
        with contextlib.suppress(FileNotFoundError):  # it may have gone since
            self._check_contents(self.path)

    def _check_folder(self, folder: str) -> None:
        try:
            if stat.S_ISDIR(os.stat(folder).st_mode):
                return
            missing = errno.ENOTDIR
        except FileNotFoundError:
            missing = errno.ENOENT
        except NotADirectoryError:
            missing = errno.ENOTDIR
        if missing == errno.ENOTDIR or not self._parents:
            raise OSError(missing, "The target's folder is not there", self._name) from None

    def __del__(self) -> None:
        if self._part:  # an interrupt came on the threshold of the block: neither in it nor out of it
            self.discard()

    def finish(self) -> None:
        """Make the temporary place what the target shall be."""
        with self._naming_the_target():
            if self._process != os.getpid():
                raise OSError(errno.EPERM, "Another process has begun it")
            self._finish()
            if self._fsync:
                os.fsync(self._fd)
            os.close(os.dup(self._fd))  # some network file systems report a failed write only at close

    def _finish(self) -> None:
        """Do what is left to be done to its data."""

    def take(self, *, last: bool) -> None:
        """Let the temporary place become the target."""
        with self._naming_the_target():
            if not is_linked(self._fd, self._part):
                raise FileNotFoundError(errno.ENOENT, "The temporary file was removed by somebody else")
            for _ in range(TRIES):
                if self._take_free_name() or self._replace(last=last and not self._fsync):
                    return
            raise OSError(errno.EBUSY, "Somebody else is making and removing the target")

    def _take_free_name(self) -> bool:
        """Take the place of nothing; false where something is there that is to be replaced."""
        try:
            with self._done_all_the_same():
                if not system.rename_to_free_name(self._part, self.path):
                    self._take_free_name_by_other_means()
        except FileExistsError:
            if not self._force:
                raise FileExistsError(errno.EEXIST, EXISTS) from None
            return False
        return True

    @contextlib.contextmanager
    def _done_all_the_same(self) -> Iterator[None]:
        """Pass over the error of a call that is told although it was done, as on network file systems."""
        try:
            yield
        except OSError:
            if not is_linked(self._fd, self.path):
                raise

    def _take_free_name_by_other_means(self) -> None:
        raise NotImplementedError

    def _replace(self, *, last: bool) -> bool:  # noqa: ARG002 - of folders nothing is lost either way
        """Take the place of what is there; false where it has gone."""
        try:
            self._check_type(os.lstat(self.path))
            self._hold(self.path)
            self._check_contents(self.path)
            out = self._part
            with self._done_all_the_same():
                if not system.exchange(self._part, self.path):
                    out = self._aside
        except FileNotFoundError:
            self._old_status = None
            return False
        if out == self._aside and not self._replace_in_two_steps():
            return False
        try:
            if not self._is_old(out) and not self._hold(out):  # somebody was faster: then it is his that was replaced
                self._old_status = None  # and has gone, or is nothing of ours to know
            self._check_contents(out)
        except FileNotFoundError:  # which another rival took for a leftover, before it was held
            pass
        except OSError:
            self.give_back()
            raise
        return True

    def _replace_in_two_steps(self) -> bool:
        """Set aside what is there, then take its place; false where a rival was faster in between."""
        try:
            with self._done_all_the_same():
                self._set_aside()
        except OSError as error:
            is_aside = system.is_there(self._aside)
            if is_aside and error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                self._hold(self._aside)
                self._check_contents(self._aside)  # what the rival would have replaced
                self._remove_locked(self._old, self._aside)
            elif is_aside or error.errno != errno.ENOENT:
                raise
            self._old_status = None
            return False
        return True

    def _set_aside(self) -> None:
        """Take the target's place in two steps, where the system has no single one."""
        raise NotImplementedError

    def sync(self) -> None:
        """Make the name reach the disk."""
        if self._fsync:
            with self._naming_the_target():
                folder = os.open(os.path.dirname(self.path), os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)

    def give_back(self) -> None:
        """Restore what was there before, where the place was taken and is still ours.

        What was there is kept until it is back; where it cannot be, the `OSError` says what is in the place.
        """
        if self._process != os.getpid():
            return
        self._gives_back = True
        try:
            self._restore()
        except OSError as error:
            if not self._is_back() and not self._is_a_rivals():
                raise OSError(error.errno, f"{self._state()}: {error.strerror}", self.path) from error

    def _is_back(self) -> bool:
        """Tell whether the place is as it was."""
        with contextlib.suppress(OSError):
            return self._is_old(self.path) if self._old_status is not None else not system.is_there(self.path)
        return False

    def _is_a_rivals(self) -> bool:
        """Tell whether somebody else has taken the place since."""
        with contextlib.suppress(OSError):
            return system.is_there(self.path) and not is_linked(self._fd, self.path)
        return False

    def _restore(self) -> None:
        if self._replaced and is_linked(self._fd, self.path):
            raise FileNotFoundError(errno.ENOENT, "what was there before is gone", self.path)
        if is_linked(self._fd, self.path):
            if self._old_status is None:
                self._withdraw()
            elif self._is_old(self._part):
                if not system.exchange(self._part, self.path):
                    self._put_back(self._part, self._aside)
            elif self._is_old(self._aside):
                self._put_back(self._aside, self._part)
            else:
                raise FileNotFoundError(errno.ENOENT, "what was there before is gone", self.path)
        elif self._is_old(self._aside) and not system.is_there(self.path):
            os.rename(self._aside, self.path)

    def _withdraw(self) -> None:
        """Let nothing be in the place again, nor half of it at any moment."""
        for number in range(TRIES):  # under the one that was ours somebody may have begun another
            self._part = self._numbered(number)
            with contextlib.suppress(FileExistsError):
                if system.rename_to_free_name(self.path, self._part):
                    return
                if not system.is_there(self._part):
                    os.rename(self.path, self._part)
                    return

    def _put_back(self, old: str, free: str) -> None:
        """Let what stands at `old` take the target's place again; the name `free` is nobody's."""
        raise NotImplementedError

    def _state(self) -> str:
        """Say what is in the target's place after a failure."""
        if is_linked(self._fd, self.path):
            return f"{self.path} is the new one, and could not be put back"
        kept = any(map(self._is_old, (self._part, self._aside)))
        return f"{self.path} is not there" + (", and comes back with the next run for it" if kept else "")

    def discard(self) -> None:
        """Remove what is still temporary, and what was replaced; what cannot be removed is a leftover for the next run.

        What an interrupt keeps it from doing is done when the place is forgotten.
        """
        if self._process == os.getpid():  # in a fork of the writer it is the parent's
            if self._fd >= 0:
                unlock(self._fd)  # all is decided: nobody has to wait for what is left to do
                self._clear()
            elif self._part:  # an interrupt may have come between its creation and our knowing of it
                with contextlib.suppress(OSError):
                    self._remove_abandoned()
        self._forget()

    def _clear(self) -> None:
        for path in (self._part, self._aside):
            with contextlib.suppress(OSError):
                if is_linked(self._fd, path):
                    self._remove_locked(self._fd, path)
                elif self._is_old(path) and self._is_done_with_old():
                    self._remove_locked(self._old, path)

    def _is_done_with_old(self) -> bool:
        """Tell whether what was in the place is not needed: it is back, or the new one is there to stay."""
        return not self._gives_back or self._is_back() or is_linked(self._fd, self.path)

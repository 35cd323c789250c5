"""A file and a folder as outputs: `places` has what they share, this module what differs."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Collection, Iterator, Sequence

from . import system
from .holding import TRIES
from .identity import inode
from .parts import FLAGS
from .places import EXISTS, Place
from .system import is_linked, lock_soon
from .urls import StrPath

__all__ = ["OutputFile", "OutputFolder"]


class _FileWriter:
    """Writes an open file, from its start on."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._reserved = 0
        self.nbytes = 0
        """Bytes written so far."""

    def preallocate(self, nbytes: int) -> None:
        """Reserve `nbytes`, so that a full disk shows before the work and the blocks lie together; where supported."""
        if system.reserve(self._fd, nbytes):
            self._reserved = nbytes

    def writev(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Append `pieces`, at most `LONGEST_GATHER` of them, in order and without copying them together."""
        self.nbytes += system.write_all(self._fd, pieces)

    def finish(self, *, fsync: bool) -> None:
        """Give up what was reserved and not written; make all reach the disk if `fsync`."""
        if self.nbytes < self._reserved:
            os.ftruncate(self._fd, self.nbytes)
        if fsync:
            os.fsync(self._fd)


class OutputFile(Place):
    """A file that comes into being within `Outputs`.

    Parameters
    ----------
    target
        Where it goes; symbolic links are followed as `cp` follows them.
    force
        Replace the file that is there.
    fsync
        Make the file, then its folder, reach the disk.
    parents
        Make the folders above it where they are missing.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        There is no folder to write it into, and `parents` is false.
    FileExistsError
        There is a file and `force` is false, or something that is no regular file.
    IsADirectoryError
        It is a folder.
    """

    what = "file"
    flags = FLAGS | os.O_RDWR | os.O_NONBLOCK

    def _check_type(self, status: os.stat_result) -> None:
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, "The target is a folder", self._name)
        if not stat.S_ISREG(status.st_mode):
            raise FileExistsError(errno.EEXIST, "The target exists and is not a regular file", self._name)

    def _make(self) -> None:
        self._fd = os.open(self._part, self.flags | os.O_CREAT | os.O_EXCL, 0o666)
        self._writer = _FileWriter(self._fd)

    def _remove(self, path: str) -> None:
        os.unlink(path)

    @property
    def nbytes(self) -> int:
        """Bytes written so far."""
        return self._writer.nbytes

    def preallocate(self, nbytes: int) -> None:
        """Reserve `nbytes` in all; where that is supported."""
        with self._naming_the_target():
            self._writer.preallocate(nbytes)

    def writev(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Append `pieces`, at most `LONGEST_GATHER` of them, in order and without copying them together."""
        with self._naming_the_target():
            self._writer.writev(pieces)

    def become(self, path: str, identity: frozenset[tuple[object, ...]]) -> bool:
        """Be another name of the file at `path`, in place of what was made; false where that cannot be, or is another.

        That file is locked like any output: who comes for it waits.  Nothing can be written to it from here.
        """
        fd = -1
        try:
            real = os.path.realpath(path)
            fd = os.open(real, FLAGS | os.O_RDONLY | os.O_NONBLOCK)
            if inode(os.fstat(fd)) not in identity or not lock_soon(fd) or not self._replace_part(fd, real):
                return False
            fd, self._fd, old = -1, fd, self._fd
            os.close(old)
        except OSError:  # a file system without links, or something else than was expected
            return False
        finally:
            if fd >= 0:
                os.close(fd)
        self._writer = _FileWriter(self._fd)
        self._writer.nbytes = os.fstat(self._fd).st_size
        return True

    def _replace_part(self, fd: int, path: str) -> bool:
        """Let the temporary place be another name of `path`, open as `fd`; false where that is another file."""
        for number in range(TRIES):  # a second temporary place, which is a leftover if this process is killed
            name = self._numbered(number)
            try:
                os.link(path, name)
            except FileExistsError:
                continue
            if is_linked(fd, name):
                os.rename(name, self._part)
                return True
            os.unlink(name)
            return False
        return False

    def file(self, name: str) -> contextlib.AbstractContextManager[OutputFile]:  # noqa: ARG002
        """Give itself, whatever the name."""
        return contextlib.nullcontext(self)

    def _finish(self) -> None:
        self._writer.finish(fsync=False)

    def _take_free_name_by_other_means(self) -> None:
        try:
            with self._done_all_the_same():
                os.link(self._part, self.path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links: an empty file claims the name
            self._claim_and_replace()
        else:
            with contextlib.suppress(OSError):  # a second name, which is removed like everything temporary
                os.unlink(self._part)

    def _claim_and_replace(self) -> None:
        claim = os.open(self.path, FLAGS | os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.replace(self._part, self.path)
        except OSError:
            if not is_linked(self._fd, self.path):
                if is_linked(claim, self.path):
                    os.unlink(self.path)
                raise
        finally:
            with contextlib.suppress(OSError):  # nothing was written to it
                os.close(claim)

    def _replace(self, *, last: bool) -> bool:
        if not last:
            return super()._replace(last=last)
        try:
            self._check_type(os.lstat(self.path))
            self._hold(self.path)
        except FileNotFoundError:
            return False
        self._replaced = True
        with self._done_all_the_same():
            os.replace(self._part, self.path)
        return True

    def _set_aside(self) -> None:
        try:
            os.link(self.path, self._aside)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            os.rename(self.path, self._aside)
        os.replace(self._part, self.path)

    def _put_back(self, old: str, free: str) -> None:  # noqa: ARG002 - a file is replaced in one step
        os.replace(old, self.path)


class OutputFolder(Place):
    """A folder of files that comes into being within `Outputs`; as `OutputFile` but for what is said here.

    Parameters
    ----------
    names
        Names of its files.  A folder that holds others is never replaced.

    Raises
    ------
    NotADirectoryError
        It is a file.
    FileExistsError
        There is such a folder and `force` is false, or it holds other files than `names`.
    """

    what = "folder"
    flags = FLAGS | os.O_RDONLY | os.O_DIRECTORY

    def __init__(
        self,
        target: StrPath,
        names: Collection[str],
        *,
        force: bool = False,
        fsync: bool = False,
        parents: bool = False,
    ) -> None:
        self._names = names
        super().__init__(target, force=force, fsync=fsync, parents=parents)

    def _check_type(self, status: os.stat_result) -> None:
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "The target is to be a folder, and is a file", self._name)

    def _check_contents(self, path: str) -> None:
        if others := sorted(set(os.listdir(path)).difference(self._names)):
            raise FileExistsError(
                errno.EEXIST, f"The target holds other files, such as {others[0]}, and is not replaced", self._name
            )

    def _make(self) -> None:
        os.mkdir(self._part)
        try:
            self._fd = os.open(self._part, self.flags)
        except FileNotFoundError:  # a rival took it for a leftover before it could be locked
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self._part) from None

    def _is_new(self) -> bool:
        return set(self._names).isdisjoint(os.listdir(self._fd))

    def _remove(self, path: str) -> None:
        with contextlib.suppress(OSError):  # not ours; the rest will tell
            os.chmod(path, stat.S_IRWXU)  # a folder may have been made read-only
        shutil.rmtree(path)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[_FileWriter]:
        """Give a file of this name in the folder, to be written within a ``with`` block."""
        inside = os.path.join(self._part, name)
        fd = -1
        try:
            fd = os.open(inside, FLAGS | os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            writer = _FileWriter(fd)
            yield writer
            writer.finish(fsync=self._fsync)
            fd, closing = -1, fd
            os.close(closing)
        except OSError as error:
            if error.filename in (None, inside):
                error.filename = os.path.join(self.path, name)
            raise
        finally:
            if fd >= 0:
                os.close(fd)

    def _take_free_name_by_other_means(self) -> None:
        if system.is_there(self.path):
            raise FileExistsError(errno.EEXIST, EXISTS)
        try:
            os.rename(self._part, self.path)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY:  # it has appeared since
                raise FileExistsError(errno.EEXIST, EXISTS) from None
            raise

    def _set_aside(self) -> None:
        os.rename(self.path, self._aside)
        os.rename(self._part, self.path)

    def _put_back(self, old: str, free: str) -> None:
        try:
            os.rename(self.path, free)
            os.rename(old, self.path)
        except OSError:
            if not system.is_there(self.path):
                os.rename(free, self.path)  # rather the new one than nothing
            raise

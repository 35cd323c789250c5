"""Outputs that appear whole or not at all.

The bytes go to a temporary file beside the target, ``.<name>.<n>.ggcl_fast-part``, which takes the target's place
in one step at the end.  The writer holds a lock on its temporary file for as long as it lives, so one without a lock
is the leftover of a process that was killed, and the next run for the same target takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Final, TypeVar

from .sources import Source, StrPath

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be unlinked anyway
    fcntl = None  # type: ignore[assignment]

__all__ = ["LONGEST_GATHER", "OutputFile", "OutputFiles", "OutputFolder", "check_folder", "check_target"]

LONGEST_GATHER: Final = 1024  # pieces that one os.writev takes on Linux and macOS
_SUFFIX: Final = ".ggcl_fast-part"
_OLD: Final = "-old"  # behind it, for a folder that is set aside
_FLAGS: Final = (
    os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
)  # fmt: skip
_FOLDER_FLAGS: Final = (
    os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_DIRECTORY", 0)
)  # fmt: skip


def check_target(source: Source, target: StrPath, *, force: bool, parents: bool = False) -> str:
    """Return the path that writing to `target` would create, symbolic links followed as `cp` follows them.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        There is no folder to write it into, and `parents` is false.
    FileExistsError
        There is such a file and `force` is false, or it is not a regular file.
    IsADirectoryError
        It is a folder.
    shutil.SameFileError
        It is `source` itself, under whatever name.
    """
    path = os.path.realpath(target)
    try:
        status = os.stat(path)
    except FileNotFoundError:
        folder = os.path.dirname(path)
        if not os.path.isdir(folder) and not (parents and not os.path.exists(folder)):
            missing = errno.ENOTDIR if os.path.exists(folder) else errno.ENOENT
            raise OSError(missing, "The target's folder is not there", os.fspath(target)) from None
        return path
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "The target is a folder", os.fspath(target))
    if source.is_file(status):
        raise shutil.SameFileError(errno.EINVAL, "Source and target are the same file", os.fspath(target))
    if not stat.S_ISREG(status.st_mode):
        raise FileExistsError(errno.EEXIST, "The target exists and is not a regular file", os.fspath(target))
    if not force:
        raise FileExistsError(
            errno.EEXIST, "The target exists; use --force (force=True) to replace it", os.fspath(target)
        )
    return path


class _Output:
    """What a file and a folder have in common: a temporary one with a lock, which takes the place of the target."""

    _fd = -1
    _part = ""

    def __init__(self, path: str, *, fsync: bool = False, parents: bool = False) -> None:
        self.path = path
        self.nbytes = 0
        """Bytes written so far."""
        self._fsync = fsync
        self._parents = parents

    def __enter__(self: _T) -> _T:
        try:
            with self._naming_the_target():
                self._create()
        except BaseException:
            self._discard()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                with self._naming_the_target():
                    self._commit()
        finally:
            self._discard()

    def __del__(self) -> None:
        if self._part:  # an interrupt came on the threshold of the block: neither in it nor out of it
            self._discard()

    @contextlib.contextmanager
    def _naming_the_target(self) -> Iterator[None]:
        """Make an `OSError` tell of the target: the user knows nothing of a temporary name."""
        try:
            yield
        except OSError as error:
            error.filename, error.filename2 = self.path, None
            raise

    def _create(self) -> None:
        """Make the temporary one and lock it, in the place of a leftover where there is one."""
        folder, name = os.path.split(self.path)
        if self._parents:
            os.makedirs(folder, exist_ok=True)
        short = os.fsdecode(os.fsencode(name)[:200])  # names end at 255 bytes on common file systems
        for number in itertools.count():
            self._part = os.path.join(folder, f".{short}.{number}{_SUFFIX}")
            while True:
                try:
                    self._make()
                except FileExistsError:
                    if not self._reclaim():
                        break  # somebody is writing it: take the next number
                    continue
                if self._fd < 0 or (_lock(self._fd) is not False and _is_linked(self._fd, self._part)):
                    return
                self._close()  # another run took it for a leftover before it was locked

    def _close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)

    def _make(self) -> None:
        """Make `_part` and open it; `FileExistsError` where it is there."""
        raise NotImplementedError

    def _reclaim(self) -> bool:
        """Remove `_part` if nobody writes it; false where somebody does, or it is not ours to remove."""
        raise NotImplementedError

    def _commit(self) -> None:
        """Let it take the target's place."""
        raise NotImplementedError

    def _discard(self) -> None:
        """Remove what is still temporary.  Can be called again at any point."""
        raise NotImplementedError


_T = TypeVar("_T", bound=_Output)


class OutputFile(_Output):
    """A file that comes into being when its ``with`` block ends well, and leaves nothing behind when it does not.

    Parameters
    ----------
    path
        The target, as `check_target` returned it.
    fsync
        Make the file, then its folder, reach the disk before the block ends.
    parents
        Make the folders above it where they are missing.
    """

    _reserved = 0

    def _make(self) -> None:
        self._fd = os.open(self._part, _FLAGS | os.O_CREAT | os.O_EXCL, 0o666)

    def _reclaim(self) -> bool:
        return _remove_abandoned(self._part)

    def preallocate(self, nbytes: int) -> None:
        """Reserve `nbytes`, so that a full disk shows before the work and the blocks lie together; where supported."""
        if hasattr(os, "posix_fallocate"):
            self._reserved = nbytes
            try:
                with self._naming_the_target():
                    os.posix_fallocate(self._fd, 0, nbytes)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENODEV):
                    raise

    def writev(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Append `pieces`, at most `LONGEST_GATHER` of them, in order and without copying them together."""
        total = sum(map(len, pieces))
        self.nbytes += total
        with self._naming_the_target():
            written = os.writev(self._fd, pieces) if hasattr(os, "writev") else 0
            if written < total:  # a short write, rare on disks
                self._write_rest(pieces, written)

    def _write_rest(self, pieces: Sequence[bytes | memoryview], written: int) -> None:
        """Write what follows the first `written` bytes of `pieces`, one piece after the other."""
        for piece in pieces:
            if written >= len(piece):
                written -= len(piece)
                continue
            rest = memoryview(piece)[written:]
            written = 0
            while rest:
                n = os.write(self._fd, rest)
                if n == 0:
                    raise OSError(errno.EIO, "Nothing could be written")
                rest = rest[n:]

    def _commit(self) -> None:
        self._finish()
        self._place()

    def _finish(self) -> None:
        """Make the temporary file what the target shall be."""
        if self.nbytes < self._reserved:
            os.ftruncate(self._fd, self.nbytes)
        if self._fsync:
            os.fsync(self._fd)

    def _place(self) -> None:
        """Let the temporary file take the target's place."""
        if fcntl is None:  # Windows does not rename an open file
            self._close()
            os.replace(self._part, self.path)
            return
        # Some network file systems report a failed write only at close; the lock must outlive the rename.
        os.close(os.dup(self._fd))
        if not _is_linked(self._fd, self._part):
            raise FileNotFoundError(errno.ENOENT, "The temporary file was removed by somebody else")
        if self._fsync:
            folder = os.open(os.path.dirname(self.path), os.O_RDONLY)
            try:
                os.replace(self._part, self.path)
                os.fsync(folder)
            finally:
                os.close(folder)
        else:
            os.replace(self._part, self.path)

    def _discard(self) -> None:
        try:
            if self._fd < 0:
                # An interrupt may have come between the file's creation and our knowing of it.
                if self._part:
                    _remove_abandoned(self._part)
            elif fcntl is not None and _is_linked(self._fd, self._part):
                os.unlink(self._part)
        finally:
            self._close()
            if fcntl is None and self._part:
                _remove_abandoned(self._part)
        self._part = ""


class OutputFiles:
    """Files that come into being together when the ``with`` block ends well: all of them or none.

    They take their places one after the other when the last byte of all is written.  Where that fails in between, the
    files that are in place already are removed again, unless they have replaced others; those stay, whole and new.

    Parameters
    ----------
    paths
        The targets, as `check_target` returned them, in the order in which they appear.
    fsync
        Make the files, then their folders, reach the disk before the block ends.
    parents
        Make the folders above them where they are missing.
    """

    def __init__(self, paths: Sequence[str], *, fsync: bool = False, parents: bool = False) -> None:
        self.files = [OutputFile(path, fsync=fsync, parents=parents) for path in paths]
        """The files, open for writing within the block."""

    def __enter__(self) -> list[OutputFile]:
        try:
            for file in self.files:
                file.__enter__()
        except BaseException:
            self._discard()
            raise
        return self.files

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
        finally:
            self._discard()

    def _commit(self) -> None:
        for file in self.files:
            with file._naming_the_target():
                file._finish()
        new: list[OutputFile] = []
        try:
            for file in self.files:
                if not os.path.lexists(file.path):
                    new.append(file)  # before it is there: an interrupt may come in between
                with file._naming_the_target():
                    file._place()
        except BaseException:
            for file in new:
                if fcntl is None or _is_linked(file._fd, file.path):
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(file.path)
            raise

    def _discard(self) -> None:
        for file in self.files:
            file._discard()


def check_folder(sources: Sequence[Source], target: StrPath, names: Sequence[str], *, force: bool) -> str:
    """Return the path that a folder `target` would have, symbolic links followed.

    Raises
    ------
    FileNotFoundError, NotADirectoryError
        There is no folder to make it in, or `target` is a file.
    FileExistsError
        There is such a folder and `force` is false, or it holds other files than `names`.
    shutil.SameFileError
        It is one of `sources`.
    """
    path = os.path.realpath(target)
    for source in sources:
        if not os.path.isdir(path):
            with contextlib.suppress(FileExistsError):
                check_target(source, path, force=force)
    if not os.path.lexists(path):
        return path
    if not os.path.isdir(path):
        raise NotADirectoryError(errno.ENOTDIR, "The target is to be a folder, and is a file", os.fspath(target))
    if not force:
        raise FileExistsError(
            errno.EEXIST, "The target exists; use --force (force=True) to replace it", os.fspath(target)
        )
    if others := sorted(set(os.listdir(path)) - set(names)):
        raise FileExistsError(
            errno.EEXIST, f"The target holds other files, such as {others[0]}, and is not replaced", os.fspath(target)
        )
    return path


class OutputFolder(_Output):
    """A folder of files that comes into being when its ``with`` block ends well, and leaves nothing when it does not.

    It is filled under a temporary name beside the target, ``.<name>.<n>.ggcl_fast-part``, with a lock as `OutputFile`
    has one.  A folder that is in the target's place is set aside, and removed when the new one is in place.

    Parameters
    ----------
    path
        The target, as `check_folder` returned it.
    fsync
        Make the files, then their folders, reach the disk before the block ends.
    parents
        Make the folders above them where they are missing.
    """

    _aside = ""

    def _create(self) -> None:
        super()._create()
        self._aside = self._part + _OLD
        if os.path.isdir(self._aside) and not os.path.lexists(self.path):  # a process was killed between two renames
            self._settle_old()
            raise FileExistsError(
                errno.EEXIST, "The folder that a killed run had set aside is back; look, then try again"
            )
        self._settle_old()

    def _settle_old(self) -> None:
        """Put an old folder back where no new one took its place, and remove it where one did."""
        if self._aside and os.path.isdir(self._aside):
            if os.path.lexists(self.path):
                shutil.rmtree(self._aside)
            else:
                os.rename(self._aside, self.path)

    def _make(self) -> None:
        os.mkdir(self._part)
        if fcntl is not None:
            self._fd = os.open(self._part, _FOLDER_FLAGS)

    def _reclaim(self) -> bool:
        return _remove_abandoned_folder(self._part)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[OutputFile]:
        """Give a file of this name in the folder, to be written within a ``with`` block."""
        inside = os.path.join(self._part, name)
        try:
            with OutputFile(inside, fsync=self._fsync) as output:
                yield output
        except OSError as error:
            if error.filename == inside:
                error.filename = os.path.join(self.path, name)
            raise
        self.nbytes += output.nbytes

    def _commit(self) -> None:
        if self._fsync and self._fd >= 0:
            os.fsync(self._fd)
        if os.path.isdir(self.path):
            # No system call at hand exchanges two folders; the old one is out of its place for this moment.
            self._aside = self._part + _OLD
            os.rename(self.path, self._aside)
        os.rename(self._part, self.path)
        if self._fsync and fcntl is not None:
            folder = os.open(os.path.dirname(self.path), os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _discard(self) -> None:
        try:
            self._settle_old()
            if self._fd >= 0:
                if _is_linked(self._fd, self._part):
                    shutil.rmtree(self._part)
            elif self._part:
                _remove_abandoned_folder(self._part)
        finally:
            self._close()
        self._part = self._aside = ""


def _remove_abandoned_folder(path: str) -> bool:
    """Do for a temporary folder what `_remove_abandoned` does for a file."""
    if fcntl is None:
        shutil.rmtree(path, ignore_errors=True)
        return not os.path.lexists(path)
    return _remove_unlocked(path, _FOLDER_FLAGS, shutil.rmtree)


def _lock(fd: int) -> bool | None:
    """Take the lock that marks a temporary file as alive; false: somebody holds it, None: there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return None
    return True


def _is_linked(fd: int, path: str) -> bool:
    """Tell whether `path` is still the open file `fd`."""
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove_abandoned(path: str) -> bool:
    """Remove the temporary file `path` if nobody writes it; false where somebody does, or it is not ours to remove."""
    if fcntl is None:
        with contextlib.suppress(FileNotFoundError):
            try:
                os.unlink(path)
            except PermissionError:
                return False
        return True
    return _remove_unlocked(path, _FLAGS, os.unlink)


def _remove_unlocked(path: str, flags: int, remove: Callable[[str], object]) -> bool:
    """Open `path` with `flags` and remove it if nobody has its lock; returns as `_remove_abandoned` does."""
    try:
        fd = os.open(path, flags)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        abandoned = _lock(fd) is True
        if abandoned and _is_linked(fd, path):
            remove(path)
        return abandoned
    except PermissionError:
        return False
    finally:
        os.close(fd)

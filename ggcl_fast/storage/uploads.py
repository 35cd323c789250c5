"""Objects as outputs: they come into being when they are whole."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from typing import Any, Final

from .places import EXISTS
from .stores import as_os_errors, filesystem, remote_exists
from .urls import LINK, public_name

__all__ = ["OutputRemote"]

_PART: Final = 16 << 20  # bytes of a part of an upload; S3 takes 10,000 parts


class OutputRemote:
    """An object that comes into being within `Outputs`, by itself: stores have nothing that makes two appear together.

    On stores with multipart uploads the upload is completed at the end, and aborted where it does not come to that.
    Where the store's library knows no such thing, a temporary name takes its place and is renamed.

    Without `force` the store is asked to take the object only where there is none, which S3 does in one step.  Stores
    that cannot are asked whether there is one just before; an object that appears in that moment is lost.

    Parameters
    ----------
    url
        The target.
    force
        Replace what is there.

    Raises
    ------
    FileExistsError
        There is such an object and `force` is false.
    OSError
        The store cannot be reached or refuses, or `url` is a chain of several.
    """

    def __init__(self, url: str, *, force: bool = False) -> None:
        self._url = url
        self.path = public_name(url)
        self.nbytes = 0
        """Bytes written so far."""
        self._force = force
        self._file: Any = None
        self._temporary = ""
        self._exclusive = False  # whether the store sees to it that nothing is replaced
        self._process = os.getpid()
        if LINK in url:
            raise OSError(errno.EOPNOTSUPP, "A chain of URLs can be read, and not written", self.path)
        self._store, self._target = filesystem(url)
        self._check_free()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.path!r}>"

    def _check_free(self) -> None:
        if not self._force and remote_exists(self._url):
            raise FileExistsError(errno.EEXIST, EXISTS, self.path)

    def create(self) -> None:
        """Begin an upload that nobody sees yet."""
        folder, _, name = self._target.rpartition("/")
        self._temporary = f"{folder}/.{name}.{os.urandom(4).hex()}.ggcl_fast-part"
        with as_os_errors(self._url):
            # Opening may already make or empty a file, so that it is tried on the temporary name.
            self._file = self._open(self._temporary)
            if _can_be_discarded(self._file):
                _abandon(self._file)
                self._temporary = ""
                self._file = self._open(self._target)

    def _open(self, path: str) -> Any:
        options = {"block_size": _PART, "autocommit": False}
        if not self._force:
            with contextlib.suppress(ValueError, TypeError, NotImplementedError):  # a store that knows no such mode
                file = self._store.open(path, "xb", **options)
                self._exclusive = path == self._target
                return file
        return self._store.open(path, "wb", **options)

    def file(self, name: str) -> contextlib.AbstractContextManager[OutputRemote]:  # noqa: ARG002
        """Give itself, whatever the name."""
        return contextlib.nullcontext(self)

    def preallocate(self, nbytes: int) -> None:
        """Do nothing: stores take what comes."""

    def writev(self, pieces: Sequence[bytes | memoryview]) -> None:
        """Append `pieces`."""
        with as_os_errors(self._url):
            for piece in pieces:
                self._file.write(piece)
                self.nbytes += len(piece)

    def finish(self) -> None:
        """Do nothing: there is one step, `take`."""

    def take(self, *, last: bool) -> None:
        """Complete the upload."""
        if not last:
            raise OSError(errno.EOPNOTSUPP, "An object cannot appear together with other outputs", self.path)
        if not self._exclusive:
            self._check_free()
        try:
            with as_os_errors(self._url):
                self._file.close()
                if self._temporary:
                    self._store.mv(self._temporary, self._target)
                else:
                    self._file.commit()
        except FileExistsError:
            raise FileExistsError(errno.EEXIST, EXISTS, self.path) from None
        self._file = None

    def sync(self) -> None:
        """Do nothing: stores answer when it is safe."""

    def give_back(self) -> None:
        """Do nothing: nothing comes after `take` that could fail."""

    def discard(self) -> None:
        """Undo what was not completed, as far as the store lets us."""
        file, self._file = self._file, None
        if file is None or self._process != os.getpid():
            return
        with contextlib.suppress(Exception):  # what led here is what the user wants to know
            if self._temporary:
                file.close()
                self._store.rm(self._temporary)
            else:
                _abandon(file)


def _can_be_discarded(file: Any) -> bool:
    """Tell whether `file` becomes visible only when it is committed."""
    from fsspec.spec import AbstractBufferedFile

    commit = getattr(type(file), "commit", None) or getattr(file, "commit", None)
    return commit is not None and commit is not AbstractBufferedFile.commit


def _abandon(file: Any) -> None:
    file.discard()
    with contextlib.suppress(AttributeError):
        file.closed = True  # or its finalizer would upload after all

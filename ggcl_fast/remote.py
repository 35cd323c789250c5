"""Object stores, and whatever else fsspec reaches: sources read by ranges, outputs that appear when they are whole.

The records of a checkpoint lie between its tensors, so that reading one after the other would cost a round trip each;
`SourceRemote.prefetch` fetches the places where they are expected together.  Payload is streamed, a block ahead of the
reader.  Credentials are fsspec's business: what a URL holds of them never reaches a name or a message.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import os
import re
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Final

from .errors import SourceChangedError
from .sources import SMALL, public_name

__all__ = [
    "RemoteOutput",
    "SourceRemote",
    "filesystem",
    "first_bytes",
    "list_objects",
    "remote_exists",
]

_BLOCK: Final = 8 << 20  # bytes of a request for payload; three of them are held
_PART: Final = 16 << 20  # bytes of a part of an upload; S3 takes 10,000 parts
_WINDOW: Final = 1 << 16  # bytes of a request for a record that was not where it was expected
_HEAD: Final = 512  # bytes that the fixed part, dims and name of a sound record fit in
_GAP: Final = 1 << 16  # bytes that are rather read along than skipped
_LONGEST: Final = 1 << 20  # bytes of one prefetched range
_MOST: Final = 32 << 20  # bytes of all of them


def filesystem(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for `url`, and the path in it.

    Raises
    ------
    OSError
        fsspec, or what it needs for this kind of URL, is not installed, or knows no such kind.
    """
    try:
        import fsspec
    except ImportError:
        raise OSError(errno.ENOPKG, "URLs need fsspec: pip install 'ggcl_fast[remote]'", public_name(url)) from None
    with _as_os_errors(url):
        try:
            found: tuple[Any, str] = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
            raise OSError(errno.EPROTONOSUPPORT, str(error)) from None
    return found


@contextlib.contextmanager
def _as_os_errors(url: str) -> Iterator[None]:
    """Turn whatever a store's library raises into an `OSError` that names the URL and tells no secret."""
    name = public_name(url)
    try:
        yield
    except SourceChangedError:
        raise
    except Exception as error:
        told = isinstance(error, OSError) and error.errno and error.strerror
        number = error.errno if isinstance(error, OSError) and error.errno else _number(error)
        words = error.strerror if isinstance(error, OSError) and told else os.strerror(number)
        if not told:  # an errno of our choice says little: add what the library said
            cause = error.__cause__ or error
            words = f"{words} ({type(cause).__name__}: {_without_secrets(str(cause), url)})"
        raise OSError(number, words, name) from None


def _number(error: Exception) -> int:
    for kind, number in (
        (FileNotFoundError, errno.ENOENT), (PermissionError, errno.EACCES), (FileExistsError, errno.EEXIST),
        (TimeoutError, errno.ETIMEDOUT), (NotImplementedError, errno.ENOSYS),
    ):  # fmt: skip
        if isinstance(error, kind):
            return number
    return errno.EIO


def _without_secrets(text: str, url: str) -> str:
    for secret in filter(None, (url, *re.split(r"[?#]", url)[1:], url.partition("://")[2].rpartition("@")[0])):
        text = text.replace(secret, public_name(url) if secret == url else "...")
    return re.sub(r"(?<=://)[^/\s@]+@|\?\S+", "...", text)


class SourceRemote:
    """An object that fsspec can read by ranges.  Raises `OSError` where there is none or its size is not told."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.name = public_name(url)
        self._fs, self._path = filesystem(url)
        self._file: Any = None
        self._starts: list[int] = []
        self._fetched: list[bytes] = []
        with _as_os_errors(url):
            self._info = self._fs.info(self._path)
        if self._info.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.name)
        if self._info.get("size") is None:
            raise OSError(
                errno.ESPIPE, "The server does not tell its size, so that it cannot be read by ranges", self.name
            )
        self.size = int(self._info["size"])
        self.far = self.size > SMALL
        self.memory: memoryview | None = None if self.far else memoryview(self._range(0, self.size))

    def _range(self, start: int, stop: int) -> bytes:
        with _as_os_errors(self._url):
            data: bytes = self._fs.cat_file(self._path, start=start, end=stop) if stop > start else b""
        if len(data) != stop - start:
            raise self._changed(f"bytes {start} to {stop} were asked for, and {len(data)} came")
        return data

    def _changed(self, how: str) -> SourceChangedError:
        return SourceChangedError(f"the object changed while it was read: {how}", source=self.name)

    def prefetch(self, offsets: Sequence[int]) -> None:
        """Fetch what is at `offsets`, ascending, in as few requests as reading some gaps along allows, together."""
        if self.memory is not None:
            return
        ranges: list[list[int]] = []
        for offset in offsets:
            start, stop = min(offset, self.size) & ~3, min(offset + _HEAD, self.size)
            if start >= stop:
                break
            if ranges and start <= ranges[-1][1] + _GAP and stop - ranges[-1][0] <= _LONGEST:
                ranges[-1][1] = max(stop, ranges[-1][1])
            else:
                ranges.append([start, stop])
        total = 0
        for i, (start, stop) in enumerate(ranges):
            total += stop - start
            if total > _MOST:
                del ranges[i:]
                break
        with _as_os_errors(self._url):
            starts, stops = [list(ends) for ends in zip(*ranges)] or ([], [])
            found = self._fs.cat_ranges([self._path] * len(starts), starts, stops, on_error="raise")
        for (start, stop), data in zip(ranges, found):
            if len(data) != stop - start:
                raise self._changed(f"bytes {start} to {stop} were asked for, and {len(data)} came")
        self._starts, self._fetched = starts, [bytes(data) for data in found]

    def window(self, offset: int) -> tuple[int, memoryview]:
        """Return a fetched range around `offset`, or fetch one."""
        if self.memory is not None:
            return 0, self.memory
        needed = min(offset + _HEAD, self.size)
        i = bisect.bisect_right(self._starts, offset) - 1
        if i < 0 or self._starts[i] + len(self._fetched[i]) < needed:
            start = offset & ~3
            i = bisect.bisect_left(self._starts, start)
            data = self._range(start, min(start + _WINDOW, self.size))
            if sum(map(len, self._fetched)) > _MOST:
                self._starts, self._fetched, i = [], [], 0
            self._starts.insert(i, start)
            self._fetched.insert(i, data)
        return self._starts[i], memoryview(self._fetched[i])

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset` on: little things from a window, payload from a stream.  Not for two threads."""
        if len(buffer) <= _HEAD:
            start, window = self.window(offset)
            buffer[:] = window[offset - start : offset - start + len(buffer)]
            return
        with _as_os_errors(self._url):
            if self._file is None:
                self._file = self._fs.open(
                    self._path, "rb", block_size=_BLOCK, cache_type="background", cache_options={"maxblocks": 3}
                )
            self._file.seek(offset)
            got = 0
            while got < len(buffer):
                data = self._file.read(len(buffer) - got)
                if not data:
                    raise self._changed(f"it had {self.size} bytes, and now ends at {offset + got}")
                buffer[got : got + len(data)] = data
                got += len(data)

    def map(self) -> memoryview:
        """Return all bytes, which are fetched for it."""
        return self.memory if self.memory is not None else memoryview(self._range(0, self.size))

    def check_unchanged(self) -> None:
        """Compare size, ETag and time of change with those at the start, where the store tells them."""
        with _as_os_errors(self._url):
            self._fs.invalidate_cache(self._path)
            now = self._fs.info(self._path)
        for fact in ("size", "ETag", "LastModified", "mtime", "created", "modified"):
            if now.get(fact) != self._info.get(fact):
                raise self._changed(f"its {fact} is another")

    def is_file(self, status: os.stat_result) -> bool:  # noqa: ARG002
        """Return false."""
        return False

    def close(self) -> None:
        """Let go of what was fetched."""
        if self._file is not None:
            self._file.close()
        self.memory, self._starts, self._fetched = None, [], []


def remote_exists(url: str) -> bool:
    """Tell whether there is something at `url`."""
    fs, path = filesystem(url)
    with _as_os_errors(url):
        fs.invalidate_cache(fs._parent(path))
        return bool(fs.exists(path))


def list_objects(url: str, *, recursive: bool) -> list[tuple[str, int]]:
    """Return the objects below `url`, which ends with a slash: their names below it, sorted, and their sizes."""
    fs, path = filesystem(url)
    root = path.rstrip("/") + "/"
    with _as_os_errors(url):
        objects = fs.find(root, maxdepth=None if recursive else 1, detail=True)
    files = ((name, info) for name, info in sorted(objects.items()) if info.get("type") != "directory")
    return [(name.removeprefix(root), int(info.get("size") or 0)) for name, info in files]


def first_bytes(url: str, n: int) -> bytes:
    """Return the first `n` bytes of the object at `url`, fewer where it is shorter."""
    fs, path = filesystem(url)
    with _as_os_errors(url):
        return bytes(fs.cat_file(path, start=0, end=n))


def _can_be_discarded(file: Any) -> bool:
    """Tell whether `file` becomes visible only when it is committed."""
    from fsspec.spec import AbstractBufferedFile

    commit = getattr(type(file), "commit", None) or getattr(file, "commit", None)
    return commit is not None and commit is not AbstractBufferedFile.commit


def _abandon(file: Any) -> None:
    file.discard()
    with contextlib.suppress(AttributeError):
        file.closed = True  # or its finalizer would upload after all


class RemoteOutput:
    """An object that comes into being when its ``with`` block ends well.

    On stores with multipart uploads the upload is completed only then, and aborted otherwise.  Where the store's
    library knows no such thing, a temporary name takes its place and is renamed.

    Parameters
    ----------
    url
        The target.
    source
        The source, which it must not be.
    force
        Replace what is there.

    Raises
    ------
    FileExistsError
        There is such an object and `force` is false, or it is the source itself.
    OSError
        The store cannot be reached or refuses.
    """

    def __init__(self, url: str, source: Any, *, force: bool) -> None:
        self._url = url
        self.path = public_name(url)
        self.nbytes = 0
        """Bytes written so far."""
        self._fs, self._target = filesystem(url)
        if isinstance(source, SourceRemote) and (source._fs, source._path) == (self._fs, self._target):
            raise FileExistsError(errno.EEXIST, "Source and target are the same object", self.path)
        if not force and remote_exists(url):
            raise FileExistsError(
                errno.EEXIST, "The target exists; use --force (force=True) to replace it", self.path
            )  # fmt: skip
        self._file: Any = None
        self._temporary = ""

    def __enter__(self) -> RemoteOutput:
        folder, _, name = self._target.rpartition("/")
        self._temporary = f"{folder}/.{name}.ggcl_fast-part"
        with _as_os_errors(self._url):
            # Opening may already make or empty a file, so that it is tried on the temporary name.
            self._file = self._fs.open(self._temporary, "wb", block_size=_PART, autocommit=False)
            if _can_be_discarded(self._file):
                _abandon(self._file)
                self._temporary = ""
                self._file = self._fs.open(self._target, "wb", block_size=_PART, autocommit=False)
        return self

    def preallocate(self, nbytes: int) -> None:
        """Do nothing: stores take what comes."""

    def writev(self, pieces: Sequence[bytes | memoryview], /) -> None:
        """Append `pieces`."""
        with _as_os_errors(self._url):
            for piece in pieces:
                self._file.write(piece)
                self.nbytes += len(piece)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        done = False
        try:
            if error is None:
                with _as_os_errors(self._url):
                    self._file.close()
                    if self._temporary:
                        self._fs.mv(self._temporary, self._target)
                    else:
                        self._file.commit()
                done = True
        finally:
            if not done:
                self._discard()

    def _discard(self) -> None:
        """Undo as far as the store lets us; what led here is what the user wants to know."""
        with contextlib.suppress(Exception):
            if self._temporary:
                self._file.close()
                self._fs.rm(self._temporary)
            else:
                _abandon(self._file)

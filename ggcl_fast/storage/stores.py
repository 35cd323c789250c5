"""Object stores, and whatever else fsspec reaches, as far as sources and outputs share it.

Credentials are fsspec's business: what a URL holds of them never reaches a name or a message.  Whatever a store's
library raises comes out of here as an `OSError` that says what the server said.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from typing import Any, Final

from ..errors import CheckpointError
from .urls import public_name

__all__ = ["as_os_errors", "filesystem", "first_bytes", "list_objects", "remote_exists"]

_FAILURE: Final = 400  # the first of HTTP's statuses that is one
_STATUSES: Final = {
    401: errno.EACCES, 403: errno.EACCES, 404: errno.ENOENT, 407: errno.EACCES, 408: errno.ETIMEDOUT,
    410: errno.ENOENT, 429: errno.EAGAIN, 504: errno.ETIMEDOUT,
}  # fmt: skip


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
        raise OSError(errno.ENOPKG, "URLs need fsspec: pip install 'fsspec[http]'", public_name(url)) from None
    with as_os_errors(url):
        try:
            store, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:  # no such protocol, or its package is missing
            raise OSError(errno.EPROTONOSUPPORT, _without_secrets(str(error), url)) from None
    return store, path


@contextlib.contextmanager
def as_os_errors(url: str) -> Iterator[None]:
    """Turn whatever a store's library raises into an `OSError` that names the URL and tells no secret."""
    name = public_name(url)
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        status = _status(error)
        told = isinstance(error, OSError) and error.errno and error.strerror and status is None
        number = _number(error, status)
        words = str(error.strerror) if isinstance(error, OSError) and told else os.strerror(number)
        if not told:  # an errno of our choice says little: add what the library said
            cause = error.__cause__ or error
            words = "URLs of this kind cannot do that" if isinstance(error, NotImplementedError) else words
            words = f"{words} ({type(cause).__name__}: {_without_secrets(str(cause), url)})"
        raise OSError(number, words, name) from None


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that a server answered with, None where none is known: fsspec buries it in causes."""
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(seen, "status", None)
        if isinstance(status, int) and status >= _FAILURE:
            return status
        seen = seen.__cause__
    return None


def _number(error: Exception, status: int | None) -> int:
    if status is not None:
        return _STATUSES.get(status, errno.EIO)
    cause = error.__cause__
    if isinstance(error, FileNotFoundError) and isinstance(cause, OSError) and cause.errno:
        return cause.errno  # what could not be reached is not told to be missing
    for one, number in (
        (FileNotFoundError, errno.ENOENT), (PermissionError, errno.EACCES), (FileExistsError, errno.EEXIST),
        (TimeoutError, errno.ETIMEDOUT), (NotImplementedError, errno.ENOSYS),
    ):  # fmt: skip
        if isinstance(error, one):
            return error.errno or number if isinstance(error, OSError) else number
    return (isinstance(error, OSError) and error.errno) or errno.EIO


def _without_secrets(text: str, url: str) -> str:
    """Return what a library said without what `url` has that is secret."""
    for secret in filter(None, (url, *re.split(r"[?#]", url)[1:], url.partition("://")[2].rpartition("@")[0])):
        text = text.replace(secret, public_name(url) if secret == url else "...")
    return re.sub(r"(?<=://)[^/\s@]+@|\?\S+", "...", text)


def remote_exists(url: str) -> bool:
    """Tell whether there is something at `url`."""
    fs, path = filesystem(url)
    with as_os_errors(url):
        fs.invalidate_cache(fs._parent(path))
        return bool(fs.exists(path))


def list_objects(url: str, *, recursive: bool) -> list[tuple[str, int]]:
    """Return the objects below `url`, which ends with a slash: their names below it, sorted, and their sizes."""
    fs, path = filesystem(url)
    root = path.rstrip("/") + "/"
    with as_os_errors(url):
        objects = fs.find(root, maxdepth=None if recursive else 1, detail=True)
    files = ((name, info) for name, info in sorted(objects.items()) if info.get("type") != "directory")
    return [(name.removeprefix(root), int(info.get("size") or 0)) for name, info in files]


def first_bytes(url: str, n: int) -> bytes:
    """Return the first `n` bytes of the object at `url`, fewer where it is shorter."""
    fs, path = filesystem(url)
    with as_os_errors(url):
        if "http" in fs.protocol:  # a stream that is let go of: a server may have no byte ranges
            with fs.open(path, "rb", block_size=0) as file:
                return bytes(file.read(n))
        return bytes(fs.cat_file(path, start=0, end=n))

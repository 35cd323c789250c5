"""A source of bytes by its name, wherever they are."""

from __future__ import annotations

from .sources import Source, SourceFile
from .streams import is_pipe, read_pipe
from .urls import StrPath, is_url, located

__all__ = ["open_source"]


def open_source(path: StrPath) -> Source:
    """Return the bytes at `path`, a file on a local disk, a URL or a pipe, which is read whole; raises `OSError`."""
    name = located(path)
    if is_url(name):
        from .remote import SourceRemote

        return SourceRemote(name)
    if is_pipe(name):
        return read_pipe(name)
    return SourceFile(name)

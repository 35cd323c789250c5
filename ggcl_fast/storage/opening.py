"""A source of bytes by its name, wherever they are."""

from __future__ import annotations

from .sources import Source, SourceFile
from .urls import StrPath, is_url, located

__all__ = ["open_source"]


def open_source(path: StrPath) -> Source:
    """Return the bytes at `path`, a file on a local disk or a URL; raises `OSError`."""
    name = located(path)
    if is_url(name):
        from .remote import SourceRemote

        return SourceRemote(name)
    return SourceFile(name)

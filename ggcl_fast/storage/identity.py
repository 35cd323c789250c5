"""Which names are one file, and that nothing a run reads or writes is written by another part of it.

A file is the same under every name: through links, as a ``file://`` URL, with ``./`` in its path.  An object is the
same whoever asks for it.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from typing import Final, Protocol

from .urls import StrPath, is_url, located, public_name

__all__ = ["Claims", "Identified", "identities", "inode", "is_one_file"]

_INODE: Final = ("inode",)
_LOOKS: Final = 3  # where two names seem to be one file: inodes are given out anew when a rival replaces what is there
_ALIASES: Final = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfss": "abfs", "adl": "abfs", "az": "abfs"}


def identities(name: StrPath) -> Iterator[tuple[object, ...]]:
    """Yield all that tells the file or object `name` from others; two names of one thing share one of them at least.

    For a path: where it leads, and device and inode where it is there, whatever links lead to it.  For a URL: protocol
    and normalized path of each link of the chain.  Nothing is opened and no store is asked.
    """
    text = located(name)
    if is_url(text):
        for link in text.split("::"):
            if "://" in link and (local := located(link)) != link:
                yield from identities(local)
            elif "://" in link:
                protocol, _, rest = link.partition("://")
                path = posixpath.normpath("/" + re.split(r"[?#]", rest)[0].rpartition("@")[2])
                yield _ALIASES.get(protocol.lower(), protocol.lower()), path
        return
    folder, last = os.path.split(os.path.abspath(text))
    try:
        path = os.path.join(os.path.realpath(folder), last)
        status = os.lstat(path)
        if stat.S_ISLNK(status.st_mode):
            path = os.path.realpath(path)
            status = os.stat(path)
        yield inode(status)
    except OSError:  # it is not there: nothing but its name tells
        pass
    except ValueError:  # a NUL in it: opening it will tell
        path = text
    yield (path,)


def is_one_file(one: StrPath, other: StrPath) -> bool:
    """Tell whether two paths are names of one file on a local disk."""
    try:
        return os.path.samefile(located(one), located(other))
    except (OSError, ValueError):
        return False


def inode(status: os.stat_result) -> tuple[object, ...]:
    """Return what tells a file on a local disk from others, whatever links lead to it."""
    return *_INODE, status.st_dev, status.st_ino


class Identified(Protocol):
    """Something open, that knows what it is whatever has become of its name."""

    name: str
    identity: frozenset[tuple[object, ...]]
    """As of `identities`."""


class Claims:
    """What a run reads and writes: no output may be an input, or another output.  Some 100 bytes for each name."""

    def __init__(self) -> None:
        self._read: set[int] = set()
        self._written: set[int] = set()

    def add(self, inputs: Iterable[StrPath | Identified], outputs: Iterable[StrPath]) -> None:
        """Note what one job reads and writes; where it raises, nothing of the job is noted.

        Raises
        ------
        shutil.SameFileError
            One of `outputs` is one of `inputs` or another output, of this job or of one before it; or one of `inputs`
            is an output of a job before it.
        """
        inputs, outputs = list(inputs), list(outputs)
        for left in reversed(range(_LOOKS)):
            try:
                read, written = self._keys(inputs, outputs)
                break
            except shutil.SameFileError:
                if not left:
                    raise
        # Inodes tell two names of a job apart here and now; for the whole run paths do, which last.
        self._read.update(hash(key) for key in read if key[:1] != _INODE)
        self._written.update(hash(key) for key in written if key[:1] != _INODE)

    def _keys(
        self, inputs: Iterable[StrPath | Identified], outputs: Iterable[StrPath]
    ) -> tuple[set[tuple[object, ...]], set[tuple[object, ...]]]:
        """Return what is read and what is written; raises as `add` does."""
        read, written = set[tuple[object, ...]](), set[tuple[object, ...]]()
        for one in inputs:
            read |= self._checked(one, (self._written, "The source is what another job of this run writes"))
        for one in outputs:
            written |= self._checked(
                one,
                (read, "Source and target are the same file"),
                (self._read, "The target is what another job of this run reads"),
                (written, "Two outputs are the same file"),
                (self._written, "The target is what another job of this run writes"),
            )
        return read, written

    def _checked(
        self, one: StrPath | Identified, *others: tuple[set[tuple[object, ...]] | set[int], str]
    ) -> frozenset[tuple[object, ...]]:
        """Return what `one` is, if it is in none of `others`."""
        keys = frozenset(identities(one)) if isinstance(one, str | os.PathLike) else one.identity
        hashes = set(map(hash, keys))
        for known, problem in others:
            if not known.isdisjoint(keys) or not known.isdisjoint(hashes):
                raise shutil.SameFileError(
                    errno.EINVAL, problem, public_name(one if isinstance(one, str | os.PathLike) else one.name)
                )
        return keys
